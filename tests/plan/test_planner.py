"""plan(): budgets are met exactly, and no better assignment is left."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_gguf.artifacts import PROJECTIONS, Calibration, FixedTypes, Plan
from mc_gguf.common.errors import ArtifactError, BudgetError, McError
from mc_gguf.container import file_bytes
from mc_gguf.ggml.types import CANDIDATES, MAX_GROUPS, TYPES
from mc_gguf.plan import STRATEGIES, Budget, Experts, FileBytes, fixed_types
from mc_gguf.plan import plan as any_plan
from mc_gguf.plan.problem import build_problem, candidate_types, limited
from mc_gguf.refine.budget import scope_of
from tests.support.synthetic_calibration import K_QUANTS, MERGED, NO_GATE, calibration, model_info

OPTIMISED = ("pmq", "layer")
BUDGETED = ("pmq", "uniform", "layer", "random", "inverted", "frequency", "hessian")


def make_plan(source: Calibration, budget: Budget, strategy: str = "pmq", **options: Any) -> Plan:
    """plan(), minimising the block error unless the strategy has its own objective."""
    if STRATEGIES[strategy].objective is None:
        options.setdefault("objective", "block")
    return any_plan(source, budget, strategy, **options)


def measure(source: Calibration) -> FileBytes:
    assert source.model is not None
    return partial(file_bytes, source.model)


def size_of(source: Calibration, experts: Experts, fixed: FixedTypes = FixedTypes()) -> int:
    return measure(source)(experts, fixed)


def expert_bytes(source: Calibration, experts: Experts) -> int:
    assert source.model is not None
    total = 0
    for projection, table in experts.items():
        for layer, row in enumerate(table):
            rows, cols = source.model.expert_shape(projection, layer)
            total += sum(rows * TYPES[name].row_bytes(cols) for name in row)
    return total


def error_of(source: Calibration, experts: Experts) -> float:
    """Sum of squared errors of an assignment, one expert at a time."""
    return sum(
        float(source.sq_error[i, e, p, source.types.index(name)])
        for p, table in enumerate(experts.values())
        for i, row in enumerate(table)
        for e, name in enumerate(row)
    )


def counts(plan: Plan, projection: str) -> Counter[str]:
    return Counter(name for row in plan.experts[projection] for name in row)


def changed(experts: Experts, projection: str, layer: int, expert: int | None, name: str) -> Experts:
    """One expert's (None: all the layer's experts') type of one projection replaced."""
    table = [list(row) for row in experts[projection]]
    for e in range(len(table[layer])) if expert is None else [expert]:
        table[layer][e] = name
    return {**experts, projection: table}


# --- the optimum


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_optimal_among_all_assignments_of_four_experts(seed: int, tightness: float) -> None:
    types = ("IQ1_S", "IQ2_XS", "Q4_K")
    source = calibration(1, 4, 256, 512, types, seed)
    bpw = 1.5625 + tightness * (4.5 - 1.5625)
    plan = make_plan(source, Budget(bpw=bpw))

    error, size = np.zeros(1), np.zeros(1)
    for e, p in itertools.product(range(4), range(3)):
        sizes = np.array([2 * TYPES[t].block_bytes for t in types])
        error = (error[:, None] + source.sq_error[0, e, p]).ravel()
        size = (size[:, None] + sizes).ravel()
    best = error[size * 8 <= bpw * 512 * 4 * 3].min()
    assert error_of(source, plan.experts) == pytest.approx(best, rel=1e-7)
    assert plan.expert_bpw <= bpw
    assert plan.predicted_error == pytest.approx(best / source.output_sq.sum(), rel=1e-7)
    assert plan.optimality_gap is not None
    assert plan.optimality_gap < 1e-6


def test_the_whole_model_is_one_program() -> None:
    """A layer that matters a thousand times as much gets the bits of the others."""
    source = calibration(n_layer=4)
    error = source.sq_error.copy()
    error[2] *= 1e3
    plan = make_plan(source.with_statistics(sq_error=error), Budget(bpw=2.3))
    rates = [np.mean([TYPES[n].bpw for p in PROJECTIONS for n in plan.experts[p][i]]) for i in range(4)]
    assert rates[2] > 4
    assert max(rates[i] for i in (0, 1, 3)) < 2


