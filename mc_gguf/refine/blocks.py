"""Which quantized blocks a search measures: those that quantize would write, compensated or made by ggml.

Compensated blocks (docs/explanation/compensation.md) are made before the search starts, of the types near
the plan's own, in one pass over the calibration's text for the Hessians and all matrices. If that would
take more than MAX_SHARE of the time, the search measures ggml's blocks of all types instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import NO_CALIBRATION, PROJECTIONS, Calibration
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import check_space
from mc_gguf.common.progress import clock, progress
from mc_gguf.compensate.bank import Bank, bank_key
from mc_gguf.compensate.experts import (
    Wanted,
    bank_bytes,
    calibration_text,
    compensate,
    missing_from,
    open_bank,
    state_bytes,
)
from mc_gguf.compensate.matrix import supports
from mc_gguf.plan.problem import Ints, Problem
from mc_gguf.refine.matrices import GgmlQuantizer, Quantizer
from mc_gguf.refine.memory import wanted_types
from mc_gguf.runtime.upstream import pin
from mc_gguf.source import Checkpoint

NEAR = 2  # sizes up and down from the plan's own, where not all types can be had
MAX_SHARE = 0.5  # of the time for compensation

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A bank of blocks, what makes those that it lacks, and the types [L, E, 3, T] to choose from (None:
    all).
    """

    compensated: bool
    bank: Bank
    quantizer: Quantizer
    allowed: NDArray[np.bool_] | None = None


def ggml_blocks(checkpoint: Checkpoint, calibration: Calibration, folder: Path, threads: int) -> Blocks:
    """Blocks as ggml's quantizers make them, made when they are needed."""
    key = bank_key(checkpoint.info.fingerprint, calibration.fingerprint, f"ggml {pin().commit}")
    return Blocks(False, Bank(folder, key), GgmlQuantizer(checkpoint, calibration, threads))


def can_compensate(calibration: Calibration) -> bool:
    """Whether the calibration says what its text was; quantize compensates only then."""
    return calibration.fingerprint != NO_CALIBRATION and "sha256" in calibration.corpus


def compensated_blocks(
    checkpoint: Checkpoint,
    calibration: Calibration,
    problem: Problem,
    start: Ints,
    files: tuple[Path, ...],
    folder: Path,
    states: Path,
    threads: int,
    seconds: float,
    quiet: bool,
) -> Blocks | None:
    """Compensated blocks of the types near the plan's, made now; None if that takes more than MAX_SHARE of
    `seconds`.

    `folder` is that of the bank, and hidden states are kept in `states`. `files` hold the calibration's text
    (none: the bundled one).
    """
    allowed = wanted_types(problem.size[0], start, NEAR)
    text = calibration_text(checkpoint, calibration, files)
    bank, forecast = open_bank(folder, calibration), Forecast(MAX_SHARE * seconds)
    wanted = _wanted(calibration, problem, allowed)
    n_bytes = bank_bytes(checkpoint.info, missing_from(bank, wanted))
    n_bytes += state_bytes(checkpoint, text.rows.size)
    remedy = "make room, or search without compensation"
    check_space(folder, n_bytes, "a search among compensated matrices", remedy)
    with progress("compensate", unit="matrices", quiet=quiet) as bar:
        outcome = compensate(
            checkpoint,
            calibration,
            wanted,
            text,
            bank,
            threads,
            bar,
            states=states,
            keep_going=forecast.is_within_limit,
        )
    if not outcome.is_complete:
        log.warning(
            "error compensation of the types near the plan's would take %s, more than half of the time: the "
            "search measures ggml's blocks; give it more time, or turn compensation off",
            clock(forecast.expected_s),
        )
        return None
    if outcome.ratios:
        bar.say(outcome.text())
    return Blocks(True, bank, _refuse, allowed)


def _wanted(calibration: Calibration, problem: Problem, allowed: NDArray[np.bool_]) -> Wanted:
    """(layer, expert) -> (projection, type) of what is allowed and can be compensated."""
    names = [(c, name) for c, name in enumerate(problem.types) if supports(name)]
    return {
        (layer, expert): frozenset(
            (projection, name)
            for p, projection in enumerate(PROJECTIONS)
            for c, name in names
            if allowed[i, expert, p, c]
        )
        for i, layer in enumerate(calibration.layers)
        for expert in range(allowed.shape[1])
    }


def _refuse(layer: int, projection: str, expert: int, type_name: str) -> NDArray[np.uint8]:
    raise ArtifactError(
        f"the compensated {type_name} blocks of layer {layer}, expert {expert}, {projection} are missing or "
        "damaged; run the same command again"
    )


class Forecast:
    """Foresees how long work will take, and whether that is within a limit.

    It reckons with the rate since the first matrices: embedding and layers in which nothing is missing come
    before them and say nothing about the rate.
    """

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._now, self._began = limit_s, now, now()
        self.expected_s = 0.0
        self._first: tuple[float, int] | None = None  # time and matrices done

    def is_within_limit(self, done: int, total: int) -> bool:
        """Whether all of the work is expected to end in time, with `done` of `total` matrices made."""
        self.expected_s = now = self._now() - self._began
        if done and self._first is None:
            self._first = (now, done)
        elif self._first is not None and done > self._first[1]:
            rate = (now - self._first[0]) / (done - self._first[1])
            self.expected_s += rate * (total - done)
        return self.expected_s <= self.limit_s
