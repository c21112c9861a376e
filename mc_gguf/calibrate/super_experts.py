"""Super experts: the few whose outputs or errors are far outside the range of their layer.

There are two criteria, and either is enough:

- activations (Su et al., Unveiling Super Experts, arXiv 2507.23279): the expert's largest down output is at
or
  above the 99.5 % quantile of all experts, and above a tenth of the largest, in a layer whose hidden states
  have massive activations: above 100, and above 1000 times the median (Sun et al., arXiv 2402.17762);
- error: the Frobenius norm of its output's change at nominal 2 bits is at least ERROR_RATIO times the median
of
  its layer. In the published statistics of Mixtral-8x7B one expert has a ratio of 122 (layer 1, expert 3),
  and the next one 2.3.

Plans need no rule for them, because such an error is part of what the program minimises
(docs/explanation/allocation.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import NOMINAL_BITS, Calibration

QUANTILE, SHARE_OF_LARGEST = 0.995, 0.1
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
ERROR_RATIO = 10.0

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SuperExpert:
    """One super expert.

    Attributes:
        layer: number of the layer in the model.
        expert: number of the expert in the layer.
        down_max: largest magnitude of its down outputs; None when it was not measured.
        error_ratio: its error relative to the median of its layer.
        massive: whether it meets the criterion on activations.
    """

    layer: int
    expert: int
    down_max: float | None
    error_ratio: float
    massive: bool

    def __str__(self) -> str:
        why = [f"error {self.error_ratio:.3g} times its layer's median"]
        if self.massive:
            why.insert(0, f"massive activations, down output up to {self.down_max:.4g}")
        return f"layer {self.layer} expert {self.expert} ({'; '.join(why)})"


def super_experts(calibration: Calibration) -> tuple[SuperExpert, ...]:
    """All super experts, by layer; empty where the calibration has neither errors nor activations."""
    ratio = _error_ratio(calibration)
    massive = _massive(calibration)
    return tuple(
        SuperExpert(
            calibration.layers[i],
            int(e),
            float(calibration.down_max[i, e]) if calibration.has("down_max") else None,
            float(ratio[i, e]),
            bool(massive[i, e]),
        )
        for i, e in np.argwhere(massive | (ratio >= ERROR_RATIO))
    )


def _error_ratio(calibration: Calibration) -> NDArray[np.float64]:
    if not calibration.has("nominal_error"):
        return np.zeros(calibration.frequency.shape)
    error = calibration.nominal_error[..., NOMINAL_BITS.index(2)]
    median = np.median(error, axis=1, keepdims=True)
    # Where the median is zero, no expert is special.
    return np.asarray(np.divide(error, median, out=np.zeros_like(error), where=median > 0))


def _massive(calibration: Calibration) -> Mask:
    if not calibration.has("down_max", "hidden_max", "hidden_median"):
        return np.zeros(calibration.frequency.shape, dtype=bool)
    down, largest = calibration.down_max, calibration.hidden_max
    layers = (largest > MASSIVE) & (largest > MASSIVE_RATIO * calibration.hidden_median)
    outlier = (down >= np.quantile(down, QUANTILE)) & (down > SHARE_OF_LARGEST * down.max())
    return np.asarray(outlier & layers[:, None])
