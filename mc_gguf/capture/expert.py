"""One expert as measurements need it: its matrices, and what happens between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.capture.function import ExpertFunction
from mc_gguf.source import Checkpoint


@dataclass(frozen=True, eq=False)
class Expert:
    """The float32 matrices of one expert by projection, and its function.

    Attributes:
        matrices: gate and up [n_ff, n_embd], or gate_up [2 n_ff, n_embd], or up alone; down [n_embd, n_ff].
        function: what happens between the inner matrices and down.
        vectors: the expert's part of the tensors that `function` names: biases [n], scales [].
    """

    matrices: Mapping[str, Tensor]
    function: ExpertFunction
    vectors: Mapping[str, Tensor]

    @property
    def down(self) -> Tensor:
        return self.matrices["down"]

    @property
    def n_ff(self) -> int:
        return int(self.down.shape[1])

    @cached_property
    def inner(self) -> tuple[str, ...]:
        """The projections before down."""
        return tuple(p for p in self.matrices if p != "down")

    @property
    def output_scale(self) -> float:
        """What the products with down are multiplied by."""
        scale = self.vectors.get(self.function.down_scale)
        return 1.0 if scale is None else float(scale)

    def products(self, x: Tensor) -> dict[str, Tensor]:
        """x times the inner matrices, for x [n, n_embd]."""
        return {p: x @ self.matrices[p].T for p in self.inner}

    def hidden(self, x: Tensor) -> Tensor:
        """The input of down [n, n_ff] for x [n, n_embd]."""
        return self.hidden_of(self.products(x))

    def hidden_of(self, products: Mapping[str, Tensor], units: Tensor | None = None) -> Tensor:
        """The input of down; of the hidden units `units` alone if given, whose rows `products` have then."""
        return self.function.hidden(products, lambda name: self._vector(name, units))

    def output(self, hidden: Tensor) -> Tensor:
        """The expert's output [n, n_embd], without the bias of down, which no type changes."""
        return (hidden @ self.down.T).mul_(self.output_scale)

    def rows_of(self, projection: str, units: Tensor) -> Tensor:
        """Numbers of the rows of an inner matrix that make the hidden units: all that a merged matrix has."""
        n = len(self.matrices[projection])
        return torch.cat([units + first for first in range(0, n, self.n_ff)])

    def _vector(self, name: str, units: Tensor | None) -> Tensor:
        vector = self.vectors[name]
        if units is None or vector.ndim == 0:
            return vector
        return torch.cat([vector[units + first] for first in range(0, len(vector), self.n_ff)])


def read_expert(checkpoint: Checkpoint, layer: int, number: int, function: ExpertFunction) -> Expert:
    """The matrices of one expert, read now."""
    projections = checkpoint.info.projections
    matrices = {p: aligned(checkpoint.expert(layer, p, number)) for p in projections}
    return Expert(matrices, function, read_vectors(checkpoint, number, function))


def read_vectors(checkpoint: Checkpoint, number: int, function: ExpertFunction) -> dict[str, Tensor]:
    """The expert's part of the biases and scales that its function names."""
    names = [*_names(function.expression), function.down_bias, function.down_scale]
    return {name: torch.as_tensor(np.array(checkpoint.tensor(name)[number])) for name in names if name}


def _names(expression: object) -> list[str]:
    if not isinstance(expression, list):
        return []
    own = [expression[2]] if expression[0] in ("bias", "scale") else []
    return own + [name for part in expression for name in _names(part)]


def aligned(array: NDArray[np.float32]) -> Tensor:
    """The array as a tensor on a 64-byte boundary; elsewhere the last bits of a product depend on the
    address.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()
