"""Outputs: what every verb refuses to replace, a full disk, and two runs at once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mc_gguf.cli import main
from mc_gguf.common.errors import McError
from mc_gguf.common.files import workdir_path
from mc_gguf.common.lock import output_lock, reserved
from mc_gguf.common.workdir import Workdir
from tests.support import ROOT, TINY
from tests.support.child import Outcome, run_command
from tests.support.mixed_files import first_layers

VERBS = {
    "calibrate": "calibrate source --text text -o {out}",
    "plan": "plan calib --bpw 2 -o {out}",
    "convert": "convert source --bpw 2 --text text --calibration calib -o {out}",
    "quantize": "quantize source plan --calibration calib --calibration-text text -o {out}",
    "refine": "refine source plan --calibration calib --text text --time 1s -o {out}",
    "eval": "eval model --text text --reference source -o {out}",
    "routing set": "routing set model --calibration calib -o {out}",
}
NATIVE = {"eval": pytest.mark.native}  # it imports the runtime before it looks at a file
INPUTS = {"source", "text", "calib", "plan", "model"}


def _invoke(line: str, out: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the verb says; none of its inputs is what it would have to be."""
    monkeypatch.chdir(folder)
    for name in INPUTS:
        Path(name).write_bytes(b"x")
    result = CliRunner().invoke(main, [word.format(out=out) for word in line.split(" ")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert {Path(name).read_bytes() for name in INPUTS} == {b"x"}
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        pytest.param(verb, name, marks=NATIVE.get(verb, ()))
        for verb, line in VERBS.items()
        for name in sorted(INPUTS & {*line.split()} - {verb})
        if (verb, name) != ("routing set", "model")  # which it changes
    ],
)
def test_no_input_is_an_output(verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under another name either."""
    (tmp_path / "sub").mkdir()
    for out in (name, f"sub/../{name}"):
        line = _invoke(VERBS[verb], out, tmp_path, monkeypatch)
        assert "write to another file" in line
        assert line.startswith("Error: --output: ")
    (tmp_path / "hard").hardlink_to(tmp_path / name)
    assert "write to another file" in _invoke(VERBS[verb], "hard", tmp_path, monkeypatch)


@pytest.mark.parametrize("verb", [pytest.param(verb, marks=NATIVE.get(verb, ())) for verb in VERBS])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("folder", "is a directory"),
        ("fifo", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        ("x" * 250, "has 250 bytes"),
        ("text/out", "cannot be written: Not a directory"),
    ],
)
def test_what_cannot_be_an_output(
    verb: str, out: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    line = _invoke(VERBS[verb], out, tmp_path, monkeypatch)
    assert words in line
    assert {path.name for path in tmp_path.iterdir()} == INPUTS | {"folder", "fifo"}


@pytest.mark.parametrize("verb", VERBS)
def test_no_output_has_an_empty_name(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path("") is the current directory."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [word.format(out="") for word in VERBS[verb].split(" ")])
    assert result.exit_code == 2
    assert "'-o' / '--output': an empty text is no path" in result.stderr
    assert not any(tmp_path.iterdir())


def test_what_convert_writes_beside_its_output_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.plan.json").mkdir()
    line = _invoke("convert source --bpw 2 -o {out}", "m.gguf", tmp_path, monkeypatch)
    assert "m.plan.json is a directory" in line


# --- Two runs at once

HOLDING = """
import sys, time
from pathlib import Path
from mc_gguf.common.lock import reserved
with reserved(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_conversion_keeps_others_out(tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    command = [sys.executable, "-c", HOLDING, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        done = CliRunner().invoke(main, ["convert", str(TINY), "--bpw", "2", "-o", str(output)])
        process.kill()
    assert done.exit_code == 1
    assert f"another process (PID {process.pid}) is writing {output}; wait for it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".m.gguf.partial"]


def test_steps_of_one_conversion_share_its_lock(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"

    def elsewhere() -> None:
        with pytest.raises(McError, match="another process") as caught, output_lock(output):
            pass
        refused.append(caught)

    refused: list[object] = []
    with reserved(output):
        for _ in range(2):
            with Workdir(output, {"n": 1}) as work:
                work.path("result").write_bytes(b"done")
                work.publish(work.path("result"))
            assert (workdir_path(output) / "lock").exists()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert [path.name for path in output.parent.iterdir()] == ["out"]


# --- A disk that is full

CALIBRATE = ("--tokens", 512, "--ctx", 64, "--rows", 16, "--types", "Q2_K,Q3_K", "--threads", 1, "--quiet")


def _calibrate(output: Path, **limits: int) -> Outcome:
    return run_command("calibrate", TINY, *CALIBRATE, "-o", output, **limits)


@pytest.mark.native
def test_a_full_disk_is_one_line_and_the_run_continues(tmp_path: Path) -> None:
    free, full = tmp_path / "free.calib.safetensors", tmp_path / "full.calib.safetensors"
    assert _calibrate(free).code == 0
    done = _calibrate(full, file_size=free.stat().st_size - 1000)
    assert (done.code, done.is_clean) == (1, True)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert f"no room for the work on {full} (File too large)" in line
    assert not full.exists()
    again = _calibrate(full)
    assert again.code == 0
    assert full.read_bytes() == free.read_bytes()


@pytest.mark.native
def test_a_file_that_would_be_too_large_is_refused_before_the_work(tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    done = run_command("convert", TINY, "--bpw", "3", *CALIBRATE, "-o", output, file_size=1 << 20)
    assert done.code == 1
    (line,) = done.stderr.splitlines()
    assert "but files may have 1.00 MiB here; raise the limit (ulimit -f)" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.native
def test_the_disk_is_measured_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    arguments = ["convert", TINY, "--bpw", "3", *CALIBRATE, "-o", tmp_path / "m.gguf"]
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 1
    assert "has 1.00 MiB free, but making m.gguf takes" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_says_whether_the_work_is_kept(tmp_path: Path) -> None:
    def fill(step: Callable[[Workdir], object]) -> None:
        with Workdir(tmp_path / "out", {}) as work:
            step(work)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(McError, match=r"left on device\): make room; then run the same command again"):
        fill(lambda work: None)
    with pytest.raises(McError, match="make room; then the same command continues"):
        fill(lambda work: work.path("state").write_text("work"))


# --- Outputs among other files of a model


@pytest.mark.native
@pytest.mark.parametrize("verb", ["eval", "routing set", "convert"])
def test_no_shard_of_a_model_is_written(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = "m-00002-of-00003.gguf"
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"x")
    for present in (False, True):
        if present:
            (tmp_path / shard).write_bytes(b"x")
        assert "would be a shard of the model of" in _invoke(VERBS[verb], shard, tmp_path, monkeypatch)


@pytest.mark.native
def test_a_model_is_converted_in_its_own_folder(tmp_path: Path) -> None:
    source = first_layers(TINY, 1, tmp_path / "source")
    few = ("--bpw", 2.8, "--tokens", 512, "--ctx", 64, "--rows", 16, "--types", "Q2_K,Q3_K")
    done = run_command("convert", source, "-o", source / "model.gguf", *few)
    assert "model.calib.safetensors would be taken for a file of the source model" in done.stderr
    found = []
    for _ in range(2):
        done = run_command(
            "convert", source, "-o", source / "out.gguf", *few, "--no-compensate", "--threads", 1, "--quiet"
        )
        assert done.code == 0, done.stderr
        found.append((source / "out.gguf").read_bytes())
    assert found[0] == found[1]
