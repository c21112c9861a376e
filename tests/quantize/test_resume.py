"""Quantizing, killed and continued: the same bytes, whatever a kill or the disk did to what was kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mc_gguf import container
from mc_gguf.artifacts import PROJECTIONS, Plan
from mc_gguf.common.errors import McError
from mc_gguf.common.files import workdir_path
from mc_gguf.quantize.pieces import Pieces
from mc_gguf.quantize.writer import model_workdir, write_model
from mc_gguf.source import open_checkpoint
from tests.support.gguf_models import RandomCheckpoint, make_plan, mixed

pytestmark = pytest.mark.native

FAST = ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS")


def journal(output: Path) -> Path:
    return workdir_path(output) / "pieces" / "journal"


def data_path(output: Path) -> Path:
    return workdir_path(output) / "pieces" / "data"


@pytest.fixture
def job(wide: RandomCheckpoint, tmp_path: Path) -> tuple[Plan, bytes]:
    """A plan and the bytes of its uninterrupted result."""
    plan = make_plan(wide.info, mixed(wide, FAST), tmp_path / "p.json")
    write_model(wide, None, plan, tmp_path / "whole.gguf", threads=2)
    return plan, (tmp_path / "whole.gguf").read_bytes()


class StopHere(BaseException):
    """Ends a run between two pieces, as a kill would."""


def stopped_after(
    wide: RandomCheckpoint, plan: Plan, output: Path, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Pieces.write

    def write(self: Pieces, data: bytes) -> None:
        if self.done == pieces:
            raise StopHere
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "write", write)
        with pytest.raises(StopHere):
            write_model(wide, None, plan, output, threads=1)
    assert not output.exists()


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    original, written = Pieces.write, []

    def write(self: Pieces, data: bytes) -> None:
        written.append(self.done)
        original(self, data)

    monkeypatch.setattr(Pieces, "write", write)
    return written


@pytest.mark.parametrize(
    "damage",
    ["none", "torn line", "no data", "flipped byte", "no newline", "longer journal", "header", "no piece"],
)
def test_continued_runs_give_the_same_bytes(
    wide: RandomCheckpoint,
    job: tuple[Plan, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    plan, whole = job
    output = tmp_path / "m.gguf"
    stopped_after(wide, plan, output, 20, monkeypatch)
    lines = journal(output).read_text()
    data = bytearray(data_path(output).read_bytes())
    first = 20
    tensors = container.layout(wide.info, plan.experts, plan.fixed)
    if damage == "torn line":
        journal(output).write_text(lines[:-4])
        first = 19
    elif damage == "no newline":
        journal(output).write_text(lines[:-1])
        first = 19
    elif damage == "longer journal":
        journal(output).write_text(lines + "00000000\n" * 300)
    elif damage == "header":
        data_path(output).write_bytes(b"X" + data[1:])
        first = 0
    elif damage == "no piece":  # killed while the first piece was made
        journal(output).write_text("")
        first = 0
    elif damage == "no data":
        data_path(output).write_bytes(data[: tensors[3].offset])
        first = 2 + 1 + 0
    elif damage == "flipped byte":
        data[tensors[3].offset + 5] ^= 1
        data_path(output).write_bytes(data)
        first = 3
    written = count_writes(monkeypatch)
    write_model(wide, None, plan, output, threads=2)
    assert output.read_bytes() == whole
    assert written[0] == first
    assert not workdir_path(output).exists()


def test_no_resume_and_other_plans_start_over(
    wide: RandomCheckpoint, job: tuple[Plan, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, whole = job
    output = tmp_path / "m.gguf"
    for other, resume in (
        (plan, False),
        (make_plan(wide.info, mixed(wide, FAST, 2), tmp_path / "q.json"), True),
    ):
        stopped_after(wide, plan, output, 9, monkeypatch)
        with monkeypatch.context() as patch:
            written = count_writes(patch)
            write_model(wide, None, other, output, threads=1, resume=resume)
        assert written[0] == 0
        assert (output.read_bytes() == whole) == (other is plan)
        output.unlink()


def test_an_output_that_is_there_stays_until_the_new_one_is_whole(
    wide: RandomCheckpoint, job: tuple[Plan, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "m.gguf"
    output.write_bytes(b"old")
    original = Pieces.write
    monkeypatch.setattr(Pieces, "write", lambda self, data: original(self, bytes(len(data))))
    monkeypatch.setattr(container, "validate", lambda path: (_ for _ in ()).throw(StopHere))
    with pytest.raises(StopHere):
        write_model(wide, None, job[0], output, threads=1)
    assert output.read_bytes() == b"old"


def test_what_the_disk_lost_is_noticed(tmp_path: Path) -> None:
    with Pieces(tmp_path, b"head", 12, [(4, 4), (8, 4)]) as file:
        assert file.done == 0
        file.write(b"abcd")
        with pytest.raises(McError, match=r"piece 1 of .* has 3 bytes instead of 4"):
            file.write(b"efg")
        file.write(b"efgh")
        file.verify()
        with file.path.open("r+b") as other:
            other.seek(8)
            other.write(b"x")
        with pytest.raises(McError, match="does not hold what was written at byte 8"):
            file.verify()


def test_a_failure_before_the_first_piece_leaves_nothing(
    wide: RandomCheckpoint, job: tuple[Plan, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(wide, job[0], tmp_path / "new" / "m.gguf", 0, monkeypatch)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small_is_told_before_the_work(
    wide: RandomCheckpoint, job: tuple[Plan, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "total_bytes", lambda tensors: 1 << 60)
    output = tmp_path / "m.gguf"
    with pytest.raises(McError, match=r"the work on m\.gguf takes 1048576.00 TiB; make room"):
        write_model(wide, None, job[0], output, threads=1)
    assert not workdir_path(output).exists()


def test_two_processes_do_not_write_one_file(
    wide: RandomCheckpoint, job: tuple[Plan, bytes], tmp_path: Path
) -> None:
    with (
        model_workdir(wide.info, None, tmp_path / "m.gguf"),
        pytest.raises(McError, match=r"another process .* is writing .*m\.gguf"),
    ):
        write_model(wide, None, job[0], tmp_path / "m.gguf", threads=1)


def test_a_bank_outlives_a_change_of_the_plan(
    wide: RandomCheckpoint, job: tuple[Plan, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What error compensation keeps beside the pieces serves other plans too."""
    output = tmp_path / "m.gguf"
    stopped_after(wide, job[0], output, 9, monkeypatch)
    (workdir_path(output) / "bank").mkdir()
    (workdir_path(output) / "bank" / "blocks").touch()
    stopped_after(
        wide, make_plan(wide.info, mixed(wide, FAST, 2), tmp_path / "q.json"), output, 9, monkeypatch
    )
    assert (workdir_path(output) / "bank" / "blocks").exists()


