"""What a GGUF carries of dynamic expert routing: thresholds, the layers that may drop, and what they were
computed from. The keys are docs/format.md's; mc_gguf.container reads and writes them (read_routing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mc_gguf.routing.profile import RoutingProfile

DEFAULT_QUANTILE = 0.5
DEFAULT_PROTECT = 0.02


@dataclass(frozen=True, eq=False)
class RoutingMetadata:
    """The routing metadata of one model with n_layer layers (all of them) and K experts per token.

    thresholds   float32 [n_layer, K]: the expert of rank r is dropped when w_r < thresholds[layer, r] * w_0;
                 rank 0 and layers without experts have 0
    active       numbers of the layers in which experts may be dropped, ascending, at least one
    protect      share of a prompt's tokens, 0 to 1, that keep all their experts under policy odp
    profile      what other thresholds can be computed from; None: the file carries thresholds only
    calibration  SHA-256 of the calibration file that the thresholds come from; "" when unknown
    model        fingerprint of the source model (ModelInfo.fingerprint) in files that quantize wrote, else ""
    """

    thresholds: NDArray[np.float32]
    active: tuple[int, ...]
    protect: float = DEFAULT_PROTECT
    profile: RoutingProfile | None = None
    calibration: str = ""
    model: str = ""


def default_metadata(profile: RoutingProfile, calibration: str = "", model: str = "") -> RoutingMetadata:
    """What quantize writes: median thresholds in every layer, the tolerant layers active, 2 % protected."""
    from mc_gguf.routing.thresholds import at_quantiles, tolerant_layers

    quantiles = np.full(len(profile.layers), DEFAULT_QUANTILE)
    return RoutingMetadata(
        at_quantiles(profile, quantiles),
        tolerant_layers(profile),
        profile=profile,
        calibration=calibration,
        model=model,
    )
