"""The verbs that run or show a model, with what users bring: it works, or one line says what is wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mc_gguf import Llama
from mc_gguf.common.progress import progress
from mc_gguf.ggml.gguf_file import ARRAY, STRING, Value, read_header
from mc_gguf.runtime.upstream import cache_dir
from mc_gguf.source import open_checkpoint
from tests.support import ROOT, TINY
from tests.support.child import Outcome, run_child, run_command
from tests.support.command_line import fails_with, invoke
from tests.support.gguf_models import changed_copy, make_calibration

pytestmark = pytest.mark.native

TEMPLATE = "tokenizer.chat_template"
SMALL = ("--ctx", "256", "--threads", "1", "--temp", "0", "-n", "4")
TEMPLATES = {
    "go": "{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}",
    "open": "{% for message in messages %}{{ message['content'] }}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "no-system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ messages[-1]['content'] }}",
    "nothing": "{% if false %}x{% endif %}",
    "huge": "{{ 'x' * 10**15 }}",
    "arithmetic": "{{ 1 // 0 }}",
    "blank": "  ",
    "bytes": b"{{ messages[-1]['content'] }} caf\xe9".decode("utf-8", "surrogateescape"),
}


@pytest.fixture(scope="module")
def templates(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The bundled model with each of the templates."""
    folder = tmp_path_factory.mktemp("templates")
    return {
        name: changed_copy(tiny_gguf, folder / f"{name}.gguf", {TEMPLATE: Value(STRING, text)})
        for name, text in TEMPLATES.items()
    }


def chat(model: Path, *arguments: object, typed: bytes | None = b"", **environment: str | None) -> Outcome:
    return run_command("chat", model, *SMALL, *arguments, stdin=typed, environment=environment)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("go", (), "the chat template does not compile: "),
        ("open", (), "the chat template does not compile: "),
        ("raises", (), "the chat template fails: roles must alternate"),
        ("no-system", ("--system", "Be brief."), "the chat template fails: System role not supported"),
        ("nothing", (), "the chat template makes nothing of the messages"),
        ("huge", (), "the chat template fails: "),
        ("arithmetic", (), "the chat template fails: "),
    ],
)
def test_a_template_that_fails_is_one_line_with_a_way_out(
    templates: Mapping[str, Path], name: str, options: tuple[str, ...], message: str
) -> None:
    about = "--system, --template" if options else "--template, --raw"
    for prompt in ((), ("-p", "hi")):
        fails_with(rf"{about}: ({message})", "chat", templates[name], *SMALL, *options, *prompt)
    assert invoke("chat", templates[name], *SMALL, "-p", "hi", "--raw").stdout.strip()


