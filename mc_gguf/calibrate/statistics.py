"""One layer's share of a calibration's statistics, and how the layers' shares become the whole.

Names, axes and dtypes come from the table in artifacts/statistics.py, so nothing here has to be changed when
a statistic is added; layer.py fills it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration, Floats, ModelInfo, Statistic, Statistics
from mc_gguf.artifacts.calibration import axis_sizes

N_QUANTILES = 1001  # odd: the median is one of them


@dataclass(frozen=True, eq=False)
class LayerStatistics(Statistics):
    """The arrays that are measured in one layer: without their layer axis, and float64 until they are
    merged.
    """

    statistics: Mapping[str, NDArray[Any]]

    rounding_error = Statistic(
        np.float64,
        "layer",
        "Relative error per token of rounding the layer's experts, summed over the experts.",
    )

    @classmethod
    def lines(cls) -> tuple[Statistic[Any], ...]:
        """The part of the table that is measured while a layer is at hand."""
        return tuple(line for line in cls.table() if not line.from_all_layers)

    @classmethod
    def zeros(cls, info: ModelInfo, types: Sequence[str]) -> LayerStatistics:
        """Arrays of zeros with the shapes that a layer of the model has."""
        sizes = axis_sizes(info, types) | {"quantile": N_QUANTILES}
        return cls({line.name: np.zeros([sizes[axis] for axis in line.axes[1:]]) for line in cls.lines()})


def stack_layers(layers: Sequence[LayerStatistics]) -> dict[str, Floats]:
    """All arrays with their layer axis, float64: what a killed run continues from."""
    return {
        line.name: np.stack([layer.statistics[line.name] for layer in layers])
        for line in LayerStatistics.lines()
    }


def unstack_layers(arrays: Mapping[str, Floats]) -> list[LayerStatistics]:
    """The inverse of `stack_layers`."""
    n_layer = len(arrays[LayerStatistics.frequency.name])
    return [LayerStatistics({name: array[i] for name, array in arrays.items()}) for i in range(n_layer)]


def merge_layers(layers: Sequence[LayerStatistics]) -> dict[str, NDArray[Any]]:
    """The layers' share of a Calibration, in the table's dtypes."""
    arrays = stack_layers(layers)
    return {
        line.name: arrays[line.name].astype(line.dtype) for line in Calibration.table() if line.name in arrays
    }
