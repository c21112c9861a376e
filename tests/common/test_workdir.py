"""Workdir: one process at a time, one identity, published whole, nothing left over."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mc_gguf.common.errors import McError
from mc_gguf.common.files import atomic_write, check_output, workdir_path
from mc_gguf.common.workdir import Workdir, forget_work, keep_only
from tests.support import ROOT

MINE = {"model": "m", "seed": 0, "types": ("a", "b")}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fail_after(output: Path, step: Callable[[Workdir], object]) -> None:
    """A run that does `step` and is interrupted then."""

    def run() -> None:
        with Workdir(output, MINE) as work:
            step(work)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def leave(output: Path) -> None:
    """Work that an interrupted run left."""
    fail_after(output, lambda work: work.path("state").write_text("work"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_work_is_published_and_nothing_else_stays(output: Path) -> None:
    output.write_text("old")
    with Workdir(output, MINE) as work:
        assert work.directory == output.parent / ".out.partial" == workdir_path(output)
        assert names(work.directory) == {"lock", "identity.json"}
        with atomic_write(work.path("result")) as file:
            file.write(b"new")
        assert output.read_text() == "old"
        work.publish(work.path("result"))
    assert output.read_text() == "new"
    assert names(output.parent) == {"out"}


def test_work_is_published_where_folders_cannot_be_synced(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    with Workdir(output, MINE) as work:
        work.path("result").write_bytes(b"done")
        work.publish(work.path("result"))
    assert (output.read_bytes(), names(output.parent)) == (b"done", {output.name})


def test_interrupted_work_is_there_again(output: Path) -> None:
    leave(output)
    assert not output.exists()
    with Workdir(output, {**MINE, "types": ["a", "b"]}) as work:  # JSON knows no tuples
        assert work.path("state").read_text() == "work"


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    def step(work: Workdir) -> None:
        work.path("empty").mkdir()
        work.part("part", {"plan": 1})

    fail_after(tmp_path / "new" / "folder" / "out", step)
    assert names(tmp_path) == set()


def test_a_start_that_cannot_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), Workdir(tmp_path / "new" / "out", MINE):
        pass
    assert names(tmp_path) == set()


def test_folders_of_others_stay(tmp_path: Path) -> None:
    fail_after(tmp_path / "new" / "out", lambda work: (tmp_path / "new" / "other").touch())
    assert names(tmp_path / "new") == {"other"}


def test_another_identity_is_told_and_starts_anew(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(output)
    with caplog.at_level(logging.WARNING), Workdir(output, {"model": "m", "seed": 1, "new": 2}) as work:
        assert names(work.directory) == {"lock", "identity.json"}
    (record,) = caplog.records
    assert "made with another new, seed, types); starting anew" in record.getMessage()


def test_another_version_of_mc_gguf_starts_anew(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(output)
    path = workdir_path(output) / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mc_gguf": "0.0.1"}))
    with caplog.at_level(logging.WARNING), Workdir(output, MINE) as work:
        assert not work.path("state").exists()
    assert "made with another mc_gguf); starting anew" in caplog.text


@pytest.mark.parametrize("text", [None, "", "[]", '{"model": '])
def test_work_of_nobody_is_not_continued(
    output: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    leave(output)
    path = workdir_path(output) / "identity.json"
    path.unlink() if text is None else path.write_text(text)
    with caplog.at_level(logging.WARNING), Workdir(output, MINE) as work:
        assert not work.path("state").exists()
    assert "it does not say what it is of" in caplog.text


def test_without_resume_work_is_thrown_away_in_silence(
    output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(output)
    with caplog.at_level(logging.INFO), Workdir(output, MINE, resume=False) as work:
        assert names(work.directory) == {"lock", "identity.json"}
    assert not caplog.records


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_lies_in_the_place_of_the_folder_is_kept(output: Path, kind: str) -> None:
    place, kept = workdir_path(output), output.parent / "kept"
    if kind == "file":
        place.write_bytes(b"GGUF")
    else:
        folder = kept if kind == "link" else place
        folder.mkdir()
        (folder / "data").write_bytes(b"GGUF")
        if kind == "link":
            place.symlink_to(kept)
    with pytest.raises(McError, match=r"is no folder; remove it|has files of others; move it away"):
        Workdir(output, MINE).__enter__()
    assert {path.read_bytes() for path in output.parent.rglob("*") if path.is_file()} == {b"GGUF"}


def test_an_input_in_the_folder_is_kept(output: Path) -> None:
    leave(output)
    (path,) = (path for path in workdir_path(output).iterdir() if path.name not in ("lock", "identity.json"))
    with pytest.raises(McError, match="lies where the work on"):
        check_output(output, [path])


def test_parts_have_identities_of_their_own(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    def step(work: Workdir) -> None:
        (work.part("pieces", {"plan": 1}) / "data").write_text("work")
        work.path("bank").mkdir()
        (work.path("bank") / "blocks").touch()

    fail_after(output, step)
    with caplog.at_level(logging.WARNING), Workdir(output, MINE) as work:
        assert names(work.part("pieces", {"plan": 1})) == {"identity.json", "data"}
        assert not caplog.records
        assert names(work.part("pieces", {"plan": 2})) == {"identity.json"}
        assert names(work.path("bank")) == {"blocks"}
    assert "made with another plan); starting anew" in caplog.text


def test_what_a_killed_atomic_write_left_goes(output: Path) -> None:
    leave(output)
    (workdir_path(output) / ".state.0123.tmp").touch()
    with Workdir(output, MINE) as work:
        assert names(work.directory) == {"lock", "identity.json", "state"}


def test_keep_only_keeps_what_makes_the_directory_ours(output: Path) -> None:
    with Workdir(output, MINE) as work:
        for name in ("a", "b"):
            work.path(name).touch()
        work.path("c").mkdir()
        keep_only(work.directory, ["b"])
        assert names(work.directory) == {"lock", "identity.json", "b"}


def test_only_a_regular_file_is_an_output(output: Path) -> None:
    output.mkdir()
    with pytest.raises(McError, match="is a directory"), Workdir(output, MINE):
        pass
    assert names(output.parent) == {"out"}


def test_an_output_that_became_a_directory_loses_no_work(output: Path) -> None:
    def run() -> None:
        with Workdir(output, MINE) as work:
            work.path("result").touch()
            output.mkdir()
            work.publish(work.path("result"))

    with pytest.raises(McError, match="is a directory"):
        run()
    assert "result" in names(workdir_path(output))


def test_a_full_disk_is_told_before_the_work(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run has written before counts, but only in the folder that is to grow."""
    with Workdir(output, MINE) as work:
        part = work.part("pieces", {})
        (part / "data").write_bytes(b"x" * (8 << 20))
        work.path("bank").write_bytes(b"x" * (8 << 20))
        os.sync()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        work.check_space(8 << 20, part)
        work.check_space(16 << 20)
        for n_bytes, folder in ((10 << 20, part), (20 << 20, None)):
            with pytest.raises(
                McError, match=r"has 1.00 MiB free, but the work on out takes .* MiB; make room"
            ):
                work.check_space(n_bytes, folder)


