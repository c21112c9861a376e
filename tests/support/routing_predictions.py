"""What thresholds at quantiles are expected to do to a whole model."""

from __future__ import annotations

from mc_gguf.artifacts import Floats
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.thresholds import predict_damages


def predicted_drop(profile: RoutingProfile, quantiles: Floats) -> float:
    """The dropped share of all expert activations: rank 0 stays, and every layer routes the same tokens."""
    return float((profile.n_rank - 1) / profile.n_rank * quantiles.mean())


def predicted_damage(profile: RoutingProfile, quantiles: Floats) -> float:
    """The expected damage of all layers, in nats per token."""
    return float(predict_damages(profile, quantiles).sum())
