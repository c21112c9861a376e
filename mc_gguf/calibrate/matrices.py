"""The matrices that are not experts: attention of any kind, shared experts, dense layers, projections of
state spaces. The error of each under every type, and what rounding it changes in its products.

The error is the squared error of the matrix's products with its inputs, per token, when it has the type. What
it does to the hidden states is measured for every matrix by itself (capture/price.py): the products with the
rounded matrix take the place of the exact ones. The price of an error in the hidden states is the layer's:
when everything else is exact, single matrices cost more than that, because a small change flips the choice of
a few experts; in a quantized model these flips happen anyway. Rows are independent, so a sample of them is
enough for the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import Floats, ModelInfo
from mc_gguf.calibrate.disturbance import rounded
from mc_gguf.calibrate.expert_errors import draw, quantization_error
from mc_gguf.calibrate.finite import check_finite
from mc_gguf.capture.expert import aligned
from mc_gguf.capture.spool import Spool, from_half
from mc_gguf.ggml.types import MATRIX_CANDIDATES, TYPES
from mc_gguf.source import Checkpoint

MATRIX_TOKENS = 512
_ROWS = 1024  # of a matrix that are rounded at once


def matrix_types(info: ModelInfo) -> tuple[str, ...]:
    """Those of MATRIX_CANDIDATES that fit the rows of some matrix, by size."""
    widths = {t.shape[0] for t in info.tensors if len(t.shape) == 2 and t.name.startswith("blk.")}
    return tuple(name for name in MATRIX_CANDIDATES if any(TYPES[name].fits(width) for width in widths))


def measured_matrices(info: ModelInfo, spool: Spool) -> tuple[str, ...]:
    """The matrices in blocks whose products the runtime computed for every token, in file order."""
    inputs, sampled = spool.facts.get("matrices", {}), spool.facts.get("sampled", {})
    return tuple(
        t.name
        for t in info.tensors
        if t.name.startswith("blk.")
        and t.is_matrix
        and len(t.shape) == 2
        and min(t.shape) > 1
        and sampled.get(inputs.get(t.name)) == t.shape[0]
    )


@dataclass(frozen=True, eq=False)
class MatrixMeasurement:
    """What was measured of one matrix.

    Attributes:
        errors: [A] mean squared error of the products under each type; infinite where it does not fit.
        imatrix: [columns] mean squared input.
        rounding_error: mean squared error of the products of the rounded matrix.
    """

    errors: Floats
    imatrix: NDArray[np.float32]
    rounding_error: float


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of the model with the inputs that it had for the sampled tokens."""

    checkpoint: Checkpoint
    spool: Spool
    name: str
    n_sampled: int

    def inputs(self) -> Tensor:
        """[samples, columns]."""
        key = self.spool.facts["matrices"][self.name]
        n_col = int(self.spool.facts["sampled"][key])
        rows = self.spool.rows(key, np.float16, (n_col,)).read(self.n_sampled)
        return from_half(rows, self.spool.rows(f"{key}.scale", np.float32).read(self.n_sampled))

    def change(self) -> Tensor:
        """[samples, rows] what rounding the matrix adds to its products."""
        matrix, inputs = aligned(self.checkpoint.tensor(self.name)), self.inputs()
        return torch.cat([inputs @ (rounded(part) - part).T for part in torch.split(matrix, _ROWS)], dim=1)

    def measure(
        self, types: Sequence[str], max_rows: int, seed: Sequence[int], threads: int
    ) -> MatrixMeasurement:
        """Raises McError for values that are not finite."""
        key = self.spool.facts["matrices"][self.name]
        mean = self.spool.sums[f"{key}.sq"] / max(1.0, float(self.spool.sums[f"{key}.n"][0]))
        check_finite(mean, "squared inputs")
        imatrix = mean.astype(np.float32)
        matrix, inputs = aligned(self.checkpoint.tensor(self.name)), self.inputs()
        importance = torch.from_numpy(imatrix if imatrix.any() else np.ones_like(imatrix))
        sizes = (matrix.square() @ importance).double().numpy()
        rows = draw(sizes, max_rows, np.random.default_rng(list(seed)))
        weights = matrix[rows.index].contiguous()
        errors = np.full(len(types), np.inf)
        for t, name in enumerate(types):
            if TYPES[name].fits(weights.shape[1]):
                delta = quantization_error(weights, name, imatrix, threads)
                errors[t] = self._error(inputs, delta, rows.weight)
        check_finite(errors[errors != np.inf], "errors of the types")
        whole = torch.ones(len(matrix))
        parts = zip(torch.split(matrix, _ROWS), torch.split(whole, _ROWS), strict=True)
        rounding = sum(self._error(inputs, rounded(part) - part, ones) for part, ones in parts)
        return MatrixMeasurement(errors, imatrix, rounding)

    @staticmethod
    def _error(inputs: Tensor, delta: Tensor, weight: Tensor) -> float:
        products = (inputs @ delta.T).square() @ weight
        return float(products.sum(dtype=torch.float64)) / max(1, len(inputs))
