"""The integer program that strategies solve: items to choose for, under a limit that is measured exactly.

An assignment is `columns` [L, E, P]: indices into Problem.types. The solver (solver.py) knows only the bytes
of the items themselves; here its capacity is corrected until the whole file, headers included, fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mc_gguf.common.errors import BudgetError
from mc_gguf.plan.problem import Ints, Problem
from mc_gguf.plan.solver import Knapsack, fill, lower_bound, relative_gap, solve

# The program is solved again with the room that the headers of the last solution left. That settles within
# two or three rounds, or goes round in a circle.
MAX_ROUNDS = 8

# What to do when a budget lies outside the range that the types can reach.
OTHER_RANGES = (
    "; a budget of 16 bpw makes the plain 16-bit file, and a calibration of larger types reaches further"
)


@dataclass(frozen=True, eq=False)
class Limit:
    """At most `limit` bytes, as `measure` counts them for an assignment: the experts alone, or the whole
    file.

    In a file, headers, maps and padding depend a little on the assignment. `wobble` bounds by how many bytes
    they change when one expert's type changes; it is 0 when only the experts are measured. `what` names the
    limit in error messages, and `describe` prints a number of bytes in the limit's own unit.
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
    """N things that each get one type, and how a choice [N] for them becomes an assignment [L, E, P]."""

    knapsack: Knapsack
    columns: Callable[[Ints], Ints]


def expert_items(problem: Problem) -> Items:
    """One item for every (layer, expert, projection)."""
    shape = problem.error.shape
    size = np.broadcast_to(problem.size[:, None], shape).reshape(-1, shape[-1])
    return Items(Knapsack(problem.error.reshape(size.shape), size), lambda choice: choice.reshape(shape[:-1]))


def layer_items(problem: Problem) -> Items:
    """One item for every (layer, projection): all of its experts share one type, as in a plain GGUF."""
    n_layer, n_expert, n_projection, n_type = problem.error.shape
    error = problem.error.sum(axis=1).reshape(-1, n_type)
    size = (problem.size * n_expert).reshape(-1, n_type)

    def columns(choice: Ints) -> Ints:
        one = choice.reshape(n_layer, 1, n_projection)
        return np.broadcast_to(one, (n_layer, n_expert, n_projection))

    return Items(Knapsack(error, size), columns)


def check_feasible(limit: Limit, smallest: Ints, largest: Ints, hint: str = "") -> None:
    """Raise BudgetError, which names the feasible range, unless the limit lies within it."""
    low, high = limit.measure(smallest), limit.measure(largest)
    if not low <= limit.limit <= high:
        raise BudgetError(
            f"a {limit.what} of {limit.describe(limit.limit)} is not feasible: "
            f"this strategy and these types reach from {limit.describe(low)} to {limit.describe(high)}{hint}"
        )


def solve_program(items: Items, limit: Limit) -> tuple[Ints, float]:
    """The assignment of least error within the limit, and its optimality gap.

    No single change of type that saves error would still fit. The gap is that of the integer program over the
    bytes that the headers leave for the items. Raises BudgetError when the limit is out of range.
    """
    knapsack = items.knapsack
    check_feasible(limit, items.columns(knapsack.smallest()), items.columns(knapsack.largest()), OTHER_RANGES)
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


def _overhead(items: Items, limit: Limit, choice: Ints) -> int:
    """Measured bytes that do not belong to the items themselves."""
    return limit.measure(items.columns(choice)) - items.knapsack.total_size(choice)


def _fill_measured(items: Items, limit: Limit, choice: Ints) -> Ints:
    """`choice` after every single step that saves error and fits by the limit's measure, largest saving
    first.
    """
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


def shrink(items: Items, limit: Limit, choice: Ints) -> Ints:
    """`choice` after the fewest and cheapest steps to smaller types that make it fit the limit."""
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
