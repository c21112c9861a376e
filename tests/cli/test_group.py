"""The command line: fast and light help, every command documented, one error edge."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner, Result

import mc_gguf
from mc_gguf import cli
from mc_gguf.cli.command import Command
from mc_gguf.common.errors import McError
from tools.reference import cli as cli_reference

HEAVY = ("torch", "llama_cpp", "gguf", "numpy", "scipy", "transformers", "safetensors")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mc_gguf.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """CPU time, so that what else the machine does counts little; the best of several."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "mc_gguf", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(7)) < 0.3


def test_help_lists_every_command_in_order() -> None:
    """Under their headings, each with a whole sentence."""
    lines = run("--help").stdout.split("exit.\n")[-1].splitlines()
    commands = [line for line in lines if line.startswith("  ")]
    assert tuple(line.split()[0] for line in commands) == cli.COMMANDS
    assert all(line.endswith(".") and not line.endswith("..") for line in commands)
    assert [line for line in lines if line and line not in commands] == [f"{name}:" for name in cli.SECTIONS]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name
    assert run(name, "--help").exit_code == 0


def test_docs_cli_is_what_the_commands_say(repo_root: Path) -> None:
    assert (repo_root / "docs" / "reference" / "cli.md").read_text() == cli_reference.text(), "run: make docs"


def test_version() -> None:
    assert run("--version").stdout == f"mc-gguf, version {mc_gguf.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["convrt"], "No such command 'convrt'. Did you mean 'convert'?"),
        (["Chat"], "No such command 'Chat'. Did you mean 'chat'?"),
        (["routing", "sett"], "No such command 'sett'. Did you mean 'set'?"),
        (["runtime", "biuld"], "No such command 'biuld'. Did you mean 'build'?"),
        (["xyz"], "No such command 'xyz'. There are convert, chat, inspect, "),
        (["chat", "m.gguf", "--promt", "x"], "No such option"),
        (["routing", "set", "m.gguf", "--target-dorp", "x"], "--target-drop"),
    ],
)
def test_what_is_mistyped_gets_the_nearest_name(typed: list[str], hint: str) -> None:
    result = run(*typed)
    assert result.exit_code == 2
    assert hint in result.stderr


@pytest.mark.parametrize("name", [*cli.COMMANDS[:-1], "routing set", "routing show"])
def test_a_command_without_arguments_shows_its_help(name: str) -> None:
    result = run(*name.split())
    assert result.exit_code == 2
    assert "--help" in result.output
    assert "Error" not in result.output


def _command(monkeypatch: pytest.MonkeyPatch, body: Callable[[], None]) -> None:
    """`plan` with this body and an option --bits-per-layer."""
    decorated = click.option("--bits-per-layer", help="Bits.", expose_value=False)(body)
    command = click.command(name="plan", cls=Command)(decorated)
    monkeypatch.setattr(cli.CommandGroup, "get_command", lambda self, ctx, name: command)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (McError("plan.json is damaged"), 1, "Error: plan.json is damaged"),
        (McError("is too small", parameter="bits_per_layer"), 1, "Error: --bits-per-layer: is too small"),
        (McError("of another function", parameter="bpw"), 1, "Error: of another function"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.gguf"),
            1,
            "Error: a.gguf: No space left on device",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "Error: No space left on device"),
        (KeyboardInterrupt(), 130, "\nInterrupted"),
        (MemoryError("16 GiB"), 1, "Error: there is too little memory: 16 GiB"),
        (MemoryError(), 1, "Error: there is too little memory"),
    ],
)
def test_expected_errors_are_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> NoReturn:
        raise error

    _command(monkeypatch, body)
    result = run("plan")
    assert (result.exit_code, result.stderr) == (code, line + "\n")
    assert result.stdout == ""


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> NoReturn:
        raise OSError(errno.EBADF, "Bad file descriptor")

    _command(monkeypatch, body)
    assert isinstance(run("plan").exception, OSError)


def test_the_package_loads_its_names_when_they_are_used() -> None:
    code = (
        f"import sys, mc_gguf\nassert not set({HEAVY}) & set(sys.modules)\n"
        "names = [name for name in mc_gguf.__all__ if name not in dir(mc_gguf)]\nassert not names, names\n"
        "assert mc_gguf.Plan.load and mc_gguf.convert and mc_gguf.Calibration and mc_gguf.PlanRequest\n"
        "assert not {'torch', 'llama_cpp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        mc_gguf.Lama  # noqa: B018  the access is what is tested


@pytest.mark.parametrize("package", ["calibrate", "evaluate", "plan", "quantize", "refine"])
def test_importing_a_step_imports_no_torch(package: str) -> None:
    code = f"import sys; from mc_gguf.{package} import {package}; assert callable({package})\n"
    code += "assert not {'torch', 'llama_cpp', 'scipy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runtime_info_works_without_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_GGUF_CACHE", str(tmp_path))
    monkeypatch.delenv("MC_GGUF_RUNTIME", raising=False)
    facts = json.loads(run("runtime", "info", "--json").stdout)
    assert facts["built"] is False
    assert facts["path"] is None
    assert facts["llama_cpp_commit"].startswith("0c1e57098")
    assert len(facts["patch_digest"]) == 64
    assert facts["backends"] == {"cpu": False, "cuda": False, "vulkan": False, "metal": False}
    assert "not built; run: mc-gguf runtime build" in run("runtime", "info").stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_empty_text_is_no_path(name: str) -> None:
    """What a shell makes of "$MODEL" where MODEL is not set: elsewhere it would be the current directory."""
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    for sub in command.commands.values() if isinstance(command, click.Group) else (command,):
        for parameter in [p for p in sub.params if isinstance(p.type, click.Path)]:
            with pytest.raises(click.BadParameter, match="an empty text is no path; is a variable"):
                parameter.type.convert("", parameter, None)
