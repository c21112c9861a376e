"""The strategies of plan(). Each is one function here and one entry of STRATEGIES.

A strategy gets a Task and returns a Choice: the type of every expert's projection. Strategies differ only
in what gets a type of its own (items) and in the error that they minimise; all of them obey the same limit.
To add one, write its function and its entry; plan() and its checks read the table. The help of --strategy
names it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mc_gguf.artifacts import NOMINAL_TYPES, Calibration, FixedTypes
from mc_gguf.common.errors import BudgetError
from mc_gguf.common.units import format_size
from mc_gguf.plan import published
from mc_gguf.plan.others import Others, add_others, limit_with_others, split_assignment, total_error
from mc_gguf.plan.problem import Budget, FileBytes, Floats, Ints, Problem, alike, bytes_for_bpw
from mc_gguf.plan.program import (
    OTHER_RANGES,
    Items,
    Limit,
    check_feasible,
    expert_items,
    layer_items,
    shrink,
    solve_program,
)


@dataclass(frozen=True, eq=False)
class Choice:
    """What a strategy decided.

    `columns` [L, E, P]   indices into Problem.types
    `gap`                 optimality gap of the program; None where none was solved
    `others` [M]          indices into Others.types; None unless the task decides other matrices, too
    `bits` [L, E]         nominal bits; None where the strategy has none
    `layer_ratio`         error relative to the best plan with one type per layer and projection
    """

    columns: Ints
    gap: float | None = None
    others: Ints | None = None
    bits: Ints | None = None
    layer_ratio: float | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """What a strategy has to decide: `problem` within `budget`; with `others`, those matrices, too.

    `file_bytes` measures a file, whose other tensors have the types `fixed`. `seed` is for what is random.
    """

    calibration: Calibration
    budget: Budget
    problem: Problem
    fixed: FixedTypes
    file_bytes: FileBytes | None
    others: Others | None
    seed: int

    @cached_property
    def limit(self) -> Limit:
        """The budget in real bytes. Raises BudgetError for a size when nothing measures the file."""
        problem, budget = self.problem, self.budget
        if budget.bpw is not None:

            def in_bpw(size: int) -> str:
                return f"{8 * size / problem.n_weight:.4f} bpw"

            return Limit(bytes_for_bpw(problem, budget.bpw), problem.expert_bytes, 0, "bpw budget", in_bpw)
        if self.file_bytes is None or budget.size_bytes is None:
            raise BudgetError("a size budget needs file_bytes, the function that gives the size of the file")
        of_file, fixed = self.file_bytes, self.fixed

        def measure(columns: Ints) -> int:
            return of_file(problem.experts(columns), fixed)

        # One group more or less changes its header and padding; the map of the layer's experts may come or
        # go, too.
        wobble = 1024 + 8 * problem.n_expert
        return Limit(budget.size_bytes, measure, wobble, "file size", _in_bytes)

    def solve(self, items: Items) -> Choice:
        """The least error within the limit, for these items and, if there are others, those matrices."""
        if self.others is None:
            return Choice(*solve_program(items, self.limit))
        assert self.file_bytes is not None  # self.limit raised
        limit = limit_with_others(self.limit, self.problem, self.others, self.fixed, self.file_bytes)
        flat, gap = solve_program(add_others(items, self.others), limit)
        columns, others = split_assignment(self.problem, self.others, flat)
        return Choice(columns, gap, others)

    def error(self, choice: Choice) -> float:
        """What the program minimised, of this choice."""
        if self.others is None or choice.others is None:
            return self.problem.total_error(choice.columns)
        return total_error(self.problem, self.others, choice.columns, choice.others)


def _in_bytes(size: int) -> str:
    return f"{size} bytes ({format_size(size)})"


@dataclass(frozen=True)
class Strategy:
    """One way to decide a Task.

    `meaning`             one line for whoever chooses a strategy
    `objective`           its own objective (a name in OBJECTIVES); None: the user chooses
    `types`               its own candidates; empty: the user chooses among those that were measured
    `takes_others`        it can decide other matrices in the same program
    `takes_nominal_bits`  it knows nominal bits, so that a budget may be bits_per_layer
    `mixes`               experts of one stack may have different types
    """

    name: str
    decide: Callable[[Task], Choice]
    meaning: str
    objective: str | None = None
    types: tuple[str, ...] = ()
    takes_others: bool = False
    takes_nominal_bits: bool = False
    mixes: bool = True


def pmq(task: Task) -> Choice:
    """One program over every expert's projection in the whole model; also says what going per expert is
    worth.
    """
    found = per_expert(task)
    best = task.error(per_layer(task))
    return replace(found, layer_ratio=task.error(found) / best if best > 0 else None)


def per_expert(task: Task) -> Choice:
    """One program over every expert's projection: pmq and the baselines."""
    return task.solve(expert_items(task.problem))


def per_layer(task: Task) -> Choice:
    """One program over every (layer, projection), as a plain GGUF has types."""
    return task.solve(layer_items(task.problem))


