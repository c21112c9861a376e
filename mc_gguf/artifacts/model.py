"""ModelInfo: what planning and writing need to know of a source model without opening its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROJECTIONS: tuple[str, ...] = ("gate", "up", "down")
ATTENTION: tuple[str, ...] = ("q", "k", "v", "output")  # matrices of an attention block: blk.N.attn_*.weight

Floats = NDArray[np.float64]


def expert_tensor_name(layer: int, projection: str) -> str:
    """GGUF name of the stacked experts of one layer and projection, as llama.cpp's converter writes it."""
    return f"blk.{layer}.ffn_{projection}_exps.weight"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the source: GGUF name, shape in ggml order (fastest first), and its 16/32-bit type."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class ModelInfo:
    """What planning needs to know of the source model, so that it never opens the weights.

    `kv_bytes` and `n_kv` count the GGUF metadata that the output copies from the source (mc_gguf's own keys
    not included); `tensors` lists every tensor in file order, expert stacks included. `fingerprint`
    identifies the source.
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
        """Layers that have routed experts, ascending."""
        names = {t.name for t in self.tensors}
        return tuple(i for i in range(self.n_layer) if expert_tensor_name(i, "down") in names)

    def expert_shape(self, projection: str) -> tuple[int, int]:
        """(rows, weights per row) of one expert's matrix."""
        return (self.n_embd, self.n_ff) if projection == "down" else (self.n_ff, self.n_embd)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelInfo:
        tensors = tuple(TensorSpec(t["name"], tuple(t["shape"]), t["type"]) for t in data["tensors"])
        return cls(**{**data, "tensors": tensors})
