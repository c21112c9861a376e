"""The multiple-choice knapsack behind every budgeted strategy: pure arrays, no types, no files.

    minimise    sum_i error[i, c_i]
    subject to  sum_i size[i, c_i] <= capacity

It is solved in three steps, each of which can be the last: (1) the Lagrangian relaxation, found by sorting
the steps along every item's lower convex hull, gives a proven lower bound and a first solution; (2) single
steps that still fit are taken; (3) what the two bounds leave open, usually a few hundred options, goes to
HiGHS as an exact integer program. Options whose reduced cost exceeds the distance between the bounds cannot
be part of a better solution (Nemhauser & Wolsey 1988, II.5).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import BudgetError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Relative gap at which the search stops: the optimum for up to EXACT_ITEMS items; for more, a gap far below
# the noise of the measured errors.
EXACT_ITEMS, EXACT_GAP, LARGE_GAP = 2048, 1e-9, 3e-5
# A node limit stops at the same place on every machine; the time limit is only a safety net.
NODE_LIMIT = 200_000
TIME_LIMIT_S = 60.0


@dataclass(frozen=True, eq=False)
class Knapsack:
    """N items with T options each: `error` [N, T], infinite where an option is not available; `size` [N,
    T].
    """

    error: Floats
    size: Ints

    @property
    def unit(self) -> int:
        """Greatest common divisor of all sizes."""
        return int(np.gcd.reduce(self.size, axis=None)) or 1

    def total_error(self, choice: Ints) -> float:
        return float(self.error[np.arange(len(choice)), choice].sum())

    def total_size(self, choice: Ints) -> int:
        return int(self.size[np.arange(len(choice)), choice].sum())

    def smallest(self) -> Ints:
        """The option [N] of least size for every item; among equals, the one of least error."""
        size = np.where(np.isfinite(self.error), self.size, np.iinfo(np.int64).max)
        ties = size == size.min(axis=1, keepdims=True)
        return np.asarray(np.where(ties, self.error, np.inf).argmin(axis=1), dtype=np.int64)

    def largest(self) -> Ints:
        """The option [N] of greatest size for every item; among equals, the one of least error."""
        size = np.where(np.isfinite(self.error), self.size, -1)
        ties = size == size.max(axis=1, keepdims=True)
        return np.asarray(np.where(ties, self.error, np.inf).argmin(axis=1), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Solution:
    """A `choice` [N] and what is proven: no choice has an error below `bound`. `status`: how the search
    ended.
    """

    choice: Ints
    error: float
    bound: float
    status: str

    @property
    def gap(self) -> float:
        """(error - bound) / error: the largest share of the error that a better solution could still save."""
        return relative_gap(self.error, self.bound)


def relative_gap(error: float, bound: float) -> float:
    return max(0.0, (error - bound) / error) if error > 0 else 0.0


@dataclass(frozen=True, eq=False)
class _Relaxed:
    choice: Ints  # [N] feasible
    price: float  # error that one more byte would save: the multiplier of the capacity
    bound: float


def solve(items: Knapsack, capacity: int) -> Solution:
    """The best choice whose total size is at most `capacity`, with a proven bound.

    Raises BudgetError when not even the smallest options fit, or when HiGHS fails.
    """
    if items.total_size(items.smallest()) > capacity:
        raise BudgetError(f"{capacity} bytes are less than the smallest options need")
    relaxed = _relax(items, capacity)
    choice = fill(items, relaxed.choice, capacity)
    greedy = Solution(choice, items.total_error(choice), relaxed.bound, "greedy, gap proven by relaxation")
    target = EXACT_GAP if len(choice) <= EXACT_ITEMS else LARGE_GAP
    if greedy.gap <= target:
        return greedy
    return _solve_core(items, capacity, relaxed, greedy, target)


def _hull_steps(items: Knapsack) -> tuple[Ints, Ints, Ints, Floats]:
    """Steps along every item's lower convex hull, steepest first: item, option, added size, added error."""
    rows = np.arange(len(items.error))
    current = items.smallest()
    found: list[tuple[Ints, Ints, Ints, Floats, Floats]] = []
    for _ in range(items.error.shape[1]):
        added = items.size - items.size[rows, current][:, None]
        change = items.error - items.error[rows, current][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where((added > 0) & (change < 0), change / added, np.inf)
        # Among equally steep steps, take the longest: the hull keeps no point inside an edge.
        steepest = slope.min(axis=1)
        following = np.where(slope == steepest[:, None], added, -1).argmax(axis=1)
        rising = np.flatnonzero(np.isfinite(steepest))
        if not len(rising):
            break
        option = following[rising]
        found.append((rising, option, added[rising, option], change[rising, option], steepest[rising]))
        current = np.where(np.isfinite(steepest), following, current)
    if not found:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty, np.zeros(0)
    item, option, size, error, slopes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(slopes, kind="stable")
    return item[order], option[order], size[order], error[order]


def _relax(items: Knapsack, capacity: int) -> _Relaxed:
    """Optimum of the continuous relaxation: its whole steps are the choice, its value is the bound."""
    choice = items.smallest()
    item, option, size, error = _hull_steps(items)
    room = capacity - items.total_size(choice)
    n_taken = int(np.searchsorted(np.cumsum(size), room, side="right"))
    # The steps of one item come in the order of its hull, so the last one written is where the item ends.
    choice[item[:n_taken]] = option[:n_taken]
    bound, price = items.total_error(choice), 0.0
    if n_taken < len(item):
        price = float(-error[n_taken] / size[n_taken])
        bound -= price * (capacity - items.total_size(choice))
    return _Relaxed(choice, price, bound)


def lower_bound(items: Knapsack, capacity: int) -> float:
    """The Lagrangian bound: no choice whose total size is at most `capacity` has a smaller error."""
    return _relax(items, capacity).bound


def fill(items: Knapsack, choice: Ints, capacity: int) -> Ints:
    """`choice` after every single step that saves error and fits, largest saving first; none is left."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    room = capacity - items.total_size(choice)
    while True:
        added = items.size - items.size[rows, choice][:, None]
        saved = items.error[rows, choice][:, None] - items.error
        saved = np.where((added <= room) & (saved > 0), saved, 0.0)
        best = int(saved.argmax())
        item, option = divmod(best, saved.shape[1])
        if saved[item, option] <= 0:
            return choice
        room -= int(added[item, option])
        choice[item] = option


def _solve_core(
    items: Knapsack, capacity: int, relaxed: _Relaxed, greedy: Solution, target: float
) -> Solution:
    """Exact search among the options that the bounds leave open."""
    rows = np.arange(len(items.error))
    reduced = items.error + relaxed.price * items.size
    base = reduced.argmin(axis=1)
    reduced = reduced - reduced[rows, base][:, None]
    distance = greedy.error - relaxed.bound
    open_options = reduced <= distance * (1 + 1e-9)
    core = np.flatnonzero(open_options.sum(axis=1) > 1)
    item, option = np.nonzero(open_options[core])
    size = items.size - items.size[rows, base][:, None]
    room = capacity - items.total_size(base)
    value = (items.error - items.error[rows, base][:, None])[core][item, option] / distance
    # error = base + distance * value: the wanted accuracy, in units of the distance between the bounds
    accuracy = target * max(relaxed.bound, 0.0) / distance
    picked, proven, status = _highs(item, value, size[core][item, option], room, accuracy)
    base_error = items.total_error(base)
    bound = max(relaxed.bound, min(base_error + distance * proven, greedy.error))
    if picked is not None:
        choice = base.copy()
        choice[core[item[picked]]] = option[picked]
        if items.total_size(choice) <= capacity:
            choice = fill(items, choice, capacity)
            error = items.total_error(choice)
            if error < greedy.error:
                return Solution(choice, error, min(bound, error), status)
    return Solution(greedy.choice, greedy.error, bound, status)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS sometimes prints a debugging line to C's stdout, where our own output may be JSON."""
    libc = ctypes.CDLL(None)
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    libc.fflush(None)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _highs(
    item: Ints, value: Floats, size: Ints, room: int, accuracy: float
) -> tuple[Ints | None, float, str]:
    """The picked options (None if HiGHS found none), the proven lower bound of their value, HiGHS's status.

    `item` [V] is the number of every option's item, ascending; exactly one option of each item is picked.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n_option, n_item = len(item), int(item[-1]) + 1
    unit = int(np.gcd.reduce(size)) or 1
    one_each = csr_array((np.ones(n_option), (item, np.arange(n_option))), shape=(n_item, n_option))
    within = csr_array((size / unit)[None, :])
    limits = {"mip_rel_gap": min(accuracy, 0.1), "node_limit": NODE_LIMIT, "time_limit": TIME_LIMIT_S}
    with _silent_stdout():
        result = milp(
            value,
            integrality=np.ones(n_option),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(within, -np.inf, room // unit)],
            options=limits,
        )
    if result.status not in (0, 1):
        raise BudgetError(f"HiGHS failed on a feasible budget, status {result.status}: {result.message}")
    picked = np.flatnonzero(result.x > 0.5) if result.x is not None else None
    proven = result.mip_dual_bound if result.mip_dual_bound is not None else -np.inf
    return picked, float(proven), str(result.message)
