"""Strategy mc: against the published allocations, and against all combinations."""

from __future__ import annotations

import itertools
import json
from functools import partial

import numpy as np
import pytest

from mc_gguf.artifacts import PROJECTIONS, Calibration
from mc_gguf.common.errors import ArtifactError, BudgetError
from mc_gguf.container import file_bytes
from mc_gguf.plan import Budget, published
from mc_gguf.plan import plan as make_plan
from tests.support import ROOT
from tests.support.synthetic_calibration import calibration

DATA = ROOT / "tests" / "data" / "mixtral-8x7b"


@pytest.fixture(scope="module")
def statistics() -> Calibration:
    return Calibration.load(DATA / "calibration.json")


@pytest.mark.parametrize("n_bit", [12, 16, 20])
def test_every_published_allocation_comes_out(statistics: Calibration, n_bit: int) -> None:
    expected = json.loads((DATA / f"allocation-{n_bit}.json").read_text())["bits"]
    plan = make_plan(statistics, Budget(bits_per_layer=n_bit), "mc")
    assert plan.bits is not None
    assert [list(row) for row in plan.bits] == expected


def all_combinations(n_expert: int, budget: int) -> np.ndarray:
    bits = np.array(list(itertools.product((1, 2, 3), repeat=n_expert)))
    fits = (bits.sum(axis=1) <= budget) & (bits == 3).any(axis=1) & (bits == 2).any(axis=1)
    return np.asarray(bits[fits])


@pytest.mark.parametrize("budget", range(11, 25))
def test_optimal_in_every_layer_at_every_budget(statistics: Calibration, budget: int) -> None:
    cost = published.published_cost(statistics)
    options = all_combinations(8, budget)
    totals = np.stack([layer[np.arange(8), options - 1].sum(axis=1) for layer in cost])
    assert np.array_equal(published.solve_layers(cost, budget), options[totals.argmin(axis=1)])


def test_bits_that_cost_more_are_not_spent() -> None:
    cost = np.ones((1, 4, 3)) * np.array([1.0, 2.0, 3.0])
    assert published.solve_layers(cost, 12).sum() == 7


def test_all_budgets_of_one_table_are_those_solved_alone(statistics: Calibration) -> None:
    cost = published.published_cost(statistics)
    for budget, bits in zip(range(23, 10, -1), published.solve_all(cost), strict=True):
        assert np.array_equal(bits, published.solve_layers(cost, budget))


def test_a_layer_of_256_experts() -> None:
    cost = np.random.default_rng(0).lognormal(size=(2, 256, 3)) * np.array([4.0, 2.0, 1.0])
    bits = published.solve_layers(cost, 500)
    assert (bits.sum(axis=1) == 500).all()


@pytest.mark.parametrize("budget", [5, 10, 25, 100])
def test_infeasible_bits_say_the_range(statistics: Calibration, budget: int) -> None:
    with pytest.raises(BudgetError, match=rf"{budget} bits per layer of 8 experts .* 11 to 23"):
        make_plan(statistics, Budget(bits_per_layer=budget), "mc")


def test_a_single_expert_is_refused() -> None:
    with pytest.raises(BudgetError, match="at least 2 experts"):
        published.solve_layers(np.ones((1, 1, 3)), 3)


def test_a_plan_from_published_statistics_has_types_and_no_sizes(statistics: Calibration) -> None:
    plan = make_plan(statistics, Budget(bits_per_layer=16), "mc")
    assert plan.bits is not None
    types = {1: "IQ1_S", 2: "IQ2_XXS", 3: "IQ3_XXS"}
    for projection in PROJECTIONS:
        assert plan.experts[projection] == tuple(tuple(types[b] for b in row) for row in plan.bits)
    rates = {1: 1.5625, 2: 2.0625, 3: 3.0625}
    assert plan.expert_bpw == pytest.approx(np.mean([rates[b] for row in plan.bits for b in row]))
    assert (plan.file_bytes, plan.expert_bytes, plan.predicted_error) == (None, None, None)
    assert plan.calibration_fingerprint == statistics.fingerprint


@pytest.mark.parametrize("budget", [Budget(bpw=2.0), Budget(bpw=16.0), Budget(size_bytes=10**10)])
@pytest.mark.parametrize("strategy", ["pmq", "mc", "uniform"])
def test_published_statistics_can_do_no_more(statistics: Calibration, budget: Budget, strategy: str) -> None:
    with pytest.raises(BudgetError, match="use strategy mc with bits_per_layer"):
        make_plan(statistics, budget, strategy)


def test_a_measured_model_gets_sizes_and_a_prediction() -> None:
    source = calibration()
    assert source.model is not None
    size = partial(file_bytes, source.model)
    plan = make_plan(source, Budget(bits_per_layer=16), "mc", file_bytes=size)
    assert plan.file_bytes == size(plan.experts, plan.fixed)
    assert plan.predicted_error is not None
    assert 0 < plan.predicted_error < 1


def test_without_measured_errors_there_is_no_prediction() -> None:
    source = calibration(types=("IQ2_XXS", "Q4_K"))
    assert make_plan(source, Budget(bits_per_layer=16), "mc").predicted_error is None


@pytest.mark.parametrize("bpw", [1.9, 2.2, 2.7])
def test_the_most_bits_that_fit_a_real_budget(bpw: float) -> None:
    source = calibration()
    plan = make_plan(source, Budget(bpw=bpw), "mc")
    assert plan.bits is not None
    n_bit = sum(plan.bits[0])
    assert plan.expert_bpw <= bpw
    assert make_plan(source, Budget(bits_per_layer=n_bit), "mc").experts == plan.experts
    assert make_plan(source, Budget(bits_per_layer=n_bit + 1), "mc").expert_bpw > bpw


def test_the_most_bits_that_fit_a_file() -> None:
    source = calibration()
    assert source.model is not None
    size = partial(file_bytes, source.model)
    exact = make_plan(source, Budget(bits_per_layer=15), "mc", file_bytes=size)
    assert exact.file_bytes is not None
    fits = make_plan(source, Budget(size_bytes=exact.file_bytes), "mc", file_bytes=size)
    less = make_plan(source, Budget(size_bytes=exact.file_bytes - 1), "mc", file_bytes=size)
    assert fits.experts == exact.experts
    assert less.bits is not None
    assert {sum(row) for row in less.bits} == {14}


def test_infeasible_real_budgets_say_the_range() -> None:
    with pytest.raises(BudgetError, match=r"1\.6000 bpw is not feasible: .* 1\.8125 bpw to 2\.9375 bpw"):
        make_plan(calibration(), Budget(bpw=1.6), "mc")


@pytest.mark.parametrize("errors", [None, np.full((6, 8, 3), np.nan)])
def test_missing_nominal_errors_say_how_to_get_them(errors: np.ndarray | None) -> None:
    with pytest.raises(ArtifactError, match="calibrate again with IQ1_S, IQ2_XXS, IQ3_XXS"):
        make_plan(calibration().with_statistics(nominal_error=errors), Budget(bits_per_layer=16), "mc")


def test_rows_that_fit_no_nominal_type_get_a_fallback() -> None:
    plan = make_plan(calibration(n_ff=288), Budget(bits_per_layer=16), "mc")
    assert {name for row in plan.experts["down"] for name in row} == {"IQ4_NL"}
    assert {name for row in plan.experts["gate"] for name in row} == {"IQ1_S", "IQ2_XXS", "IQ3_XXS"}
