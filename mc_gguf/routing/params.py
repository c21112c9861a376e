"""What the runtime is told about dynamic expert routing, and the sizes of its arrays.

This mirrors patches/src/include/mc.h and ggml-mc-routing.h: the names stand in the order of the enums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RUNTIME_POLICIES = ("off", "odp", "threshold", "keep_min", "top_p", "random")  # enum ggml_mc_policy
IMPORTANCES = ("attention", "l1", "mean", "variance", "kurtosis", "last")  # enum ggml_mc_measure


@dataclass(frozen=True)
class RoutingShape:
    """Sizes of a model's routing arrays: layers, experts per token, experts per layer; 0 without experts."""

    n_layer: int
    n_rank: int
    n_expert: int


@dataclass(frozen=True, eq=False)
class RoutingParams:
    """What mc_routing_set takes.

    `thresholds` is float32 [n_layer, n_rank], of which rank 0 is ignored; None: no thresholds. `active` is
    bool [n_layer]; None: all layers.
    """

    policy: str
    importance: str = "attention"
    keep_min: int = 1
    seed: int = 0
    ratio: float = 0.0
    top_p: float = 1.0
    rate: float = 0.0
    protect: float = 0.02
    thresholds: NDArray[np.float32] | None = None
    active: NDArray[np.bool_] | None = None
