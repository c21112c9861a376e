"""ModelInfo: what planning and writing need to know about a source model without opening its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROJECTIONS: tuple[str, ...] = ("gate", "up", "down")
ATTENTION: tuple[str, ...] = ("q", "k", "v", "output")  # the matrices blk.N.attn_*.weight

Floats = NDArray[np.float64]


def expert_tensor_name(layer: int, projection: str) -> str:
    """GGUF name of the stacked experts of one layer and projection, as llama.cpp's converter writes it."""
    return f"blk.{layer}.ffn_{projection}_exps.weight"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the source: GGUF name, shape in ggml order (fastest first), type of 16 or 32 bits."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class ModelInfo:
    """What planning needs to know about the source model, so that it never opens the weights.

    Attributes:
        architecture: the GGUF name.
        n_layer: number of layers, with and without experts.
        n_expert: routed experts per layer.
        n_expert_used: experts per token.
        n_embd: width of the hidden states.
        n_ff: width of an expert.
        fingerprint: identifies the source.
        kv_bytes: bytes of the GGUF metadata that the output copies from the source.
        n_kv: number of its keys.
        tensors: every tensor in file order, including expert stacks.
    """

    architecture: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff: int
    fingerprint: str
    kv_bytes: int
    n_kv: int
    tensors: tuple[TensorSpec, ...]

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts, ascending."""
        names = {t.name for t in self.tensors}
        return tuple(i for i in range(self.n_layer) if expert_tensor_name(i, "down") in names)

    def expert_shape(self, projection: str) -> tuple[int, int]:
        """(rows, weights per row) of one expert's matrix."""
        return (self.n_embd, self.n_ff) if projection == "down" else (self.n_ff, self.n_embd)

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelInfo:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for what it never gives."""
        tensors = tuple(TensorSpec(t["name"], tuple(t["shape"]), t["type"]) for t in data["tensors"])
        info = cls(**{**data, "tensors": tensors})
        for name in ("n_layer", "n_expert", "n_expert_used", "n_embd", "n_ff", "kv_bytes", "n_kv"):
            if not isinstance(value := getattr(info, name), int) or not 0 <= value < 2**31:
                raise ValueError(f"{name} is {value!r}")
        for spec in tensors:
            if not isinstance(spec.name, str) or not all(isinstance(size, int) for size in spec.shape):
                raise ValueError(f"a tensor is {spec!r}")
        return info