SLOW_RUN = """
import sys, time
from pathlib import Path
from mc_gguf.artifacts import Plan
from mc_gguf.quantize import writer
from mc_gguf.source import open_checkpoint
make = writer._make
writer._make = lambda *args: (time.sleep(0.004), make(*args))[1]
source, plan, target = map(Path, sys.argv[1:])
writer.write_model(open_checkpoint(source), None, Plan.load(plan), target, 2)
"""


def test_sigkill_at_any_point(tmp_path: Path, tiny_gguf: Path) -> None:
    """A real process, killed for real, again and again until it comes through."""
    source = open_checkpoint(tiny_gguf)
    rng = np.random.default_rng(3)
    experts = {p: rng.choice(FAST, (6, 8)).tolist() for p in PROJECTIONS}
    plan = make_plan(source.info, experts, tmp_path / "p.json")
    write_model(source, None, plan, tmp_path / "whole.gguf", threads=1)
    output = tmp_path / "m.gguf"
    command = [sys.executable, "-c", SLOW_RUN, str(tiny_gguf), str(tmp_path / "p.json"), str(output)]
    done = [0]
    for goal in (1, 30, 31, 100, 190, 10**6):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            lines = 0
            with suppress(FileNotFoundError):  # not begun, or published
                lines = journal(output).read_bytes().count(b"\n")
            if lines > max(goal, done[-1]):
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.002)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        done.append(journal(output).read_bytes().count(b"\n"))
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(done) >= 4  # it really was killed in the middle, and went on from there
    assert done == sorted(done)
