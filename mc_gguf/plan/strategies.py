"""The strategies: each turns a problem and a limit into the type of every expert's projection.

An assignment is `columns` [L, E, 3]: indices into Problem.types. Strategies differ only in what they may
choose (items) and by what measure; all of them obey the same limit, measured in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mc_gguf.common.errors import BudgetError
from mc_gguf.plan.problem import Floats, Ints, Problem
from mc_gguf.plan.solver import Knapsack, fill, lower_bound, relative_gap, solve

# Solving again with the room that the headers of the last solution left. It settles in two or three rounds,
# or goes round in a circle.
MAX_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Limit:
    """At most `limit` bytes. `measure` gives those of an assignment: of the experts, or of the whole file.

    In a file, headers, maps and padding depend a little on the assignment; `wobble` bounds the change of
    these that one expert's change can make (0 when only experts are measured).
    """

    limit: int
    measure: Callable[[Ints], int]
    wobble: int
    what: str
    describe: Callable[[int], str]

    def room(self, columns: Ints) -> int:
        """Bytes left; negative when the assignment is too large."""
        return self.limit - self.measure(columns)


@dataclass(frozen=True, eq=False)
class Items:
    """What is decided as one: N items, and how a choice for them becomes an assignment [L, E, 3]."""

    knapsack: Knapsack
    columns: Callable[[Ints], Ints]


def expert_items(problem: Problem) -> Items:
    """One item for every (layer, expert, projection)."""
    shape = problem.error.shape
    size = np.broadcast_to(problem.size, shape).reshape(-1, shape[-1])
    return Items(Knapsack(problem.error.reshape(size.shape), size), lambda choice: choice.reshape(shape[:-1]))


def layer_items(problem: Problem) -> Items:
    """One item for every (layer, projection): all its experts have one type, as in a plain GGUF."""
    n_layer, n_expert, n_projection, n_type = problem.error.shape
    error = problem.error.sum(axis=1).reshape(-1, n_type)
    size = np.broadcast_to(problem.size * n_expert, (n_layer, n_projection, n_type)).reshape(-1, n_type)

    def columns(choice: Ints) -> Ints:
        one = choice.reshape(n_layer, 1, n_projection)
        return np.broadcast_to(one, (n_layer, n_expert, n_projection))

    return Items(Knapsack(error, size), columns)


def check_feasible(limit: Limit, smallest: Ints, largest: Ints, hint: str = "") -> None:
    """Raises BudgetError with the feasible range unless the limit is inside it."""
    low, high = limit.measure(smallest), limit.measure(largest)
    if not low <= limit.limit <= high:
        raise BudgetError(
            f"a {limit.what} of {limit.describe(limit.limit)} is not feasible: "
            f"this strategy and these types reach from {limit.describe(low)} to {limit.describe(high)}{hint}"
        )


def solve_program(items: Items, limit: Limit) -> tuple[Ints, float]:
    """Assignment of least error within the limit, and its gap. No single step that saves error fits.

    The gap is that of the integer program over the bytes that the headers leave to the experts.
    """
    knapsack = items.knapsack
    check_feasible(limit, items.columns(knapsack.smallest()), items.columns(knapsack.largest()), _LARGER)
    choice = best = knapsack.smallest()
    best_error, bounds = knapsack.total_error(best), dict[int, float]()
    for _ in range(MAX_ROUNDS):
        capacity = limit.limit - _overhead(items, limit, choice)
        # Capacities that differ by less than the sizes' common divisor are the same program.
        if capacity // knapsack.unit in bounds or capacity < knapsack.total_size(knapsack.smallest()):
            break
        solution = solve(knapsack, capacity)
        bounds[capacity // knapsack.unit] = solution.bound
        choice = solution.choice
        fitting = _fill_measured(items, limit, shrink(items, limit, choice))
        if knapsack.total_error(fitting) < best_error:
            best, best_error = fitting, knapsack.total_error(fitting)
    best = _fill_measured(items, limit, best)
    capacity = limit.limit - _overhead(items, limit, best)
    bound = bounds.get(capacity // knapsack.unit, lower_bound(knapsack, capacity))
    return items.columns(best), relative_gap(knapsack.total_error(best), bound)


_LARGER = "; --bpw 16 makes the plain 16-bit file, and calibrate --types measures larger types"


def ratio_to_layers(problem: Problem, limit: Limit, columns: Ints) -> float | None:
    """Objective of `columns` relative to that of the best plan with one type per layer and projection within
    the same limit: what going per expert is worth. None where such a plan is not better than nothing.
    """
    layers, _ = solve_program(layer_items(problem), limit)
    best = problem.total_error(layers)
    return problem.total_error(columns) / best if best > 0 else None


def _overhead(items: Items, limit: Limit, choice: Ints) -> int:
    """Measured bytes that are not the items' own."""
    return limit.measure(items.columns(choice)) - items.knapsack.total_size(choice)


