"""RoutingProfile and thresholds: known small cases and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mc_gguf.artifacts import Calibration
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.routing import thresholds
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.thresholds import predict_damages, quantiles_for_drop, thresholds_at, tolerant_layers
from tests.support import ROOT
from tests.support.routing_predictions import predicted_damage, predicted_drop
from tests.support.synthetic_calibration import calibration

PUBLISHED = ROOT / "tests" / "data" / "mixtral-8x7b" / "calibration.json"


def small(sensitivity: tuple[float, ...] = (1.0, 2.0), n_rank: int = 2) -> RoutingProfile:
    """Layers 1, 3, ... of twice as many, three quantiles: w_j / w_0 is 0.1, 0.5, 0.9 over the rank."""
    n = len(sensitivity)
    ratios = np.array([0.1, 0.5, 0.9]) / np.arange(1, n_rank)[:, None]
    return RoutingProfile(
        layers=tuple(range(1, 2 * n, 2)),
        n_layer=2 * n,
        ratio_quantiles=np.tile(ratios, (n, 1, 1)),
        sensitivity=np.array(sensitivity),
        curve=np.tile([0.0, 1.0, 4.0], (n, 1)),
    )


def rough(n_layer: int, seed: int = 0) -> RoutingProfile:
    """Curves that are not convex, so that no greedy choice is the best one."""
    rng = np.random.default_rng(seed)
    curve = np.cumsum(rng.exponential(1, (n_layer, 11)) ** 3, axis=1)
    curve -= curve[:, :1]
    curve /= curve[:, 5:6]
    ratios = np.sort(rng.random((n_layer, 1, 11)), axis=-1)
    return RoutingProfile(tuple(range(n_layer)), n_layer, ratios, rng.lognormal(0, 1, n_layer), curve)


# --- RoutingProfile


def test_a_profile_is_what_the_calibration_says() -> None:
    source = calibration(n_layer=3)
    profile = RoutingProfile.of(source)
    assert (profile.layers, profile.n_layer, profile.n_rank) == ((0, 1, 2), 3, 2)
    assert profile.ratio_quantiles is source.ratio_quantiles
    assert profile.sensitivity is source.routing_sensitivity
    assert profile.curve is source.routing_curve


def test_calibrations_without_routing_statistics_are_refused() -> None:
    source = calibration(n_layer=2)
    assert source.model is not None
    for empty in (Calibration.load(PUBLISHED), Calibration.blank(source.model)):
        with pytest.raises(ArtifactError, match="no routing statistics"):
            RoutingProfile.of(empty)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", (1,), "1 layers have the shapes"),
        ("layers", (3, 1), "must ascend"),
        ("layers", (1, 4), "must ascend"),
        ("sensitivity", np.array([1.0, np.nan]), "finite"),
        ("sensitivity", np.array([1.0, -1.0]), "not negative"),
        ("sensitivity", np.ones(3), "shapes"),
        ("curve", np.array([[0.0, 1, 0.5]] * 2), "rise"),
        ("curve", np.zeros(0), "shapes"),
        ("ratio_quantiles", np.array([[[0.5, 0.1, 0.9]]] * 2), "rise"),
        ("ratio_quantiles", np.zeros((2, 1, 5)), "shapes"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        replace(small(), **{name: value})


def test_the_median_must_be_a_quantile() -> None:
    with pytest.raises(ArtifactError, match="4 quantiles; an odd number"):
        replace(small(), curve=np.zeros((2, 4)), ratio_quantiles=np.zeros((2, 1, 4)))


# --- thresholds_at


def test_thresholds_lie_between_the_quantiles() -> None:
    found = thresholds_at(small(n_rank=3), np.array([0.5, 0.75]))
    expected = np.array([[0, 0, 0], [0, 0.5, 0.25], [0, 0, 0], [0, 0.7, 0.35]])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_quantile_0_drops_nothing_and_1_all_but_the_largest() -> None:
    found = thresholds_at(small(), np.array([0.0, 1.0]))
    np.testing.assert_allclose(found[[1, 3], 1], [0, 0.9], rtol=1e-6)


@pytest.mark.parametrize(
    ("quantiles", "message"),
    [([0.5], "2 quantiles are needed.*got 1"), ([0.5, 1.1], "between 0 and 1"), ([np.nan, 0], "between")],
)
def test_wrong_quantiles_are_refused(quantiles: list[float], message: str) -> None:
    for function in (thresholds_at, predict_damages):
        with pytest.raises(McError, match=message):
            function(small(), np.array(quantiles))


# --- predictions


def test_predictions_of_a_known_case() -> None:
    profile, quantiles = small(), np.array([0.25, 0.75])
    assert predicted_drop(profile, quantiles) == pytest.approx(0.25)  # half of the mean: rank 0 stays
    assert predicted_drop(small(n_rank=4), quantiles) == pytest.approx(0.375)
    assert predicted_damage(profile, quantiles) == pytest.approx(1 * 0.5 + 2 * 2.5)
    assert predicted_damage(profile, np.full(2, 0.5)) == pytest.approx(3)


def test_tolerant_layers_are_those_near_the_median() -> None:
    assert tolerant_layers(small((1.0, 1.0, 3.0, 3.1, 0.0))) == (1, 3, 5, 9)
    assert tolerant_layers(small((0.0, 0.0, 0.1))) == (1, 3)


# --- quantiles_for_drop


def test_the_least_sensitive_layer_drops_most() -> None:
    """Convex quadratic curves: quantiles go with 1 / sensitivity (2 q^2 s has the same slope everywhere)."""
    grid = np.linspace(0, 1, 2001)
    profile = RoutingProfile(
        (0, 1), 2, np.tile(grid, (2, 1, 1)), np.array([1.0, 3.0]), np.tile(4 * grid**2, (2, 1))
    )
    np.testing.assert_allclose(quantiles_for_drop(profile, 0.2, None), [0.6, 0.2], atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_no_other_quantiles_are_better(
    seed: int, layers: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thresholds, "STEPS", 20)
    profile = rough(3, seed)
    grid = np.linspace(0, 1, 21)
    allowed = [grid if layers is None or i in layers else [0.0] for i in range(3)]
    for drop in (0.05, 0.15, 0.3):
        found = quantiles_for_drop(profile, drop, layers)
        assert predicted_drop(profile, found) == pytest.approx(drop)
        others = [np.array(q) for q in itertools.product(*allowed) if abs(sum(q) - 6 * drop) < 1e-9]
        least = min(predicted_damage(profile, q) for q in others)
        assert predicted_damage(profile, found) == pytest.approx(least, rel=1e-12)


def test_the_saving_is_at_least_the_one_wanted() -> None:
    profile = rough(3)
    for drop in np.linspace(0, 0.5, 12):
        found = predicted_drop(profile, quantiles_for_drop(profile, float(drop), None))
        assert drop - 1e-9 <= found < drop + 1 / (2 * 3 * thresholds.STEPS)


def test_the_ends_of_what_can_be_dropped() -> None:
    assert (quantiles_for_drop(small(), 0, None) == 0).all()
    assert (quantiles_for_drop(small(), 0.5, None) == 1).all()
    assert (quantiles_for_drop(small(), 0.25, [3]) == [0, 1]).all()
    assert (quantiles_for_drop(small(n_rank=4), 0.75, [3, 1, 1]) == 1).all()


@pytest.mark.parametrize(
    ("drop", "layers", "message"),
    [
        (0.51, None, r"51 % .* 2 of 2 layers active, it can be 0 to 50\.0 %"),
        (0.26, (1,), r"1 of 2 layers active, it can be 0 to 25\.0 %"),
        (-0.1, None, "cannot be dropped"),
        (float("nan"), None, "cannot be dropped"),
        (0.1, (2,), "layer 2 has no experts; layers with experts are 1 to 3"),
        (0.1, (), "no layer is active"),
    ],
)
def test_an_impossible_saving_is_refused(drop: float, layers: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(McError, match=message):
        quantiles_for_drop(small(), drop, layers)