def mc(task: Task) -> Choice:
    """The published strategy (published.py); in a budget of real bytes, the most nominal bits per layer
    that fit.
    """
    cost = published.published_cost(task.calibration)
    if task.budget.bits_per_layer is not None:
        bits = published.solve_layers(cost, task.budget.bits_per_layer)
    else:
        bits = _most_nominal_bits(task, cost)
    return Choice(_nominal_columns(task.problem, bits), 0.0, bits=bits)


def _most_nominal_bits(task: Task, cost: Floats) -> Ints:
    """Bits [L, E] of the largest sum per layer whose types fit the limit."""
    problem, limit = task.problem, task.limit
    low, high = (published.solve_layers(cost, n) for n in published.bits_range(cost.shape[1]))
    check_feasible(limit, _nominal_columns(problem, low), _nominal_columns(problem, high))
    for bits in published.solve_all(cost):
        columns = _nominal_columns(problem, bits)
        # Adding up the experts' bytes is quicker than laying out a file.
        if problem.expert_bytes(columns) <= limit.limit and limit.room(columns) >= 0:
            break
    return bits


def _nominal_columns(problem: Problem, bits: Ints) -> Ints:
    """Columns [L, E, P] of the types that stand for nominal bits [L, E]; a projection's fallback where it
    has one.
    """
    columns = np.repeat(bits[..., None] - 1, problem.size.shape[1], axis=-1)
    for layer, p in np.argwhere(problem.size[:, :, 0] == 0):
        columns[layer, :, p] = int(problem.size[layer, p].argmax())
    return columns


def uniform(task: Task) -> Choice:
    """One type for all experts: the largest that fits, and at equal size the one with less error.

    A projection whose rows do not fit the type keeps the smallest type that it can have.
    """
    problem, limit = task.problem, task.limit
    usable = np.isfinite(problem.error[:, 0])  # [L, P, T]
    own = expert_items(problem).knapsack.smallest().reshape(problem.error.shape[:3])
    options = []
    for t in range(usable.shape[-1]):
        if usable[..., t].any():
            columns = np.where(usable[:, None, :, t], t, own)
            options.append((problem.expert_bytes(columns), -problem.total_error(columns), columns))
    options.sort(key=lambda option: option[:2])
    check_feasible(limit, options[0][2], options[-1][2], OTHER_RANGES)
    return Choice(next(columns for _, _, columns in reversed(options) if limit.room(columns) >= 0))


def random(task: Task) -> Choice:
    """pmq's types, per projection, shuffled among the experts of the whole model that can have them."""
    rng = np.random.default_rng(task.seed)
    columns = per_expert(task).columns.copy()
    for p, layers in alike(task.problem):
        own = columns[layers, :, p]
        columns[layers, :, p] = rng.permutation(own.reshape(-1)).reshape(own.shape)
    return _made_to_fit(task, columns)


def inverted(task: Task) -> Choice:
    """pmq's types, per projection, the smallest for the experts that would gain most from the largest."""
    problem, columns = task.problem, per_expert(task).columns.copy()
    gain = _largest_gain(problem)
    for p, layers in alike(problem):
        own = columns[layers, :, p].reshape(-1)
        by_size = own[np.argsort(problem.size[layers, p].sum(axis=0)[own], kind="stable")]
        own[np.argsort(-gain[layers, :, p].reshape(-1), kind="stable")] = by_size
        columns[layers, :, p] = own.reshape(len(layers), -1)
    return _made_to_fit(task, columns)


def _largest_gain(problem: Problem) -> Floats:
    """Error [L, E, P] that the largest type saves compared with the smallest."""
    knapsack = expert_items(problem).knapsack
    rows = np.arange(len(knapsack.error))
    saved = knapsack.error[rows, knapsack.smallest()] - knapsack.error[rows, knapsack.largest()]
    return saved.reshape(problem.error.shape[:-1])


def _made_to_fit(task: Task, columns: Ints) -> Choice:
    """Rearranged types may need more groups per layer, so larger headers, than the program's own choice."""
    items = expert_items(task.problem)
    return Choice(items.columns(shrink(items, task.limit, columns.reshape(-1))))


_ALL = (
    Strategy("pmq", pmq, "one program over the whole model", takes_others=True),
    Strategy(
        "mc",
        mc,
        "as published (Mixture Compressor), layer by layer",
        objective="published",
        types=NOMINAL_TYPES,
        takes_nominal_bits=True,
    ),
    Strategy("uniform", uniform, "one type for all experts", mixes=False),
    Strategy(
        "layer",
        per_layer,
        "one type per layer and projection, for stock llama.cpp",
        takes_others=True,
        mixes=False,
    ),
    Strategy("random", random, "control: pmq's types, shuffled among the experts"),
    Strategy("inverted", inverted, "control: pmq's types, given to the wrong experts"),
    # Published baselines solve pmq's program, but minimise what their authors measured (objectives.py).
    Strategy("bsp", per_expert, "published baseline: block score (QuantMoE-Bench)", "bsp"),
    Strategy("frequency", per_expert, "published baseline: how often an expert is used", "frequency"),
    Strategy(
        "routing-weight", per_expert, "published baseline: an expert's routing weight", "routing-weight"
    ),
    Strategy("f-norm", per_expert, "published baseline: change of the block's output", "f-norm"),
    Strategy("hessian", per_expert, "published baseline: trace of the Hessian (HAWQ-V2)", "hessian"),
)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}
