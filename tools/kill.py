"""Kill mc-gguf at random moments: what is resumed gives the same bytes, and no output is ever incomplete.

    python -m tools.kill --kills 1000                  # calibrate, quantize, refine, routing set and convert
    python -m tools.kill --kills 50 --verb quantize

Every verb runs once undisturbed, as the reference, then again and again: it is killed (SIGKILL) up to four
times at moments drawn over the time that it needs, and then left to finish. After each kill the outputs must
be missing or complete; after the last run they must be those of the reference, and nothing else may be left
in the folder. A search depends on its time, so what refine gives only has to be a valid plan of the same
size. The runs are forks of a process that has imported everything, with one thread each.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from mc_gguf.artifacts import Plan
from mc_gguf.cli import main as command
from mc_gguf.common.errors import McError
from tools.common import CALIBRATION_TEXT, run_tool
from tools.experiments.make_model import Sizes, make_model
from tools.forks import become

MAX_KILLS = 4  # of one resumed run
SIZES = Sizes(layers=2, embd=256, ff=256, experts=4, top_k=2, heads=4, kv_heads=2, vocab=4096)
TEXT = "--tokens 512 --ctx 64 --text ../inputs/text"
CALIBRATION = f"{TEXT} --rows 16 --types IQ1_S,IQ2_XXS,Q2_K --threads 1"
SOURCE = "../inputs/source"
PLAN = f"{SOURCE} m.plan.json --calibration-text ../inputs/text --threads 1"


@dataclass(frozen=True)
class Case:
    """A command line that is run in a folder with copies of `inputs`, and writes `outputs` there."""

    arguments: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    is_exact: bool = True


CASES = {
    "calibrate": Case(
        f"calibrate {SOURCE} {CALIBRATION} -o m.calib.safetensors", outputs=("m.calib.safetensors",)
    ),
    "quantize": Case(
        f"quantize {PLAN} -o q.gguf", outputs=("q.gguf",), inputs=("m.calib.safetensors", "m.plan.json")
    ),
    "refine": Case(
        f"refine {PLAN} {TEXT} --time 1s -o r.plan.json",
        outputs=("r.plan.json",),
        inputs=("m.calib.safetensors", "m.plan.json"),
        is_exact=False,
    ),
    "routing set": Case("routing set m.gguf --target-drop 20%", outputs=("m.gguf",), inputs=("m.gguf",)),
    "convert": Case(
        f"convert {SOURCE} --bpw 2.2 {CALIBRATION} -o c.gguf",
        outputs=("c.gguf", "c.plan.json", "c.calib.safetensors"),
    ),
}


class Failure(McError):
    """A run that left what it must not leave."""


@click.command()
@click.option("--kills", default=1000, show_default=True, help="How many, over all verbs.")
@click.option("--verb", "verbs", multiple=True, type=click.Choice(list(CASES)), help="[default: all]")
@click.option("--seed", default=0, show_default=True)
def main(kills: int, verbs: tuple[str, ...], seed: int) -> None:
    """Kill mc-gguf at random moments and check what is left."""
    rng = np.random.default_rng(seed)
    chosen = verbs or tuple(CASES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder / "inputs")
        for verb in chosen:
            done = Tries(verb, folder, rng).kill(-(-kills // len(chosen)))
            result = "same bytes" if CASES[verb].is_exact else "valid plans, no larger than before"
            _say(f"{verb}: {done.kills} kills, {done.finished} runs that were resumed: {result}\n")


def prepare(folder: Path) -> None:
    """Everything that is an input of a case, made once, and in this process: the forks find all modules
    imported and ggml's tables made.
    """
    make_model(folder / "source", SIZES, 1 << 30, seed=0)
    (folder / "text").write_bytes(CALIBRATION_TEXT.read_bytes()[: 1 << 14])
    torch.set_num_threads(1)
    os.chdir(folder)
    for more in ("--refine 1s", ""):  # the search for its modules alone
        convert = f"convert {SOURCE} --bpw 2.5 {CALIBRATION} {more} -o m.gguf --quiet"
        command(convert.split(), standalone_mode=False)


@dataclass
class Done:
    """What was done to one verb."""

    kills: int = 0
    finished: int = 0


@dataclass
class Tries:
    """One verb, killed and resumed in folders under `folder`."""

    verb: str
    folder: Path
    rng: np.random.Generator

    @property
    def case(self) -> Case:
        return CASES[self.verb]

    def kill(self, kills: int) -> Done:
        """Raises Failure for a wrong result."""
        work = self._fresh()
        began = time.monotonic()
        run(self.case.arguments, work)
        seconds = time.monotonic() - began
        reference = {name: (work / name).read_bytes() for name in self.case.outputs}
        names = _names(work)
        done = Done()
        while done.kills < kills:
            work = self._fresh()
            before = {name: (work / name).read_bytes() for name in self.case.inputs}
            for _ in range(int(self.rng.integers(1, MAX_KILLS + 1))):
                done.kills += run(self.case.arguments, work, after=float(self.rng.uniform(0, 1.05 * seconds)))
                self._check(work, before, reference)
            run(self.case.arguments, work)
            self._check(work, {}, reference)
            if _names(work) != names:
                raise Failure(f"left over: {sorted(_names(work) ^ names)}")
            done.finished += 1
            _say(f"{self.verb}: {done.kills} kills")
        return done

    def _fresh(self) -> Path:
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name in self.case.inputs:
            shutil.copy(self.folder / "inputs" / name, work)
        return work

    def _check(self, work: Path, before: dict[str, bytes], reference: dict[str, bytes]) -> None:
        """Every output is what it was, or what it is to be; at the end (`before` is empty) the latter."""
        for name, wanted in reference.items():
            if not (work / name).exists():
                continue
            found = (work / name).read_bytes()
            if found not in (before.get(name), wanted) and not self._is_valid(work / name):
                raise Failure(f"{name} has {len(found)} bytes that are not those of an undisturbed run")

    def _is_valid(self, path: Path) -> bool:
        """Of what a search wrote: whether it is a plan that is no larger than the one it began with."""
        if self.case.is_exact:
            return False
        start, found = Plan.load(self.folder / "inputs" / "m.plan.json"), Plan.load(path)
        assert start.file_bytes is not None
        return found.file_bytes is not None and found.file_bytes <= start.file_bytes


def run(arguments: str, folder: Path, after: float | None = None) -> bool:
    """Runs mc-gguf in a fork and waits for its end; whether it was killed before, `after` seconds.

    Raises Failure when it ended with an error.
    """
    child = os.fork()
    if child == 0:
        become(lambda: _command(arguments, folder))
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        raise Failure(f"mc-gguf {arguments}: {(folder.parent / 'log').read_text()[-2000:]}")
    return False


def _command(arguments: str, folder: Path) -> None:
    """`mc-gguf ARGUMENTS` in `folder`, which ends this process."""
    log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    try:
        command([*arguments.split(), "--quiet"])
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else end.code is not None)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def _say(text: str) -> None:
    sys.stderr.write(f"\r{text}")
    sys.stderr.flush()


if __name__ == "__main__":
    run_tool(main, "kill")