def _fill_measured(items: Items, limit: Limit, choice: Ints) -> Ints:
    """Single steps that save error, the most saving first, until none fits by the limit's own measure."""
    knapsack = items.knapsack
    if not limit.wobble:
        return fill(knapsack, choice, knapsack.total_size(choice) + limit.room(items.columns(choice)))
    rows = np.arange(len(choice))
    choice = choice.copy()
    while True:
        room = limit.room(items.columns(choice))
        added = knapsack.size - knapsack.size[rows, choice][:, None]
        saved = knapsack.error[rows, choice][:, None] - knapsack.error
        steps = np.argwhere((saved > 0) & (added <= room + limit.wobble))
        for item, option in steps[np.argsort(-saved[tuple(steps.T)], kind="stable")]:
            before = choice[item]
            choice[item] = option
            if limit.room(items.columns(choice)) >= 0:
                break
            choice[item] = before
        else:
            return choice


def uniform(problem: Problem, limit: Limit) -> Ints:
    """One type for all experts: the largest that fits; at equal size the one with less error.

    A projection that cannot have the type keeps its own fallback.
    """
    n_layer, n_expert, n_projection, n_type = problem.error.shape
    usable = np.isfinite(problem.error[0, 0])
    own = expert_items(problem).knapsack.smallest().reshape(n_layer, n_expert, n_projection)
    options = []
    for t in range(n_type):
        if usable[:, t].any():
            columns = np.where(usable[:, t], t, own)
            options.append((problem.expert_bytes(columns), -problem.total_error(columns), columns))
    options.sort(key=lambda option: option[:2])
    check_feasible(limit, options[0][2], options[-1][2], _LARGER)
    return next(columns for _, _, columns in reversed(options) if limit.room(columns) >= 0)


def shuffled(columns: Ints, seed: int) -> Ints:
    """The same types, per projection, given to the experts of the whole model by lot."""
    rng = np.random.default_rng(seed)
    flat = columns.reshape(-1, columns.shape[-1])
    mixed = [rng.permutation(flat[:, p]) for p in range(flat.shape[1])]
    return np.stack(mixed, axis=1).reshape(columns.shape)


def inverted(problem: Problem, columns: Ints) -> Ints:
    """The same types, per projection, the smallest to the experts that would gain most from the largest."""
    flat = columns.reshape(-1, columns.shape[-1])
    gain = _gain(problem).reshape(flat.shape)
    result = np.empty_like(flat)
    for p in range(flat.shape[1]):
        by_size = flat[np.argsort(problem.size[p, flat[:, p]], kind="stable"), p]
        result[np.argsort(-gain[:, p], kind="stable"), p] = by_size
    return result.reshape(columns.shape)


def _gain(problem: Problem) -> Floats:
    """Error [L, E, 3] that the largest type saves against the smallest."""
    knapsack = expert_items(problem).knapsack
    rows = np.arange(len(knapsack.error))
    saved = knapsack.error[rows, knapsack.smallest()] - knapsack.error[rows, knapsack.largest()]
    return saved.reshape(problem.error.shape[:-1])


def shrink(items: Items, limit: Limit, choice: Ints) -> Ints:
    """`choice` after the fewest and cheapest steps down that make it fit."""
    knapsack = items.knapsack
    rows = np.arange(len(knapsack.error))
    choice = choice.copy()
    while (room := limit.room(items.columns(choice))) < 0:
        freed = knapsack.size[rows, choice][:, None] - knapsack.size
        lost = knapsack.error - knapsack.error[rows, choice][:, None]
        possible = (freed > 0) & np.isfinite(lost)
        enough = possible & (freed >= limit.wobble - room)
        cost = np.where(enough if enough.any() else possible, np.maximum(lost, 0.0), np.inf)
        item, option = divmod(int(cost.argmin()), cost.shape[1])
        choice[item] = option
    return choice