def test_a_larger_type_with_more_error_is_never_chosen() -> None:
    source = calibration()
    error = source.sq_error.copy()
    error[..., source.types.index("Q2_K")] = error[..., source.types.index("IQ2_S")] * 1.1
    for bpw in (2.0, 2.6, 3.0):
        plan = make_plan(source.with_statistics(sq_error=error), Budget(bpw=bpw))
        assert all("Q2_K" not in counts(plan, p) for p in PROJECTIONS)


def test_an_expert_without_tokens_gets_the_smallest_type() -> None:
    source = calibration()
    error = source.sq_error.copy()
    error[3, 5] = 0.0
    plan = make_plan(source.with_statistics(sq_error=error), Budget(bpw=3.0))
    assert {plan.type_of(3, 5, p) for p in PROJECTIONS} == {"IQ1_S"}


def test_an_error_estimated_below_zero_counts_as_none() -> None:
    source = calibration()
    error = source.sq_error.copy()
    error[3, 5, :, 0] = -1e9
    plan = make_plan(source.with_statistics(sq_error=error), Budget(bpw=3.0))
    assert plan.predicted_error is not None
    assert plan.predicted_error > 0


# --- budgets


@pytest.mark.parametrize("bpw", [1.5625, 1.8, 2.0625, 2.5, 3.3, 4.5, 5.0, 6.6, 8.0, 8.5])
@pytest.mark.parametrize("strategy", BUDGETED)
def test_bpw_is_never_exceeded(strategy: str, bpw: float) -> None:
    source = calibration()
    plan = make_plan(source, Budget(bpw=bpw), strategy)
    n_weight = 6 * 8 * 3 * 256 * 256
    assert plan.expert_bytes == expert_bytes(source, plan.experts)
    assert plan.expert_bpw == 8 * plan.expert_bytes / n_weight
    assert plan.expert_bpw <= bpw


@pytest.mark.parametrize("bpw", [5.0, 8.0])
@pytest.mark.parametrize("strategy", OPTIMISED)
def test_large_budgets_are_used(strategy: str, bpw: float) -> None:
    """Without naming types: up to 8.5 bits per weight."""
    source = calibration()
    plan = make_plan(source, Budget(bpw=bpw), strategy)
    largest_step = 8.5 - TYPES["Q6_K"].bpw
    n_item = 6 * 3 if strategy == "layer" else 6 * 8 * 3
    assert bpw - largest_step / n_item < plan.expert_bpw <= bpw
    used = {name for p in PROJECTIONS for name in counts(plan, p)}
    assert used & {"Q5_K", "Q6_K", "Q8_0"}
    less = make_plan(source, Budget(bpw=bpw - 1), strategy)
    assert plan.predicted_error is not None
    assert less.predicted_error is not None
    assert plan.predicted_error < 0.7 * less.predicted_error


@pytest.mark.parametrize("offset", [0, 1, 13, 4_000, 100_003, 987_654])
@pytest.mark.parametrize("strategy", BUDGETED)
def test_a_file_size_is_never_exceeded(strategy: str, offset: int) -> None:
    source = calibration()
    limit = size_of(source, make_plan(source, Budget(bpw=2.0625), "uniform").experts) + offset
    plan = make_plan(source, Budget(size_bytes=limit), strategy, file_bytes=measure(source))
    assert plan.file_bytes == size_of(source, plan.experts)
    assert plan.file_bytes <= limit


