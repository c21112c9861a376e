"""Rounds of expanding the divergence around the incumbent, solving, measuring, and accepting the best or not.

    1. the divergence is expanded on some rows, and the expansion joined with those of earlier rounds
       (expansion.py, memory.py)
    2. its minima within the budget, for several pairs of coupling and damping, are the candidates
       (program.py)
    3. the real divergence of all candidates is measured on a few rows, that of the best on all rows
       (passes.py)
    4. the best becomes the incumbent when it is better by a paired test over rows

Successive halving as in EvoPress (arXiv 2410.14649): many candidates on few tokens, few on more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Floats
from mc_gguf.common.progress import Progress
from mc_gguf.plan.problem import Ints
from mc_gguf.refine.budget import Scope
from mc_gguf.refine.expansion import expand
from mc_gguf.refine.memory import Memory, wanted_types
from mc_gguf.refine.passes import Assignment, Evaluator
from mc_gguf.refine.program import Program
from mc_gguf.refine.state import SearchState

# (coupling, damping) of the candidates of a round.
SETTINGS = (
    (0.0, 0.0),
    (0.25, 0.1),
    (0.5, 0.25),
    (0.5, 0.5),
    (0.75, 0.25),
    (0.75, 0.5),
    (1.0, 0.5),
    (1.0, 1.0),
)
# Added to the damping before it is scaled by the caution, so that a damping of 0 grows, too.
LEAST_DAMPING = 0.25
MAX_CAUTION = 32
# A candidate is accepted when its mean paired difference is below minus this many standard errors.
MIN_SIGNIFICANCE = 1.0
FIRST_SHARE = 0.25  # of the search rows, for the first comparison
N_FINALIST = 2
# Draws per row; only one after ENOUGH_DRAWS in all, because then gradients are what is missing.
N_DRAW = 2
ENOUGH_DRAWS = 1024
# An expansion takes about as long as this many forward passes, and at most this share of the time.
EXPANSION_PASSES = 3 + 2 * N_DRAW
EXPANSION_SHARE = 0.1
MIN_EXPANSION_ROWS = 4
# Headers may grow with a candidate's groups, so the experts are given less, at most this many times.
MAX_TRIES = 8


@dataclass(eq=False)
class Search:
    """One search.

    `evaluator` holds the rows on which candidates are compared; the search began at the time `began` of
    `clock` and may take `seconds`. Types [L, E, 3, T] that are not `allowed`, or that are more than `reach`
    sizes away from the incumbent's, are not tried. `on_round` is called after every round.
    """

    scope: Scope
    evaluator: Evaluator
    state: SearchState
    directory: Path
    seed: int
    seconds: float
    began: float
    reach: int = 99
    allowed: NDArray[np.bool_] | None = None
    clock: Callable[[], float] = time.monotonic
    on_round: Callable[[], None] = lambda: None
    here: Floats = field(init=False)  # divergence of the incumbent, by row
    memory: Memory = field(init=False)
    _seconds_before: float = field(init=False)  # used by earlier runs of this search

    def run(self, bar: Progress) -> None:
        """Go from round to round until the time is used up; the state is saved after each."""
        shape = self.scope.problem.error.shape
        self.memory = Memory.load(self._memory_path(), (shape[0] * shape[1] * shape[2], shape[3]))
        self._seconds_before = self.state.seconds
        self.here = self.evaluator.settle(self.assignment(self.state.columns))
        self.state.expansion_rows = self.state.expansion_rows or self._expansion_rows()
        bar.update(min(self._used(), self.seconds), note=self.note())
        while self._used() < self.seconds and self._round():
            self._save()
            bar.update(min(self.state.seconds, self.seconds), note=self.note())
            self.on_round()

    def _save(self) -> None:
        """Save the memory first, under the number of the round, so that the two match whenever a kill
        comes.
        """
        before = self._memory_path()
        self.state.seconds, self.state.rounds = self._used(), self.state.rounds + 1
        self.memory.save(self._memory_path())
        self.state.save(self.directory / "state.json")
        before.unlink(missing_ok=True)

    def _memory_path(self) -> Path:
        return self.directory / f"memory-{self.state.rounds}.npz"

    def note(self) -> str:
        done = self.state
        return f"KLD {self.here.mean():.5f}, {done.rounds} rounds, {done.evaluations} candidates measured"

    def assignment(self, columns: Ints) -> Assignment:
        return Assignment(self.scope.problem.types, columns)

    def _used(self) -> float:
        """Seconds, including those of earlier runs of this search."""
        return self._seconds_before + self.clock() - self.began

    def _expansion_rows(self) -> int:
        each = EXPANSION_PASSES * self.evaluator.seconds_per_row
        rows = int(EXPANSION_SHARE * self.seconds / each)
        return min(max(rows, MIN_EXPANSION_ROWS), len(self.here))

    def _round(self) -> bool:
        """One round. Returns False when the time was over before anything was decided."""
        rng = np.random.default_rng([self.seed, self.state.rounds])
        n_row, n_draw = len(self.here), N_DRAW if len(self.memory.draws) < ENOUGH_DRAWS else 1
        rows = np.sort(rng.permutation(n_row)[: self.state.expansion_rows])
        wanted = wanted_types(self.scope.problem.size[0], self.state.columns, self.reach)
        if self.allowed is not None:
            wanted &= self.allowed
        self.memory.add(expand(self.evaluator, rows, wanted, n_draw, int(rng.integers(1 << 31))))
        candidates = self._candidates()
        if len(candidates) > N_FINALIST:
            first = self._measure(candidates, rng.permutation(n_row)[: max(2, int(n_row * FIRST_SHARE))])
            candidates = [candidates[i] for i in np.argsort(first.mean(axis=1), kind="stable")[:N_FINALIST]]
        if self._used() >= self.seconds:
            return False
        self.state.stalled += 1
        if candidates:
            found = self._measure(candidates)
            best = int(found.mean(axis=1).argmin())
            self._decide(candidates[best], found[best])
        return True

    def _measure(self, candidates: list[Ints], rows: Ints | None = None) -> Floats:
        self.state.evaluations += len(candidates)
        return self.evaluator.sweep([self.assignment(c) for c in candidates], rows)

    def _decide(self, columns: Ints, found: Floats) -> None:
        change = found - self.here
        if change.mean() >= -MIN_SIGNIFICANCE * change.std(ddof=1) / len(change) ** 0.5:
            return
        self.state.columns, self.state.accepted, self.state.stalled = columns, self.state.accepted + 1, 0
        self.here = self.evaluator.settle(self.assignment(columns))
        self.memory.move(columns.reshape(-1))

    def _candidates(self) -> list[Ints]:
        """Different assignments within the budget, at most one per setting, without the incumbent."""
        found = dict[bytes, Ints]()
        for coupling, damping in SETTINGS:
            columns = self._solve(coupling, (damping + LEAST_DAMPING) * self._caution() - LEAST_DAMPING)
            if (columns != self.state.columns).any():
                found[columns.tobytes()] = columns
        return list(found.values())

    def _caution(self) -> float:
        """Factor that makes steps smaller while none is accepted, as in the Levenberg-Marquardt method."""
        return float(min(2**self.state.stalled, MAX_CAUTION))

    def _solve(self, coupling: float, damping: float) -> Ints:
        problem, start = self.scope.problem, self.state.columns
        size = np.broadcast_to(problem.size[:, None], problem.error.shape).reshape(
            -1, problem.error.shape[-1]
        )
        program = Program(self.memory.gradient, self.memory.scaled(), size, coupling, damping)
        capacity, least = self.scope.capacity(start), problem.expert_bytes(start)
        for _ in range(MAX_TRIES):
            columns = program.minimise(start.reshape(-1), capacity).reshape(start.shape)
            over = self.scope.measure(columns) - self.scope.limit
            if over <= 0:
                return columns
            if capacity <= least:
                break
            capacity = max(capacity - over, least)
        return start