def test_another_template_takes_the_place_of_the_models(
    templates: Mapping[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    ways = ("-p", "one two", "--template", file)
    assert invoke("chat", templates["go"], *SMALL, *ways).exit_code == 0
    told = invoke("chat", templates["go"], *SMALL, *ways, "--system", "Be brief.").stdout
    assert told != invoke("chat", templates["go"], *SMALL, *ways).stdout
    file.write_bytes(b"{{ 'caf\xe9' }}")
    fails_with("chat.jinja is not UTF-8", "chat", templates["go"], *SMALL, *ways)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    fails_with("chat.jinja is a Git LFS pointer", "chat", templates["go"], *SMALL, *ways)
    file.write_text("{{ .Prompt }}")
    fails_with("template does not compile", "chat", templates["go"], *SMALL, *ways)
    fails_with("--template, --raw: these exclude", "chat", templates["go"], *SMALL, *ways, "--raw")


def test_a_blank_template_and_one_with_odd_bytes_work(templates: Mapping[str, Path]) -> None:
    for name in ("blank", "bytes"):
        assert invoke("chat", templates[name], *SMALL, "-p", "hi").exit_code == 0


def test_eval_needs_no_template(templates: Mapping[str, Path], repo_root: Path) -> None:
    options = (
        "--text",
        repo_root / "README.md",
        "--ctx",
        "64",
        "--tokens",
        "60",
        "--threads",
        "1",
        "--quiet",
    )
    done = invoke("eval", templates["go"], templates["raises"], *options)
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_system_prompt_needs_a_template(tiny_gguf: Path) -> None:
    fails_with("--system, --template: this model has no chat", "chat", tiny_gguf, *SMALL, "--system", "x")
    fails_with("raw text has no place", "chat", tiny_gguf, *SMALL, "--system", "x", "--raw")
    fails_with("--system, --prompt: - is the text on stdin", "chat", tiny_gguf, *SMALL, "--system", "-")


ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "LANG": None},
    "C without coercion": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def parrot(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model all of whose words begin with a character that is not ASCII."""
    tokens = read_header(tiny_gguf).kv["tokenizer.ggml.tokens"]
    odd = [f"{token}é€" if i > 300 else token for i, token in enumerate(tokens.value)]
    path = tmp_path_factory.mktemp("parrot") / "modèle.gguf"
    return changed_copy(tiny_gguf, path, {"tokenizer.ggml.tokens": Value(tokens.type, odd, tokens.item_type)})


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_encoding_ends_a_verb(parrot: Path, name: str, repo_root: Path) -> None:
    environment = ENCODINGS[name]
    for typed, arguments in ((b"", ("-p", "café")), ("café\n".encode(), ())):
        answered = run_command("chat", parrot, *SMALL, *arguments, stdin=typed, environment=environment)
        assert answered.code == 0, answered
        assert answered.stderr == ""
        assert len(answered.stdout.strip()) > 4
    text = ("--text", repo_root / "README.md", "--ctx", "64", "--tokens", "60", "--threads", "1")
    for command in (("inspect", parrot), ("eval", parrot, *text), ("chat", parrot.with_name("né.gguf"))):
        done = run_command(*command, environment=environment)
        assert done.is_clean, done


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, typed=b"caf\xe9\none two\n")
    assert done.code == 0
    assert "Error: the text is not UTF-8 near 'caf\\udce9'" in done.stdout
    assert len(done.stdout.splitlines()) >= 4
    refused = run_command("chat", tiny_gguf, *SMALL, "-p", "caf\udce9")
    assert refused.code == 1
    assert refused.stderr.startswith("Error: the text is not UTF-8 near")
    assert refused.stderr.count("\n") == 1


def test_a_closed_stdin(tiny_gguf: Path) -> None:
    closed = chat(tiny_gguf, typed=None)
    assert (closed.code, closed.stderr.count("\n")) == (1, 1)
    assert closed.stderr.startswith("Error: --prompt: stdin is closed")
    assert chat(tiny_gguf, "-p", "one two", typed=None).code == 0


def test_text_on_stdin(templates: Mapping[str, Path]) -> None:
    model = templates["bytes"]
    direct = chat(model, "-p", "one\ntwo").stdout
    assert chat(model, "-p", "-", typed=b"one\ntwo\n").stdout == direct
    told = chat(model, "-p", "one\ntwo", "--system", "-", typed=b"Be brief.")
    assert (told.code, told.stdout) == (0, direct)  # this template shows the last message only


@pytest.fixture
def odd(tiny_gguf: Path, tmp_path: Path) -> Path:
    """A folder whose name is not UTF-8, with a model, a text and a template."""
    folder = tmp_path / "fo\udcfflder"
    folder.mkdir()
    shutil.copyfile(tiny_gguf, folder / "m\udce9.gguf")
    (folder / "t\udce9.txt").write_bytes(
        (ROOT / "tests" / "data" / "wikitext-2.test.txt").read_bytes()[:4000]
    )
    (folder / "t.jinja").write_text("{{ messages[-1]['content'] }}")
    return folder


def test_names_that_are_not_utf8(odd: Path, own_cache: Path) -> None:
    model, text, few = (
        odd / "m\udce9.gguf",
        odd / "t\udce9.txt",
        ("--ctx", 64, "--tokens", 128, "--threads", 1),
    )
    calibration, plan, copy = odd / "c.safetensors", odd / "p\udce9.json", odd / "q\udce9.gguf"
    for command in (
        ("inspect", model),
        ("chat", model, *SMALL, "-p", "one", "--template", odd / "t.jinja"),
        ("eval", model, "--text", text, "--reference", model, "-o", odd / "r\udce9.html", *few),
        ("calibrate", model, "-o", calibration, "--text", text, *few, "--types", "IQ2_XS,Q3_K"),
        ("plan", calibration, "-o", plan, "--bpw", 3),
        ("quantize", model, plan, "-o", copy, "--calibration", calibration, "--no-compensate"),
        ("routing", "set", copy, "--calibration", calibration, "--layers", "all"),
        ("routing", "show", copy),
        ("inspect", copy, "--json"),
    ):
        done = run_command(*command)
        assert done.code == 0, done
    assert b"m\\udce9.gguf" in (odd / "r\udce9.html").read_bytes()


def test_the_name_of_a_directory_must_be_utf8(odd: Path) -> None:
    source = odd / "tiny"
    source.symlink_to(TINY, target_is_directory=True)
    for command in (("calibrate", source), ("convert", source, "--bpw", 16)):
        fails_with("is not UTF-8, .* rename the directory", *command, "-o", odd / "x")


SIZES = {  # options of chat or eval: what is said
    ("chat", "--ctx", "-1"): "'--ctx': -1 is not in the range",
    ("chat", "--ctx", "10000000000"): "'--ctx': 10000000000 is not in the range",
    ("chat", "--ctx", "1000000000"): "--ctx: a context of 1000000000 tokens takes at least",
    ("chat", "--threads", "0"): "'--threads': 0 is not in the range",
    ("chat", "--threads", "1000000"): "'--threads': 1000000 is not in the range 1<=x<=512",
    ("chat", "-n", "0"): "'-n' / '--max-tokens': 0 is not in the range",
    ("chat", "--temp", "nan"): "'--temp': nan is not a finite number",
    ("chat", "--temp", "inf"): "'--temp': inf is not a finite number",
    ("chat", "--temp", "-1"): "'--temp': -1.0 is not in the range",
    ("chat", "--seed", "-1"): "'--seed': -1 is not in the range",
    ("chat", "--seed", "4294967296"): "'--seed': 4294967296 is not in the range",
    ("chat", "--routing", "odp:target_drop=abc"): "--routing: 'abc' is not a share",
    ("chat", "--routing", "none"): "--routing: there is no routing policy 'none'",
    ("eval", "--ctx", "0"): "'--ctx': 0 is not in the range",
    ("eval", "--ctx", "1000000000"): "--ctx: a context of 1000000000 tokens takes at least",
    ("eval", "--ctx", "99999999999999"): "'--ctx': 99999999999999 is not in the range",
    ("eval", "--tokens", "0"): "'--tokens': 0 is not in the range",
    ("eval", "--threads", "1000000"): "'--threads': 1000000 is not in the range",
    ("eval", "--routing", "threshold"): "--routing: ",
}


@pytest.mark.parametrize("options", SIZES, ids=" ".join)
def test_sizes_that_cannot_be(tiny_gguf: Path, repo_root: Path, options: tuple[str, str, str]) -> None:
    verb, rest = options[0], options[1:]
    usual = ("-p", "one") if verb == "chat" else ("--text", repo_root / "README.md")
    refused = invoke(verb, tiny_gguf, *usual, *rest)
    assert refused.exit_code in (1, 2)
    assert refused.stdout == ""
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert SIZES[options] in last


@pytest.mark.parametrize("ctx", ["0", "1", "100", "257"])
def test_sizes_that_256_does_not_divide_work(tiny_gguf: Path, ctx: str) -> None:
    options = ("-p", "one two", "--ctx", ctx, "--threads", "1", "-n", "300", "--temp", "0")
    assert invoke("chat", tiny_gguf, *options).exit_code == 0


def test_answers_are_random_without_a_seed_and_the_same_with_one(tiny_gguf: Path) -> None:
    def answer(*options: str) -> str:
        return chat(tiny_gguf, "-p", "one two", "--temp", "1.5", "-n", "24", *options).stdout

    assert len({answer() for _ in range(3)}) == 3
    assert answer("--seed", "7") == answer("--seed", "7")


def test_an_empty_prompt_without_bos(tiny_gguf: Path, tmp_path: Path) -> None:
    bool_type = 7
    changes = {"tokenizer.ggml.add_bos_token": Value(bool_type, False)}
    model = changed_copy(tiny_gguf, tmp_path / "m.gguf", changes)
    fails_with("the prompt is empty, and this model adds no BOS", "chat", model, *SMALL, "-p", "")
    assert invoke("chat", tiny_gguf, *SMALL, "-p", "").exit_code == 0
    talked = chat(model, typed=b"\n  \none\n")
    assert talked.code == 0
    assert "Error" not in talked.stdout


ODD = "caf\udce9"
ODD_METADATA = {
    "value": {"general.author": Value(STRING, ODD)},
    "name": {"general.name": Value(STRING, ODD)},
    "item": {"general.tags": Value(ARRAY, ["a", ODD], STRING)},
    "long": {"general.description": Value(STRING, "é" * 50_000)},
    "template": {TEMPLATE: Value(STRING, "{{ messages[-1]['content'] }}" + ODD)},
}


@pytest.mark.parametrize("name", [*ODD_METADATA, "key"])
def test_odd_metadata_takes_nothing_with_it(tiny_gguf: Path, tmp_path: Path, name: str) -> None:
    calibration = tmp_path / "c.safetensors"
    make_calibration(open_checkpoint(tiny_gguf).info, calibration)
    model = tmp_path / "m.gguf"
    if name == "key":
        model.write_bytes(tiny_gguf.read_bytes().replace(b"general.name", b"general.nam\xe9"))
    else:
        changed_copy(tiny_gguf, model, ODD_METADATA[name])
    routed = ("routing", "set", model, "--calibration", calibration, "--layers", "all", "--quiet")
    for command in (routed, ("routing", "show", model), ("inspect", model)):
        done = invoke(*command)
        assert done.exit_code == 0, done.output
    answered = invoke("chat", model, *SMALL, "-p", "one two", "--routing", "auto")
    assert answered.exit_code == 0
    assert answered.stderr.startswith("Routing odp: ")
    open_checkpoint(model)  # what convert and the others read
    with contextlib.closing(Llama(model, n_ctx=256, n_threads=1)) as llm:
        assert llm.metadata["llama.expert_count"] == "8"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Straße".encode("latin-1"), r"is not UTF-8 \(see byte 4\); .* iconv -f LATIN1 -t UTF-8"),
        ("one".encode("utf-16"), "is UTF-16; .* iconv -f UTF-16 -t UTF-8"),
        ("one".encode("utf-32"), "is UTF-32; .* iconv -f UTF-32 -t UTF-8"),
        (b"", "has 1 tokens, but 64 are needed"),
    ],
)
def test_texts_in_other_encodings(tiny_gguf: Path, tmp_path: Path, content: bytes, message: str) -> None:
    text = tmp_path / "t.txt"
    text.write_bytes(content)
    fails_with(message, "eval", tiny_gguf, "--text", text, "--ctx", 64, "--threads", 1)


def test_a_byte_order_mark_is_said(
    tiny_gguf: Path, repo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "t.txt"
    text.write_bytes(b"\xef\xbb\xbf" + (repo_root / "README.md").read_bytes())
    options = ("--text", text, "--ctx", 64, "--tokens", 60, "--threads", 1, "--quiet")
    assert invoke("eval", tiny_gguf, *options).exit_code == 0
    assert "begins with a byte order mark" in caplog.text


def _user_namespaces() -> bool:
    return subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode == 0


NOBODY = ("unshare", "--user", "--map-user=54321", "--map-group=54321", "env", "-u", "HOME")


@pytest.mark.skipif(not shutil.which("unshare") or not _user_namespaces(), reason="no user namespaces here")
def test_a_user_without_a_home(tiny_gguf: Path, tiny_model: Path, repo_root: Path, tmp_path: Path) -> None:
    text = ("--text", repo_root / "README.md", "--ctx", 64, "--tokens", 60, "--threads", 1)
    commands: list[tuple[object, ...]] = [
        ("runtime", "info"),
        ("chat", tiny_gguf, *SMALL, "-p", "one"),
        ("eval", tiny_gguf, *text),
        ("convert", tiny_model, "--bpw", 16, "-o", tmp_path / "m.gguf"),
    ]
    environment = {"MC_GGUF_CACHE": None, "XDG_CACHE_HOME": None}
    for command in commands:
        words = [*NOBODY, sys.executable, "-m", "mc_gguf", *map(str, command)]
        refused = run_child(words, environment=environment)
        assert (refused.code, refused.stderr.count("\n")) == (1, 1), refused
        assert refused.stderr.startswith("Error: you have no home directory; set MC_GGUF_CACHE")
        assert run_child(words, environment={"MC_GGUF_CACHE": str(cache_dir())}).code == 0
    inspected = run_child([*NOBODY, sys.executable, "-m", "mc_gguf", "inspect", str(tiny_gguf)])
    assert inspected.code == 0


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Nobody writes into this pipe, so that reading it would never end."""
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for command in (("inspect",), ("routing", "show"), ("chat",), ("eval", "--text", pipe)):
        refused = run_command(*command, pipe, timeout=60)
        assert refused.code == 1
        assert refused.stderr.startswith(f"Error: {pipe} is not a regular file")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"]])
def test_help_on_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "mc_gguf", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_progress_on_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MC_GGUF_QUIET", raising=False)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with progress("x", 3, "steps") as bar:
            for _ in range(3):
                bar.advance()
                bar.say("y")
        monkeypatch.undo()
        assert bar.done == 3
        with contextlib.suppress(OSError):
            full.close()