@pytest.mark.parametrize("strategy", OPTIMISED)
@pytest.mark.parametrize("budget", ["bpw", "size"])
def test_no_single_step_that_saves_error_is_left(strategy: str, budget: str) -> None:
    source = calibration()
    size = partial(size_of if budget == "size" else expert_bytes, source)
    if budget == "size":
        limit = 5_800_123
        plan = make_plan(source, Budget(size_bytes=limit), strategy, file_bytes=measure(source))
    else:
        limit = int(2.47 * 6 * 8 * 3 * 256 * 256 / 8)
        plan = make_plan(source, Budget(bpw=2.47), strategy)
    error = error_of(source, plan.experts)
    n_step = 0
    experts = [None] if strategy == "layer" else range(8)
    for p, i, e, name in itertools.product(PROJECTIONS, range(6), experts, source.types):
        other = changed(plan.experts, p, i, e, name)
        if error_of(source, other) < error * (1 - 1e-12):
            n_step += 1
            assert size(other) > limit, (p, i, e, name)
    assert n_step > 100 if strategy == "pmq" else n_step


@pytest.mark.parametrize("limit", [5_200_000, 5_800_123, 6_543_210, 7_000_001])
def test_a_file_is_filled_to_within_the_smallest_step(limit: int) -> None:
    """The smallest step here: IQ2_S to Q2_K, 256 blocks of 82 and 84 bytes; and a header."""
    source = calibration()
    plan = make_plan(source, Budget(size_bytes=limit), file_bytes=measure(source))
    assert plan.file_bytes is not None
    assert 0 <= limit - plan.file_bytes <= 512 + 256


@pytest.mark.parametrize("limit", [5_200_000, 5_800_123, 6_543_210, 7_000_001])
def test_the_gap_under_a_file_size_is_small(limit: int) -> None:
    """Headers decide as well here: 24 KB in a matrix, 100 bytes for a group's header."""
    plan = make_plan(calibration(), Budget(size_bytes=limit), file_bytes=measure(calibration()))
    assert plan.optimality_gap is not None
    assert plan.optimality_gap < 5e-3


def test_a_mixtral_file_is_filled_to_within_the_smallest_step() -> None:
    source = calibration(32, 8, 4096, 14336)
    limit = 31 << 29  # 15.5 GiB
    plan = make_plan(source, Budget(size_bytes=limit), file_bytes=measure(source))
    assert plan.file_bytes is not None
    assert 0 <= limit - plan.file_bytes <= 2 * 4096 * 14336 // 256
    assert plan.optimality_gap is not None
    assert plan.optimality_gap < 1e-4


@pytest.mark.parametrize("strategy", BUDGETED)
@pytest.mark.parametrize("bpw", [0.5, 1.56, 8.51, 15.9])
def test_an_infeasible_bpw_says_the_range(strategy: str, bpw: float) -> None:
    with pytest.raises(
        BudgetError, match=r"bpw is not feasible: .* 1\.5625 bpw to 8\.5000 bpw; a budget of 16 bpw"
    ):
        make_plan(calibration(), Budget(bpw=bpw), strategy)


@pytest.mark.parametrize("strategy", BUDGETED)
def test_an_infeasible_size_says_the_range_and_its_ends_are_feasible(strategy: str) -> None:
    source = calibration()
    size = measure(source)
    low = size_of(source, make_plan(source, Budget(bpw=1.5625), "uniform").experts)
    high = size_of(source, make_plan(source, Budget(bpw=8.5), "uniform").experts)
    for limit in (low - 1, high + 1):
        message = rf"{limit} bytes .* not feasible: .* {low} bytes .* to {high} bytes"
        with pytest.raises(BudgetError, match=message):
            make_plan(source, Budget(size_bytes=limit), strategy, file_bytes=size)
    assert make_plan(source, Budget(size_bytes=low), strategy, file_bytes=size).file_bytes == low
    most = make_plan(source, Budget(size_bytes=high), strategy, file_bytes=size).file_bytes
    assert most is not None
    assert 0.99 * high < most <= high


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"bpw": 2.0, "size_bytes": 10},
        {"bpw": 2.0, "bits_per_layer": 16},
        {"size_bytes": 1, "bits_per_layer": 1},
    ],
)
def test_exactly_one_budget(limits: dict[str, int]) -> None:
    with pytest.raises(BudgetError, match="exactly one of bpw, size and bits_per_layer"):
        Budget(**limits)


