"""The one table of a calibration's statistics: name, axes, dtype and meaning of every array.

`Statistics` is the table: each line of its body describes an array and is the attribute that reads it.

    calibration.frequency[3, 7]             # raises ArtifactError if it was not measured
    calibration.has("kld_per_error")
    Calibration.frequency.axes              # ("layer", "expert")

What is read and written (calibration.py), how a layer's arrays are made and stacked
(calibrate/statistics.py), which shapes are accepted and what docs/reference/calibration.md says all follow
from it. To add a statistic, add a line here with `optional=True`, since files without it exist, and fill it
in calibrate/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import ArtifactError

Scalar = TypeVar("Scalar", np.float32, np.float64)

# Errors of types that do not fit the rows.
_MAY_LACK = "nominal_error"
_MAY_BE_INFINITE = ("sq_error", "relative_error", "weight_error", "matrix_error", _MAY_LACK)

# What the axes count.
AXES: dict[str, str] = {
    "layer": "layers with experts, in the order of the header's `layers`",
    "expert": "the routed experts of a layer",
    "projection": "the matrices of an expert: gate, up, down; up, down; or gate_up, down",
    "type": "candidate types, in the order of the header's `types`",
    "bits": "nominal 1, 2 and 3 bits per weight",
    "n_embd": "width of an expert's inputs: nearly always that of the hidden states",
    "n_ff": "width of an expert's intermediate states",
    "rank": "the ranks 1 to K-1 of the K experts that a token uses; rank 0 has the largest routing weight",
    "quantile": "quantiles, evenly spaced from 0 to 1; an odd number, so that the median is one of them",
    "matrix": "matrices that are not experts, in the order of the header's `matrices`",
    "matrix_type": "types measured for these matrices, in the order of the header's `matrix_types`",
    "matrix_column": "the columns of these matrices, one matrix after the other",
}


class Statistic(Generic[Scalar]):
    """One line of the table. As an attribute of an object it is the array; of the class, this description.

    Args:
        dtype: numpy scalar type of the array in a calibration.
        axes: names of the array's axes, of AXES, separated by spaces.
        meaning: one sentence or two for the documentation, with units.
        optional: whether a file may lack the array: some were made before it was measured.
        from_all_layers: whether it is computed when all layers are done, not while one layer is measured.
    """

    def __init__(
        self,
        dtype: type[Scalar],
        axes: str,
        meaning: str,
        *,
        optional: bool = False,
        from_all_layers: bool = False,
    ) -> None:
        self.name = ""
        self.dtype: type[Scalar] = dtype
        self.axes = tuple(axes.split())
        self.meaning = meaning
        self.optional = optional
        self.from_all_layers = from_all_layers
        assert set(self.axes) <= set(AXES), axes

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, holder: None, owner: type) -> Statistic[Scalar]: ...

    @overload
    def __get__(self, holder: Statistics, owner: type) -> NDArray[Scalar]: ...

    def __get__(self, holder: Statistics | None, owner: type) -> Statistic[Scalar] | NDArray[Scalar]:
        if holder is None:
            return self
        found = holder.statistics.get(self.name)
        if found is None:
            raise ArtifactError(
                f"{self.name} is needed, but this calibration did not measure it; "
                "make a new one with: mc-gguf calibrate"
            )
        return found

    def check(self, array: NDArray[Any], sizes: dict[str, int]) -> None:
        """Compare dtype and shape with the table and `sizes` (by axis), and add the sizes of other axes.

        Raises ArtifactError, which names the array.
        """
        if array.dtype != self.dtype:
            raise ArtifactError(f"{self.name} has the dtype {array.dtype}, not {np.dtype(self.dtype)}")
        wanted: tuple[int, ...] = ()
        if array.ndim == len(self.axes):
            pairs = zip(self.axes, array.shape, strict=True)
            wanted = tuple(sizes.setdefault(axis, size) for axis, size in pairs)
        if array.ndim != len(self.axes) or array.shape != wanted:
            known = ", ".join(f"{axis} {sizes.get(axis, 'any')}" for axis in self.axes)
            raise ArtifactError(f"{self.name} has the shape {array.shape}; its axes are [{known}]")
        has_nan = self.name != _MAY_LACK and np.isnan(array).any()
        if has_nan or not (self.name in _MAY_BE_INFINITE or np.isfinite(array).all()):
            raise ArtifactError(f"{self.name} has values that are no finite numbers")


class Statistics:
    """The table of everything that can be measured, and the base of what holds such arrays.

    `statistics` maps names to arrays. What was not measured is absent; `has` tells. An attribute of an array
    that is absent raises ArtifactError.
    """

    statistics: Mapping[str, NDArray[Any]]

    frequency = Statistic(np.float64, "layer expert", "Number of tokens routed to the expert.")
    routing_weight = Statistic(
        np.float64,
        "layer expert",
        "Sum of the routing weights (softmax over all experts, before any renormalisation) of these tokens.",
    )
    sq_error = Statistic(
        np.float64,
        "layer expert projection type",
        "Squared error of the expert's output times its routing weight, summed over all of its tokens, "
        "when only this projection of only this expert has this type. Infinite where a row is not a whole "
        "number of blocks.",
    )
    output_sq = Statistic(
        np.float64,
        "layer expert",
        "Squared norm of the expert's output times its routing weight, summed over its tokens.",
    )
    imatrix_in = Statistic(
        np.float32,
        "layer expert n_embd",
        "Importance matrix of gate and up: mean squared input. Zeros when no token was routed to the expert.",
    )
    imatrix_mid = Statistic(
        np.float32,
        "layer expert n_ff",
        "Importance matrix of down: mean squared input. Zeros when no token was routed to the expert.",
    )
    ratio_quantiles = Statistic(
        np.float64,
        "layer rank quantile",
        "Quantiles over the tokens of w_j / w_0, the routing weight at rank j relative to the largest.",
    )
    routing_sensitivity = Statistic(
        np.float64,
        "layer",
        "Increase of the mean KL divergence of the model's output, in nats per token, when only this layer "
        "drops the experts with w_j / w_0 below its medians.",
        from_all_layers=True,
    )
    routing_curve = Statistic(
        np.float64,
        "layer quantile",
        "Squared error of the MoE block's output when every expert with w_j / w_0 below this quantile is "
        "dropped, relative to the error at the median.",
    )
    nominal_error = Statistic(
        np.float64,
        "layer expert bits",
        "Frobenius norm of the change of the expert's output when the whole expert has nominal 1, 2 or 3 "
        "bits per weight.",
        from_all_layers=True,
    )
    relative_error = Statistic(
        np.float64,
        "layer expert projection type",
        "As sq_error, but the error of each token is divided by the squared norm of its hidden state after "
        "the expert.",
    )
    weight_error = Statistic(
        np.float64,
        "layer expert projection type",
        "Squared change of the matrix's own weights under this type, summed over the weights.",
    )
    hessian_trace = Statistic(
        np.float64,
        "layer expert projection",
        "Trace of half the Hessian of the relative error with respect to the matrix, divided by the number "
        "of weights.",
    )
    kld_per_error = Statistic(
        np.float64,
        "layer",
        "Price of an error: increase of the mean KL divergence of the model's output, in nats per token, "
        "per unit of relative error per token, when all experts of this layer are rounded.",
        from_all_layers=True,
    )
    block_score = Statistic(
        np.float64,
        "layer",
        "1 - mean cosine between the hidden states before and after the feed-forward block.",
    )
    hidden_max = Statistic(np.float64, "layer", "Largest magnitude in the hidden states after the layer.")
    hidden_median = Statistic(
        np.float64,
        "layer",
        "Median magnitude in the hidden states after the layer, over the first 2,048 tokens.",
    )
    down_max = Statistic(
        np.float64, "layer expert", "Largest magnitude in the outputs of the expert's down projection."
    )
    matrix_error = Statistic(
        np.float64,
        "matrix matrix_type",
        "Squared error of the products with a matrix that is no expert, per token on average, when it has "
        "this type. Infinite where a row is not a whole number of blocks.",
        optional=True,
        from_all_layers=True,
    )
    matrix_price = Statistic(
        np.float64,
        "matrix",
        "Price of such an error, in nats per token per unit of squared error of the products: what rounding "
        "the matrix changes in the hidden states of its layer, times the price of the layer.",
        optional=True,
        from_all_layers=True,
    )
    matrix_in = Statistic(
        np.float32,
        "matrix_column",
        "Importance matrices of the matrices that are not experts: mean squared input.",
        optional=True,
        from_all_layers=True,
    )

    @classmethod
    def table(cls) -> tuple[Statistic[Any], ...]:
        """All lines of the table, in its order, those of base classes first."""
        found: dict[str, Statistic[Any]] = {}
        for base in reversed(cls.__mro__):
            found |= {name: line for name, line in vars(base).items() if isinstance(line, Statistic)}
        return tuple(found.values())

    def has(self, *names: str) -> bool:
        """Whether all of these arrays were measured. Raises KeyError for a name that is not in the table."""
        known = {line.name for line in self.table()}
        for name in names:
            if name not in known:
                raise KeyError(name)
        return all(name in self.statistics for name in names)


def check_statistics(
    table: Iterable[Statistic[Any]], arrays: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
) -> None:
    """Check every array against the table, the known `sizes` of axes, and the other arrays.

    Raises ArtifactError, which names the array that does not fit.
    """
    lines = {line.name: line for line in table}
    if unknown := sorted(set(arrays) - set(lines)):
        raise ArtifactError(f"{unknown[0]} is not a statistic of a calibration; known: {', '.join(lines)}")
    known = dict(sizes)
    for name, line in lines.items():
        if name in arrays:
            line.check(arrays[name], known)


def to_markdown(table: Iterable[Statistic[Any]]) -> str:
    """The table and its axes as Markdown."""
    rows = [
        f"| `{line.name}` | {', '.join(line.axes)} | {np.dtype(line.dtype)} | {line.meaning}"
        f"{' Optional.' if line.optional else ''} |"
        for line in table
    ]
    axes = [f"| {name} | {meaning} |" for name, meaning in AXES.items()]
    return "\n".join(
        [
            "| Array | Axes | Type | Meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            "| Axis | What it counts |",
            "|---|---|",
            *axes,
            "",
        ]
    )
