"""RoutingProfile: what a calibration knows about how many experts each layer can do without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mc_gguf.artifacts import Calibration, Floats, ModelInfo
from mc_gguf.common.errors import ArtifactError


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Routing of a model on the calibration text. L layers with experts, K experts per token, Q quantiles.

    layers                          numbers of the layers with experts, ascending
    n_layer                         all layers of the model, those without experts too
    ratio_quantiles [L, K-1, Q]     quantiles, evenly spaced from 0 to 1, of w_j / w_0 for the ranks 1..K-1
    sensitivity [L]                 increase of the mean KL divergence (nats per token) of the model's output
                                    when this layer alone drops what is below its median thresholds
    curve [L, Q]                    squared error of the MoE block's output when everything below the
                                    thresholds at quantile q is dropped, relative to the error at the median;
                                    it never decreases and is 1 at the median

    The predicted damage of layer l at quantile q is sensitivity[l] * curve[l](q), linear between the
    quantiles. All arrays are float64. Raises ArtifactError when they do not fit each other.
    """

    layers: tuple[int, ...]
    n_layer: int
    ratio_quantiles: Floats
    sensitivity: Floats
    curve: Floats

    def __post_init__(self) -> None:
        n, q = len(self.layers), self.curve.shape[-1]
        if (
            self.ratio_quantiles.ndim != 3
            or self.ratio_quantiles.shape[::2] != (n, q)
            or self.sensitivity.shape != (n,)
            or self.curve.shape != (n, q)
        ):
            raise ArtifactError(
                f"routing statistics of {n} layers have the shapes {self.ratio_quantiles.shape}, "
                f"{self.sensitivity.shape} and {self.curve.shape}; make the calibration again"
            )
        if not n or list(self.layers) != sorted({i for i in self.layers if 0 <= i < self.n_layer}):
            raise ArtifactError(
                f"routing statistics name the layers {self.layers} of {self.n_layer}; "
                "they must ascend and exist"
            )
        if q < 3 or q % 2 == 0:
            raise ArtifactError(f"routing statistics have {q} quantiles; an odd number from 3 on is needed")
        arrays = self.ratio_quantiles, self.sensitivity, self.curve
        rising = all((np.diff(a, axis=-1) >= 0).all() for a in (self.ratio_quantiles, self.curve))
        if not rising or not all(np.isfinite(a).all() and (a >= 0).all() for a in arrays):
            raise ArtifactError(
                "routing statistics must be finite, not negative and rise with the quantile; "
                "make the calibration again"
            )

    @property
    def n_rank(self) -> int:
        """K, experts per token."""
        return int(self.ratio_quantiles.shape[1]) + 1

    @classmethod
    def even(cls, model: ModelInfo, n_quantile: int) -> RoutingProfile:
        """The profile of a model that nothing was measured of: all layers and ranks alike. In a file it takes
        the bytes that a measured one takes.
        """
        n_layer, grid = len(model.expert_layers), np.linspace(0, 1, n_quantile)
        ratios = np.tile(grid, (n_layer, model.n_expert_used - 1, 1))
        curve = np.tile(2 * grid, (n_layer, 1))
        return cls(model.expert_layers, model.n_layer, ratios, np.ones(n_layer), curve)

    @classmethod
    def of(cls, calibration: Calibration) -> RoutingProfile:
        """The profile that `calibration` measured. Raises ArtifactError when there is none."""
        if calibration.model is None or not calibration.has("routing_curve"):
            raise ArtifactError(
                "this calibration has no routing statistics; make one with: mc-gguf calibrate SOURCE -o FILE"
            )
        return cls(
            calibration.layers,
            calibration.model.n_layer,
            calibration.ratio_quantiles,
            calibration.routing_sensitivity,
            calibration.routing_curve,
        )