# --- Two processes

HOLDING = """
import sys, time
from pathlib import Path
from mc_gguf.common.workdir import Workdir
with Workdir(Path(sys.argv[1]), {"model": "m", "seed": 0, "types": ("a", "b")}) as work:
    work.path("state").write_text("theirs")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def other_process(output: Path) -> Iterator[subprocess.Popen[str]]:
    """One that is at work on `output`."""
    command = [sys.executable, "-c", HOLDING, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_at_once(output: Path) -> None:
    with other_process(output) as process:
        began = time.monotonic()
        message = rf"another process \(PID {process.pid}\) is writing .*out; wait for it or stop it"
        with pytest.raises(McError, match=message), Workdir(output, MINE):
            pass
        with pytest.raises(McError, match=message):
            forget_work(output)
        with pytest.raises(McError, match=message), Workdir(output, {}, resume=False):
            pass
        assert time.monotonic() - began < 5
        assert (workdir_path(output) / "state").read_text() == "theirs"


def test_the_lock_of_a_dead_process_is_taken_over(output: Path) -> None:
    with other_process(output) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Workdir(output, MINE) as work:
            assert work.path("state").read_text() == "theirs"
            assert work.path("lock").read_text() == f"{os.getpid()}\n"


def test_a_second_one_in_the_same_process_is_refused(output: Path) -> None:
    with Workdir(output, MINE), pytest.raises(McError, match=f"PID {os.getpid()}"), Workdir(output, MINE):
        pass


def test_file_systems_without_locks(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING):
        leave(output)
    assert "start no second run for the same output" in caplog.text
    assert "state" in names(workdir_path(output))


def test_forgetting(output: Path) -> None:
    forget_work(output)
    leave(output)
    forget_work(output)
    assert names(output.parent) == set()


# --- Killed

COUNTING = """
import sys, time
from pathlib import Path
from mc_gguf.common.files import atomic_write
from mc_gguf.common.workdir import Workdir, keep_only
output = Path(sys.argv[1])
with Workdir(output, {"n": 40}) as work:
    part = work.part("numbers", {"step": 1})
    done = sorted(int(path.name) for path in part.glob("[0-9]*"))
    for number in range(done[-1] + 1 if done else 0, 40):
        sys.stdin.readline()  # the test says when
        with atomic_write(part / str(number)) as file:
            file.write(b"x" * number)
        keep_only(part, [str(number)])
        print(number, flush=True)
    work.publish(part / "39")
print("done", flush=True)
"""


def test_killed_at_random_moments_it_comes_through(output: Path) -> None:
    """No step that was reported is made again, and what is published is whole."""
    rng = np.random.default_rng(0)
    steps: list[str] = []
    kills = 0
    while not steps or steps[-1] != "done":
        command = [sys.executable, "-c", COUNTING, str(output)]
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "bufsize": 1,
        }
        with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            for line in process.stdout:
                steps.append(line.strip())
                if steps[-1] == "done":
                    break
                process.stdin.write("\n")
                if kills < 6 and rng.random() < 0.3:
                    time.sleep(rng.random() * 0.01)
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    steps += process.stdout.read().split()
                    break
        assert process.returncode in (0, -signal.SIGKILL)
        assert output.exists() == (steps[-1] == "done")
    assert kills >= 3
    assert output.read_bytes() == b"x" * 39
    assert names(output.parent) == {"out"}
    numbers = [int(step) for step in steps[:-1]]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 40 - kills  # killed between a step and its report