@pytest.mark.parametrize("bpw", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(bpw: float) -> None:
    with pytest.raises(BudgetError, match="bpw must be a positive number"):
        Budget(bpw=bpw)


def test_a_size_needs_the_function_that_measures() -> None:
    with pytest.raises(BudgetError, match="needs file_bytes"):
        make_plan(calibration(), Budget(size_bytes=6_000_000))


# --- 16 bits


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_sixteen_bits_is_the_plain_file_in_the_source_type(strategy: str, type_name: str) -> None:
    source = calibration(type_name=type_name)
    budget = Budget(bpw=16.0)
    fixed = fixed_types(source.model, budget, FixedTypes())
    plan = make_plan(source, budget, strategy, file_bytes=measure(source))
    assert {name for p in PROJECTIONS for name in counts(plan, p)} == {type_name}
    assert plan.fixed == fixed == FixedTypes(type_name, type_name, type_name, type_name)
    assert plan.expert_bpw == 16
    assert plan.expert_bytes == 2 * 6 * 8 * 3 * 256 * 256
    assert plan.file_bytes == size_of(source, plan.experts, fixed)
    assert plan.predicted_error == 0


def test_sixteen_bits_of_a_32_bit_source_is_bf16() -> None:
    plan = make_plan(calibration(type_name="F32"), Budget(bpw=20.0))
    assert set(counts(plan, "up")) == {"BF16"}


def test_a_fixed_type_that_was_asked_for_stays() -> None:
    fixed = fixed_types(model_info(), Budget(bpw=16), FixedTypes(attn="Q8_0"))
    assert fixed == FixedTypes(attn="Q8_0", attn_kv="BF16", token_embd="BF16", output="BF16")


# --- types


def test_only_the_types_asked_for_are_used() -> None:
    plan = make_plan(calibration(), Budget(bpw=2.5), types=["q4_k", "IQ2_XXS", "IQ2_XXS"])
    assert plan.types == ("IQ2_XXS", "Q4_K")
    assert {name for p in PROJECTIONS for name in counts(plan, p)} <= {"IQ2_XXS", "Q4_K"}


def test_bad_types_say_the_known_ones() -> None:
    source = calibration(types=("IQ2_XXS", "Q4_K"))
    with pytest.raises(McError, match=r"unknown ggml type 'Q9'; known: IQ1_S"):
        make_plan(source, Budget(bpw=2.5), types=["Q9"])
    with pytest.raises(McError, match=r"no errors of Q3_K .* measured IQ2_XXS, Q4_K"):
        make_plan(source, Budget(bpw=2.5), types=["Q3_K", "Q4_K"])
    with pytest.raises(McError, match="no types to choose from"):
        make_plan(source, Budget(bpw=2.5), types=[])
    with pytest.raises(McError, match="strategy mc has its own types"):
        make_plan(source, Budget(bits_per_layer=16), "mc", types=["Q4_K"])
    with pytest.raises(McError, match="unknown ggml type 'Q9'"):
        make_plan(source, Budget(bpw=2.5), fixed=FixedTypes(attn="Q9"))


# --- more types than a file can hold


def grouped(plan: Plan) -> int:
    """The most types that a stack has."""
    return max(len(set(row)) for table in plan.experts.values() for row in table)


def many_types(n_layer: int = 2, n_expert: int = 64, **options: Any) -> Calibration:
    """Every type is some expert's best: one for each slope."""
    source = calibration(n_layer, n_expert, types=(*CANDIDATES, "IQ4_NL", "Q5_0"), **options)
    error = source.sq_error * np.logspace(-3, 3, n_expert)[:, None, None]
    return source.with_statistics(sq_error=error, relative_error=error)


@pytest.mark.parametrize("strategy", ["pmq", "random", "inverted", "frequency"])
@pytest.mark.parametrize("bpw", [2.2, 3.4, 4.5])
def test_a_stack_has_at_most_as_many_types_as_a_file_holds(strategy: str, bpw: float) -> None:
    source = many_types()
    assert len(source.types) > MAX_GROUPS
    plan = make_plan(source, Budget(bpw=bpw), strategy)
    assert len(plan.types) == len(source.types)
    assert grouped(plan) <= MAX_GROUPS
    assert plan.expert_bytes == expert_bytes(source, plan.experts)
    assert plan.expert_bpw <= bpw
    size_of(source, plan.experts)  # the file can be laid out


def test_all_but_the_worst_types_stay() -> None:
    source = many_types()
    used = {
        name for table in make_plan(source, Budget(bpw=3.4)).experts.values() for r in table for name in r
    }
    assert len(used) > 8


def test_what_goes_first_is_farthest_above_the_hull() -> None:
    """Errors on a convex curve, but for some types that lie above it, two of them only a little."""
    source = calibration(3, 4, types=(*CANDIDATES, "IQ4_NL", "Q5_0"))
    bpw = np.array([TYPES[name].bpw for name in source.types])
    convex = np.broadcast_to(np.exp(-bpw), source.sq_error.shape).copy()
    above = {"IQ2_XS": 1.5, "Q3_K": 1.2, "Q5_K": 1.9, "IQ2_S": 1.02, "Q6_K": 1.02}
    for name, factor in above.items():
        convex[..., source.types.index(name)] *= factor
    source = source.with_statistics(sq_error=convex)
    problem = build_problem(source, candidate_types(source, None))
    left = limited(problem)
    gone = {name for t, name in enumerate(problem.types) if not left.size[..., t].any()}
    assert len(source.types) - MAX_GROUPS == 3
    assert gone == {"IQ2_XS", "Q3_K", "Q5_K"}
    for t, name in enumerate(problem.types):
        assert np.isinf(left.error[..., t]).all() == (name in gone)
        if name not in gone:
            assert (left.size[..., t] == problem.size[..., t]).all()


def test_the_smallest_and_the_largest_type_stay() -> None:
    source = many_types()
    error = source.sq_error.copy()
    for name in ("IQ1_S", "Q8_0"):
        error[..., source.types.index(name)] *= 100
    source = source.with_statistics(sq_error=error)
    problem = build_problem(source, candidate_types(source, None))
    left = limited(problem)
    assert (left.size.min(axis=-1, initial=1 << 40, where=left.size > 0) == problem.size.min(axis=-1)).all()
    assert (left.size.max(axis=-1) == problem.size.max(axis=-1)).all()


def test_types_in_use_stay() -> None:
    source = many_types()
    problem = build_problem(source, candidate_types(source, None))
    gone = np.flatnonzero(~limited(problem).size.any(axis=(0, 1)))
    columns = np.zeros(problem.error.shape[:3], dtype=np.int64)
    columns[0, : len(gone), 1] = gone
    left = limited(problem, columns)
    assert left.size[:, 1][:, gone].all()
    assert left.expert_bytes(columns) == problem.expert_bytes(columns)
    assert ((left.size > 0).sum(axis=-1) == MAX_GROUPS).all()


@pytest.mark.parametrize(("strategy", "types"), [("pmq", None), ("uniform", None), ("uniform", ["Q2_K"])])
def test_refinement_counts_the_bytes_of_such_plans(strategy: str, types: list[str] | None) -> None:
    """It chooses among no more types than a file holds, those of the plan among them."""
    source = many_types()
    plan = make_plan(source, Budget(bpw=2.625), strategy, types=types)
    if types is not None:
        plan = replace(plan, types=source.types)
    scope, columns = scope_of(plan, source)
    assert scope.problem.experts(columns) == plan.experts
    assert scope.problem.expert_bytes(columns) == plan.expert_bytes
    assert scope.fits(columns)
    assert (scope.problem.size > 0).sum(axis=-1).max() == MAX_GROUPS


def test_few_types_are_left_alone() -> None:
    source = calibration(types=CANDIDATES[:MAX_GROUPS])
    problem = build_problem(source, source.types)
    left = limited(problem)
    assert (left.size == problem.size).all()
    assert (left.error == problem.error).all()


def test_strategies_with_one_type_for_a_stack_have_all_types() -> None:
    source = many_types()
    problem = build_problem(source, candidate_types(source, None))
    for t in np.flatnonzero(~limited(problem).size.any(axis=(0, 1))):
        name = problem.types[t]
        plan = make_plan(source, Budget(bpw=TYPES[name].bpw), "uniform", types=[*source.types])
        assert counts(plan, "up").keys() <= {n for n in source.types if TYPES[n].bpw == TYPES[name].bpw}


def test_a_layer_that_fits_few_types_keeps_them() -> None:
    """Rows of 288 weights fit IQ4_NL, Q5_0 and Q8_0 alone, which the wider layer can spare."""
    source = many_types(2, 16, n_ff=(256, 288))
    for strategy in ("pmq", "random", "inverted"):
        plan = make_plan(source, Budget(bpw=5.0), strategy)
        assert grouped(plan) <= MAX_GROUPS
        assert set(plan.experts["down"][1]) <= {"IQ4_NL", "Q5_0", "Q8_0"}
        assert len(set(plan.experts["down"][1])) > 1
        assert plan.expert_bytes == expert_bytes(source, plan.experts)
        assert plan.expert_bpw <= 5.0


# --- experts of other kinds


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
@pytest.mark.parametrize("strategy", [*BUDGETED, "mc"])
def test_experts_with_other_matrices(strategy: str, projections: tuple[str, ...]) -> None:
    source = calibration(n_ff=512, projections=projections)
    n_weight = 6 * 8 * 256 * 512 * (3 if projections == MERGED else 2)
    plan = make_plan(source, Budget(bpw=2.4), strategy, file_bytes=measure(source))
    assert tuple(plan.experts) == projections
    assert plan.expert_bytes == expert_bytes(source, plan.experts)
    assert plan.expert_bpw == 8 * plan.expert_bytes / n_weight <= 2.4
    assert plan.file_bytes == size_of(source, plan.experts)
    size = plan.file_bytes + 100_000
    within = make_plan(source, Budget(size_bytes=size), strategy, file_bytes=measure(source))
    assert within.file_bytes is not None
    assert within.file_bytes <= size


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
def test_the_optimum_of_experts_with_other_matrices(projections: tuple[str, ...]) -> None:
    types = ("IQ1_S", "IQ2_XS", "Q4_K")
    source = calibration(1, 4, 256, 256, types, projections=projections)
    plan = make_plan(source, Budget(bpw=2.6))
    limit = 2.6 / 8 * (4 * 256 * 256 * (3 if projections == MERGED else 2))
    error, size = np.zeros(1), np.zeros(1)
    for e, p in itertools.product(range(4), range(2)):
        rows = 512 if projections[p] == "gate_up" else 256
        error = (error[:, None] + source.sq_error[0, e, p]).ravel()
        size = (size[:, None] + np.array([rows * TYPES[t].block_bytes for t in types])).ravel()
    assert error_of(source, plan.experts) == pytest.approx(error[size <= limit].min(), rel=1e-7)


@pytest.mark.parametrize("strategy", [*BUDGETED, "mc"])
def test_layers_of_different_widths(strategy: str) -> None:
    widths = (256, 768, 512, 256)
    source = calibration(4, 8, n_ff=widths)
    plan = make_plan(source, Budget(bpw=2.4), strategy, file_bytes=measure(source))
    assert plan.expert_bytes == expert_bytes(source, plan.experts)
    assert plan.expert_bpw == 8 * plan.expert_bytes / (8 * 256 * 3 * sum(widths)) <= 2.4
    assert plan.file_bytes == size_of(source, plan.experts)


def test_sixteen_bits_of_layers_of_different_widths() -> None:
    source = calibration(3, 8, n_ff=(256, 300, 512), projections=MERGED)
    plan = make_plan(source, Budget(bpw=16))
    assert plan.expert_bytes == 2 * 8 * 256 * 3 * (256 + 300 + 512)


@pytest.mark.parametrize("bpw", [2.4, 16.0])
def test_layers_that_predict_further_tokens_do_not_count(bpw: float) -> None:
    """Their experts are in the file, but nothing is planned for them."""
    source, more = calibration(3), model_info(4)
    source = replace(source, model=replace(more, n_layer=3))
    plan = make_plan(source, Budget(bpw=bpw), file_bytes=measure(source))
    n_weight = 3 * 8 * 3 * 256 * 256
    assert plan.expert_bytes is not None
    assert plan.expert_bpw == 8 * plan.expert_bytes / n_weight <= bpw
    assert bpw - 0.1 < plan.expert_bpw
    assert plan.file_bytes is not None
    assert plan.file_bytes > size_of(calibration(3), plan.experts, plan.fixed) + 8 * 3 * 256 * 256 * 6 // 8


def test_the_bytes_of_a_wide_layer_count_as_they_are() -> None:
    """The same errors everywhere: bits go to the narrow layer, where they cost least."""
    source = calibration(2, 8, n_ff=(256, 2048), types=("IQ1_S", "IQ2_XXS", "Q4_K"))
    error = np.broadcast_to(source.sq_error[:1, :1, :1], source.sq_error.shape)
    plan = make_plan(source.with_statistics(sq_error=error), Budget(bpw=1.889))
    assert {name for p in PROJECTIONS for name in plan.experts[p][0]} == {"Q4_K"}
    assert {name for p in PROJECTIONS for name in plan.experts[p][1]} == {"IQ1_S"}


# --- fallbacks


@pytest.mark.parametrize(("n_ff", "expected"), [(288, "IQ4_NL"), (300, "BF16")])
@pytest.mark.parametrize("strategy", BUDGETED)
def test_rows_that_fit_no_candidate_get_a_fallback(strategy: str, n_ff: int, expected: str) -> None:
    source = calibration(n_ff=n_ff, types=K_QUANTS)
    plan = make_plan(source, Budget(bpw=7.0 if expected == "BF16" else 3.2), strategy)
    assert set(counts(plan, "down")) == {expected}
    assert not set(counts(plan, "gate")) & {expected}
    assert plan.expert_bytes == expert_bytes(source, plan.experts)


def test_a_layer_that_fits_no_candidate_gets_a_fallback() -> None:
    source = calibration(3, 8, n_ff=(256, 288, 512), types=K_QUANTS)
    plan = make_plan(source, Budget(bpw=3.2))
    assert [set(row) for row in plan.experts["down"]][1] == {"IQ4_NL"}
    assert "IQ4_NL" not in {*plan.experts["down"][0], *plan.experts["down"][2]}
    assert plan.expert_bytes == expert_bytes(source, plan.experts)


def test_types_that_fit_only_some_rows_are_used_there() -> None:
    source = calibration(n_ff=288, types=("IQ2_XXS", "Q4_K", "Q8_0"))
    error = source.sq_error.copy()
    error[:, :, 2, 2] = 1.0
    plan = make_plan(source.with_statistics(sq_error=error, relative_error=error), Budget(bpw=5.0))
    assert set(counts(plan, "down")) == {"Q8_0"}
    uniform = make_plan(
        source.with_statistics(sq_error=error, relative_error=error), Budget(bpw=6.0), "uniform"
    )
    assert [set(counts(uniform, p)) for p in PROJECTIONS] == [{"Q4_K"}, {"Q4_K"}, {"Q8_0"}]


# --- the other strategies


def test_unknown_strategies_say_the_known_ones() -> None:
    with pytest.raises(
        McError, match=r"unknown strategy 'best'; known: pmq \(one program over the whole model\); mc \("
    ):
        any_plan(calibration(), Budget(bpw=2.5), "best")


@pytest.mark.parametrize("strategy", BUDGETED)
def test_nominal_bits_belong_to_mc(strategy: str) -> None:
    with pytest.raises(BudgetError, match="only strategy mc has"):
        make_plan(calibration(), Budget(bits_per_layer=16), strategy)


@pytest.mark.parametrize(
    ("bpw", "expected"), [(1.5625, "IQ1_S"), (2.3, "IQ2_XXS"), (2.63, "Q2_K"), (4.4, "IQ4_XS")]
)
def test_uniform_is_the_largest_type_that_fits(bpw: float, expected: str) -> None:
    plan = make_plan(calibration(), Budget(bpw=bpw), "uniform")
    assert {name for p in PROJECTIONS for name in counts(plan, p)} == {expected}
    assert plan.optimality_gap is None


@pytest.mark.parametrize("better", ["IQ3_S", "Q3_K"])
def test_uniform_takes_the_better_of_two_types_of_one_size(better: str) -> None:
    source = calibration()
    error = source.sq_error.copy()
    error[..., source.types.index(better)] *= 0.5
    plan = make_plan(source.with_statistics(sq_error=error), Budget(bpw=3.5), "uniform")
    assert set(counts(plan, "gate")) == {better}


def test_layer_has_one_type_per_layer_and_projection() -> None:
    source = calibration()
    plan = make_plan(source, Budget(bpw=2.5), "layer")
    assert all(len(set(row)) == 1 for p in PROJECTIONS for row in plan.experts[p])
    assert len({row[0] for p in PROJECTIONS for row in plan.experts[p]}) > 1
    uniform = make_plan(source, Budget(bpw=2.5), "uniform")
    pmq = make_plan(source, Budget(bpw=2.5))
    assert plan.predicted_error is not None
    assert pmq.predicted_error is not None
    assert uniform.predicted_error is not None
    assert pmq.predicted_error < plan.predicted_error < uniform.predicted_error


@pytest.mark.parametrize("strategy", ["random", "inverted"])
def test_controls_have_the_same_types_on_other_experts(strategy: str) -> None:
    source = calibration()
    pmq = make_plan(source, Budget(bpw=2.5))
    control = make_plan(source, Budget(bpw=2.5), strategy)
    assert control.expert_bytes == pmq.expert_bytes
    assert [counts(control, p) for p in PROJECTIONS] == [counts(pmq, p) for p in PROJECTIONS]
    assert control.experts != pmq.experts
    assert error_of(source, control.experts) > error_of(source, pmq.experts)


def test_inverted_gives_the_neediest_the_least() -> None:
    source = calibration()
    inverted = make_plan(source, Budget(bpw=2.5), "inverted")
    for p, projection in enumerate(PROJECTIONS):
        need = source.sq_error[:, :, p, 0] - source.sq_error[:, :, p, source.types.index("Q4_K")]
        rates = np.array([[TYPES[name].bpw for name in row] for row in inverted.experts[projection]])
        assert (np.diff(rates.ravel()[np.argsort(-need.ravel())]) >= 0).all()


def test_random_follows_the_seed() -> None:
    source = calibration()
    plans = [make_plan(source, Budget(bpw=2.5), "random", seed=seed) for seed in (0, 0, 1)]
    assert plans[0].experts == plans[1].experts != plans[2].experts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_plan_every_time(strategy: str) -> None:
    one, two = (make_plan(calibration(), Budget(bpw=2.5), strategy, seed=3).to_text() for _ in range(2))
    assert one == two


# --- what a plan carries


def test_a_plan_carries_its_inputs() -> None:
    source = calibration()
    assert source.model is not None
    fixed = FixedTypes(attn="Q8_0")
    plan = make_plan(source, Budget(bpw=2.5), fixed=fixed, seed=4)
    assert (plan.strategy, plan.budget, plan.seed, plan.fixed) == ("pmq", {"bpw": 2.5}, 4, fixed)
    assert plan.calibration_fingerprint == source.fingerprint
    assert plan.model_fingerprint == source.model.fingerprint
    assert sorted(plan.types) == sorted(source.types)
    assert plan.layers == source.layers
    assert plan.bits is None
    assert plan.file_bytes is None


def test_inconsistent_calibrations_are_refused() -> None:
    source = calibration()
    broken = source.sq_error.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ArtifactError, match="no finite numbers"):
        make_plan(source.with_statistics(sq_error=broken), Budget(bpw=2.5))
    broken[0, 0, 0, 0] = np.inf
    with pytest.raises(ArtifactError, match="infinite"):
        make_plan(source.with_statistics(sq_error=broken), Budget(bpw=2.5))
