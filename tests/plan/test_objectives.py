"""Objectives against sums written out, and the strategies that are made of them."""

from __future__ import annotations

import numpy as np
import pytest

from mc_gguf.artifacts import PROJECTIONS, Calibration
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.ggml.types import TYPES
from mc_gguf.plan import OBJECTIVES, STRATEGIES, Budget, plan, stand_in
from mc_gguf.plan.objectives import type_rates
from mc_gguf.plan.published import EXPONENTS
from tests.support.synthetic_calibration import calibration, model_info
from tools import bench_allocate

SOURCE = calibration()
L, E, P, T = SOURCE.sq_error.shape
BASELINES = [name for name, strategy in STRATEGIES.items() if strategy.objective == name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_one_value_for_every_type(name: str) -> None:
    asked = ("Q4_K", "IQ1_S", "Q4_0")
    error = OBJECTIVES[name](SOURCE, asked)
    assert error.shape == (L, E, P, 3)
    assert np.isfinite(error[..., :2]).all()
    assert np.isnan(error[..., 2]).all()  # not measured
    assert (error[..., 0] < error[..., 1]).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stand_in_has_what_every_objective_needs(name: str) -> None:
    """So that a request can be checked before the model is calibrated."""
    assert plan(stand_in(model_info(), None), Budget(bpw=2.5), objective=name).objective == name


def test_kld_is_the_price_of_a_layer_times_its_error_a_token() -> None:
    price = np.linspace(1, 2, L)
    source = SOURCE.with_statistics(kld_per_error=price)
    n_token = SOURCE.frequency[3].sum() / model_info().n_expert_used
    expected = SOURCE.relative_error[3, 5, 1, 0] / n_token * price[3]
    assert OBJECTIVES["kld"](source, SOURCE.types)[3, 5, 1, 0] == pytest.approx(expected)
    found = plan(source, Budget(bpw=2.5))
    assert found.objective == "kld"
    assert found.predicted_kld == pytest.approx(
        sum(
            OBJECTIVES["kld"](source, [name])[i, e, p, 0]
            for p, projection in enumerate(PROJECTIONS)
            for i, row in enumerate(found.experts[projection])
            for e, name in enumerate(row)
        )
    )


def test_published_is_the_papers_cost_for_each_projection() -> None:
    a, b, g = EXPONENTS
    phi = SOURCE.frequency[2, 4] / SOURCE.frequency[2].sum()
    w = SOURCE.routing_weight[2, 4] / SOURCE.routing_weight[2].sum()
    expected = phi**a * w**b * np.sqrt(SOURCE.sq_error[2, 4, 0, 3]) ** g
    assert OBJECTIVES["published"](SOURCE, SOURCE.types)[2, 4, 0, 3] == pytest.approx(expected)


def test_hessian_is_trace_times_change_of_the_weights() -> None:
    error = OBJECTIVES["hessian"](SOURCE, SOURCE.types)
    doubled = SOURCE.with_statistics(hessian_trace=2 * SOURCE.hessian_trace)
    assert OBJECTIVES["hessian"](doubled, SOURCE.types) == pytest.approx(2 * error)
    ratio = error[1, 2, 0, 0] / error[1, 2, 0, 4]
    assert ratio == pytest.approx(SOURCE.weight_error[1, 2, 0, 0] / SOURCE.weight_error[1, 2, 0, 4])


def test_the_rate_of_a_type_is_the_median_of_the_experts_that_saw_text() -> None:
    frequency = SOURCE.frequency.copy()
    frequency[0] = 0
    rates = type_rates(SOURCE.with_statistics(frequency=frequency), SOURCE.types)
    relative = SOURCE.sq_error[1:] / SOURCE.output_sq[1:, :, None, None]
    assert rates == pytest.approx(np.median(relative, axis=(0, 1)))
    with pytest.raises(ArtifactError, match="no expert of this calibration saw any text"):
        type_rates(SOURCE.with_statistics(frequency=0 * frequency), SOURCE.types)


@pytest.mark.parametrize("name", ["frequency", "routing-weight", "bsp"])
def test_baselines_give_the_bits_to_who_is_important(name: str) -> None:
    found = plan(SOURCE, Budget(bpw=2.5), name)
    assert found.objective == found.strategy == name
    bits = np.array([[[TYPES[n].bpw for n in row] for row in found.experts[p]] for p in PROJECTIONS]).sum(0)
    scores = {
        "frequency": SOURCE.frequency / SOURCE.frequency.sum(1, keepdims=True),
        "routing-weight": SOURCE.routing_weight / SOURCE.routing_weight.sum(1, keepdims=True),
        "bsp": np.broadcast_to(SOURCE.block_score[:, None], (L, E)),
    }
    order = np.argsort(scores[name].ravel(), kind="stable")
    assert np.corrcoef(np.argsort(order), bits.ravel())[0, 1] > 0.7


@pytest.mark.parametrize("strategy", BASELINES)
def test_baselines_spend_the_same_bytes(strategy: str) -> None:
    found = plan(SOURCE, Budget(bpw=2.31), strategy)
    ours = plan(SOURCE, Budget(bpw=2.31))
    assert found.expert_bytes == pytest.approx(ours.expert_bytes, rel=1e-3)
    assert found.predicted_kld is not None
    assert ours.predicted_kld is not None
    assert found.predicted_kld >= ours.predicted_kld


def test_a_layers_plan_is_compared_with() -> None:
    ours = plan(SOURCE, Budget(bpw=2.5), objective="block")
    layers = plan(SOURCE, Budget(bpw=2.5), "layer", objective="block")
    assert ours.layer_ratio is not None
    assert ours.predicted_error is not None
    assert layers.predicted_error is not None
    assert ours.layer_ratio == pytest.approx(ours.predicted_error / layers.predicted_error)
    assert layers.layer_ratio is None


def test_objectives_that_lack_their_data_say_so() -> None:
    old = SOURCE.with_statistics(kld_per_error=None, block_score=None)
    assert plan(old, Budget(bpw=2.5)).objective == "block"
    assert plan(old, Budget(bpw=2.5)).predicted_kld is None
    for name, what in (("kld", "kld_per_error"), ("bsp", "block_score")):
        with pytest.raises(ArtifactError, match=f"{what} is needed, but this calibration did not measure it"):
            OBJECTIVES[name](old, old.types)


def test_objectives_belong_to_strategies_that_have_none() -> None:
    with pytest.raises(McError, match="unknown objective 'best'; known: kld, "):
        plan(SOURCE, Budget(bpw=2.5), objective="best")
    for strategy in ("mc", "frequency"):
        with pytest.raises(McError, match=f"strategy {strategy} has its own objective"):
            plan(SOURCE, Budget(bpw=2.5), strategy, objective="block")


@pytest.mark.parametrize(("n_layer", "gap"), [(1, 1e-9), (58, 1e-3)])
def test_large_programs_are_solved_to_their_gap(n_layer: int, gap: float) -> None:
    found = bench_allocate.measure("test", n_layer, 256, 2.2)
    assert found.n_item == n_layer * 768
    assert found.gap <= gap


def test_made_up_calibrations_are_calibrations() -> None:
    source: Calibration = bench_allocate.made_up(2, 256)
    assert source.sq_error.shape == (2, 256, 3, 10)
    tail = source.output_sq / np.median(source.output_sq)
    assert tail.max() > 10
