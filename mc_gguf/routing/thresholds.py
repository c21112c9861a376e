"""Thresholds of w_j / w_0 from a RoutingProfile: at quantiles, or for a wanted saving at the least damage.

One quantile per layer says how much the layer drops. Thresholds at quantile q drop the share q of the slots
of every rank but rank 0, which is (K-1)/K * q of the expert activations of K ranks. A layer with quantile 0
drops nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Floats
from mc_gguf.common.errors import McError
from mc_gguf.routing.profile import RoutingProfile

# quantiles_for_drop chooses among quantiles i / STEPS.
STEPS = 200
# A layer is tolerant when its sensitivity is at most this many times the median over the layers.
TOLERANCE = 3.0


def thresholds_at(profile: RoutingProfile, quantiles: Floats) -> NDArray[np.float32]:
    """Thresholds [n_layer, K] at one quantile for each layer with experts [L], linear between the profile's.

    Rank 0, layers without experts and layers with quantile 0 have threshold 0. Raises McError for quantiles
    outside 0..1.
    """
    wanted = _checked(profile, quantiles)
    grid = np.linspace(0, 1, profile.curve.shape[1])
    thresholds = np.zeros((profile.n_layer, profile.n_rank), dtype=np.float32)
    for i, layer in enumerate(profile.layers):
        if wanted[i] > 0:
            thresholds[layer, 1:] = [np.interp(wanted[i], grid, q) for q in profile.ratio_quantiles[i]]
    return thresholds


def tolerant_layers(profile: RoutingProfile) -> tuple[int, ...]:
    """Numbers of the layers whose sensitivity is at most TOLERANCE times the median over layers."""
    limit = TOLERANCE * float(np.median(profile.sensitivity))
    return tuple(n for n, s in zip(profile.layers, profile.sensitivity, strict=True) if s <= limit)


def predict_damages(profile: RoutingProfile, quantiles: Floats) -> Floats:
    """Predicted increase of the mean KL divergence (nats per token) by each layer [L] at its quantile [L].

    The damage of several layers together is taken as their sum.
    """
    grid = np.linspace(0, 1, profile.curve.shape[1])
    pairs = zip(_checked(profile, quantiles), profile.curve, strict=True)
    return np.asarray(profile.sensitivity * [np.interp(q, grid, curve) for q, curve in pairs])


def quantiles_for_drop(profile: RoutingProfile, drop: float, layers: Sequence[int] | None) -> Floats:
    """Quantiles [L] that together drop the share `drop` of all expert activations at the least predicted
    damage.

    Only `layers` (numbers; None: all with experts) may drop. Quantiles are multiples of 1/STEPS, and their
    sum is the wanted one, rounded up to a step; a dynamic program over the layers finds the least damage.
    Raises McError when `drop` is more than these layers can drop.
    """
    named = profile.layers if layers is None else check_layers(profile, layers)
    allowed = [profile.layers.index(n) for n in named]
    share = (
        (profile.n_rank - 1) / profile.n_rank / len(profile.layers)
    )  # of all activations, per quantile of 1
    most = share * len(allowed)
    if not 0 <= drop <= most * (1 + 1e-9):
        raise McError(
            f"{100 * drop:g} % of the expert activations cannot be dropped; with "
            f"{len(allowed)} of {len(profile.layers)} layers active, it can be 0 to {100 * most:.1f} %"
        )
    n_step = min(int(np.ceil(drop / share * STEPS - 1e-6)), STEPS * len(allowed)) if drop else 0
    grid = np.linspace(0, 1, STEPS + 1)
    cost = np.stack([predict_damages(profile, np.full(len(profile.layers), q)) for q in grid], axis=1)
    steps = _least(cost[allowed], n_step)
    quantiles = np.zeros(len(profile.layers))
    quantiles[allowed] = steps / STEPS
    return quantiles


def _least(cost: Floats, n_step: int) -> NDArray[np.int64]:
    """The steps [n] of n layers that sum to `n_step` with the least sum of cost [n, STEPS + 1]."""
    best = np.full(n_step + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(cost), n_step + 1), dtype=np.int64)
    for i, own in enumerate(cost):
        # before[k, s]: least cost of the earlier layers when this one takes k of s steps
        before = np.full((len(own), n_step + 1), np.inf)
        for k in range(min(len(own), n_step + 1)):
            before[k, k:] = best[: n_step + 1 - k]
        total = before + own[:, None]
        chosen[i] = total.argmin(axis=0)
        best = total.min(axis=0)
    steps = np.zeros(len(cost), dtype=np.int64)
    left = n_step
    for i in reversed(range(len(cost))):
        steps[i] = chosen[i, left]
        left -= steps[i]
    return steps


def check_layers(profile: RoutingProfile, layers: Sequence[int]) -> tuple[int, ...]:
    """These layers, ascending, each once. Raises McError when there are none, or when one has no experts."""
    if not layers:
        raise McError("no layer is active, so nothing can be dropped; name some layers")
    if unknown := sorted(set(layers) - set(profile.layers)):
        raise McError(
            f"layer {unknown[0]} has no experts; layers with experts are "
            f"{profile.layers[0]} to {profile.layers[-1]}"
        )
    return tuple(sorted(set(layers)))


def _checked(profile: RoutingProfile, quantiles: Floats) -> Floats:
    values = np.asarray(quantiles, dtype=np.float64)
    if values.shape != (len(profile.layers),):
        raise McError(
            f"{len(profile.layers)} quantiles are needed, one for each layer with experts; got {values.size}"
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise McError(f"quantiles must be between 0 and 1; got {values.min():g} to {values.max():g}")
    return values
