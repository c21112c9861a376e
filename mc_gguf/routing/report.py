"""RoutingMetadata described: as numbers for JSON, and as a table and one line for people.

Predictions are for the calibration's text and do not consider protected tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Floats
from mc_gguf.routing.metadata import RoutingMetadata
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.thresholds import predict_damages


def describe_routing(metadata: RoutingMetadata) -> dict[str, Any]:
    """What `routing show --json`, `routing set --json` and `inspect --json` print.

    `dropped` is a share of the layer's expert activations, `predicted_drop` a share of those of all layers.
    `damage`, `sensitivity` and `predicted_damage` are in nats per token. All five are None without a profile.
    """
    profile = metadata.profile
    layers = range(len(metadata.thresholds)) if profile is None else profile.layers
    rows = [
        {
            "layer": layer,
            "active": layer in metadata.active,
            "thresholds": metadata.thresholds[layer, 1:].tolist(),
            "dropped": None,
            "damage": None,
            "sensitivity": None,
        }
        for layer in layers
    ]
    drop = damage = None
    if profile is not None:
        quantiles = _quantiles(profile, metadata.thresholds)
        quantiles[~np.isin(profile.layers, metadata.active)] = 0
        dropped, cost = (
            quantiles.sum(axis=1) / profile.n_rank,
            predict_damages(profile, quantiles.mean(axis=1)),
        )
        drop, damage = float(dropped.mean()), float(cost.sum())
        for i, row in enumerate(rows):
            row |= {
                "dropped": float(dropped[i]),
                "damage": float(cost[i]),
                "sensitivity": float(profile.sensitivity[i]),
            }
    return {
        "active": list(metadata.active),
        "protect": metadata.protect,
        "predicted_drop": drop,
        "predicted_damage": damage,
        "calibration_fingerprint": metadata.calibration or None,
        "layers": rows,
    }


def _quantiles(profile: RoutingProfile, thresholds: NDArray[np.float32]) -> Floats:
    """[L, K-1]: the share of the slots of each rank that lie below the threshold; the inverse of
    thresholds_at.
    """
    n_quantile = profile.curve.shape[1]
    shares = np.zeros(profile.ratio_quantiles.shape[:2])
    for i, layer in enumerate(profile.layers):
        for rank, ratios in enumerate(profile.ratio_quantiles[i]):
            threshold = float(thresholds[layer, rank + 1])
            after = int(np.searchsorted(ratios, threshold))  # ratios before it are below the threshold
            if after == n_quantile:
                shares[i, rank] = 1
            elif after > 0:
                below, above = ratios[after - 1], ratios[after]
                shares[i, rank] = (after - 1 + (threshold - below) / (above - below)) / (n_quantile - 1)
    return shares


def summary(description: dict[str, Any]) -> str:
    """One line about what describe_routing() returned."""
    text = (
        f"{len(description['active'])} of {len(description['layers'])} layers may drop experts, "
        f"{100 * description['protect']:g} % of a prompt's tokens are protected"
    )
    if description["predicted_drop"] is None:
        return text
    return (
        f"{text}; predicted: {100 * description['predicted_drop']:.1f} % of the expert activations dropped, "
        f"KL divergence {description['predicted_damage']:.4f} nats per token"
    )


def layer_table(description: dict[str, Any]) -> list[str]:
    """A line per layer."""
    lines = ["layer  active  dropped  damage    sensitivity  thresholds"]
    for row in description["layers"]:
        known = row["dropped"] is not None
        numbers = (
            f"{100 * row['dropped']:5.1f} %  {row['damage']:<8.5f}  {row['sensitivity']:<11.5f}"
            if known
            else f"{'-':7}  {'-':8}  {'-':11}"
        )
        thresholds = " ".join(f"{t:.4f}" for t in row["thresholds"])
        lines.append(f"{row['layer']:>5}  {'yes' if row['active'] else 'no':6}  {numbers}  {thresholds}")
    return lines
