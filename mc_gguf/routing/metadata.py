"""What a GGUF carries for dynamic expert routing: thresholds, the layers that may drop, and their source.

docs/reference/format.md defines the keys; mc_gguf.container reads and writes them (read_routing,
write_routing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration
from mc_gguf.common.errors import McError
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.thresholds import check_layers, quantiles_for_drop, thresholds_at, tolerant_layers

DEFAULT_TARGET_DROP = 0.15
DEFAULT_PROTECT = 0.02


@dataclass(frozen=True, eq=False)
class RoutingMetadata:
    """The routing metadata of a model with n_layer layers in all and K experts per token.

    thresholds   float32 [n_layer, K]: the expert of rank r is dropped when w_r < thresholds[layer, r] * w_0;
                 rank 0 and layers without experts have 0
    active       numbers of the layers in which experts may be dropped, ascending, at least one
    protect      share of a prompt's tokens, 0 to 1, that keep all of their experts under policy odp
    profile      from which other thresholds can be computed; None: the file carries thresholds only
    calibration  SHA-256 of the calibration file that the thresholds come from; "" when it is unknown
    model        fingerprint of the source model (ModelInfo.fingerprint) in files that quantize wrote, else ""
    """

    thresholds: NDArray[np.float32]
    active: tuple[int, ...]
    protect: float = DEFAULT_PROTECT
    profile: RoutingProfile | None = None
    calibration: str = ""
    model: str = ""


def default_metadata(profile: RoutingProfile, calibration: str = "", model: str = "") -> RoutingMetadata:
    """What quantize writes: 15 % of the expert activations are dropped, 2 % of the tokens are protected.

    The thresholds are those of the least predicted damage.
    """
    none = np.zeros((profile.n_layer, profile.n_rank), dtype=np.float32)
    empty = RoutingMetadata(none, profile.layers, profile=profile, calibration=calibration, model=model)
    return choose_thresholds(empty)


def routing_metadata_from(calibration: Calibration) -> RoutingMetadata | None:
    """default_metadata() of what a calibration knows.

    None when it measured nothing about routing (published statistics, or no calibration at all), or when
    every token uses only one expert.
    """
    model = calibration.model
    if model is None or model.n_expert_used < 2 or not calibration.has("routing_curve"):
        return None
    return default_metadata(RoutingProfile.of(calibration), calibration.fingerprint, model.fingerprint)


def choose_thresholds(
    base: RoutingMetadata,
    quantile: float | None = None,
    target_drop: float | None = None,
    layers: str | Sequence[int] | None = None,
    protect: float = DEFAULT_PROTECT,
) -> RoutingMetadata:
    """`base` with new thresholds, computed from its profile.

    They are those that drop the share `target_drop` of all expert activations (15 % by default) at the least
    predicted damage, or those at one `quantile` in every layer.

    `layers` that may drop: "all" (the default with a target), "auto" (the tolerant ones, the default with a
    quantile), or numbers. With a target, layers that need not drop anything are not active. With a
    quantile, inactive layers have thresholds, too, so that a user can activate them. Raises McError when
    `base` has no profile, when a layer has no experts, when a share is outside 0..1, or when the layers
    cannot drop so much.
    """
    profile = base.profile
    if profile is None:
        raise McError("no thresholds can be computed without a routing profile; give a calibration")
    for name, share in (("quantile", quantile), ("protected share", protect), ("target drop", target_drop)):
        if share is not None and not 0 <= share <= 1:
            raise McError(f"the {name} must be a share from 0 to 1 (0 % to 100 %), not {share:g}")
    if quantile is not None:
        active = _active(profile, "auto" if layers is None else layers)
        quantiles = np.full(len(profile.layers), quantile)
    else:
        active = _active(profile, "all" if layers is None else layers)
        target_drop = DEFAULT_TARGET_DROP if target_drop is None else target_drop
        quantiles = quantiles_for_drop(profile, target_drop, active)
        active = tuple(n for n, q in zip(profile.layers, quantiles, strict=True) if q > 0) or active
    return replace(base, thresholds=thresholds_at(profile, quantiles), active=active, protect=protect)


def _active(profile: RoutingProfile, layers: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(layers, str):
        if layers not in ("auto", "all"):
            raise McError(f"layers must be auto, all or numbers, not {layers!r}")
        return tolerant_layers(profile) if layers == "auto" else profile.layers
    return check_layers(profile, layers)
