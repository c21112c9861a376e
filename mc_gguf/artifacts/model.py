"""ModelInfo: what planning and writing need to know about a source model without opening its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROJECTIONS: tuple[str, ...] = ("gate", "up", "down")
# All that a model may have instead: gate and up merged in one matrix, or no gate.
ALL_PROJECTIONS: tuple[str, ...] = ("gate", "up", "gate_up", "down")
# The sets of matrices that an expert may have.
PROJECTION_SETS: tuple[tuple[str, ...], ...] = (PROJECTIONS, ("up", "down"), ("gate_up", "down"))
# A stack of experts: its layer, and which of the expert's matrices it has.
EXPERT_STACK = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")
ATTENTION: tuple[str, ...] = ("q", "k", "v", "output")  # the matrices blk.N.attn_*.weight

Floats = NDArray[np.float64]


def whole_set(found: Collection[str]) -> tuple[str, ...]:
    """All the matrices of an expert that has those in `found`; empty where no expert has these together."""
    fitting = [names for names in PROJECTION_SETS if set(found) <= set(names)]
    return min(fitting, key=len, default=())


def expert_tensor_name(layer: int, projection: str) -> str:
    """GGUF name of the stacked experts of one layer and projection, as llama.cpp's converter writes it."""
    return f"blk.{layer}.ffn_{projection}_exps.weight"


# What upstream's llama-quantize leaves as it is too (tensor_allows_quantization in src/llama-quant.cpp):
# routers, tiny matrices, and what is not multiplied by as a matrix.
_KEPT = (
    *("ffn_gate_inp", "norm", "ssm_conv1d", "shortconv.conv", "time_mix_", "attn_rel_b", "position_embd"),
    *("token_types", "altup", "laurel", "per_layer_model_proj", "indexer.k_proj", "indexer.q_proj"),
    *("_ape.weight", "hc_", "_conv.weight", "conv1d"),
)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the source: GGUF name, shape in ggml order (fastest first), ggml type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def is_matrix(self) -> bool:
        """Whether the runtime multiplies by it as a matrix, so that it may be quantized."""
        is_weight = len(self.shape) > 1 and self.name.endswith(".weight")
        return is_weight and not any(part in self.name for part in _KEPT)


@dataclass(frozen=True)
class ModelInfo:
    """What planning needs to know about the source model, so that it never opens the weights.

    Attributes:
        architecture: the GGUF name.
        n_layer: number of layers, with and without experts; blocks that predict further tokens (MTP) do not
            count, and their experts have the types of other tensors.
        n_expert: routed experts per layer.
        n_expert_used: experts per token; where layers differ, the most.
        n_embd: width of the hidden states.
        n_ff: width of an expert; where layers differ, the largest.
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

    @cached_property
    def stacks(self) -> dict[tuple[int, str], TensorSpec]:
        """The stacks of experts by (layer, projection), in file order."""
        found = ((EXPERT_STACK.fullmatch(t.name), t) for t in self.tensors)
        return {(int(match[1]), match[2]): t for match, t in found if match}

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """The matrices that an expert of this model has, in the order of ALL_PROJECTIONS."""
        return tuple(p for p in ALL_PROJECTIONS if any(p == found for _, found in self.stacks))

    @cached_property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts, ascending."""
        return tuple(sorted({layer for layer, _ in self.stacks if layer < self.n_layer}))

    @cached_property
    def n_expert_weight(self) -> int:
        """Weights of all routed experts in these layers."""
        layers = set(self.expert_layers)
        return sum(math.prod(stack.shape) for (layer, _), stack in self.stacks.items() if layer in layers)

    def expert_shape(self, projection: str, layer: int | None = None) -> tuple[int, int]:
        """(rows, weights per row) of one expert's matrix, by default in the first layer with experts."""
        cols, rows = self.stacks[self.expert_layers[0] if layer is None else layer, projection].shape[:2]
        return rows, cols

    @property
    def expert_width(self) -> int:
        """Width of what goes into an expert and of what comes out: n_embd, except in models whose experts
        work in a space of their own.
        """
        return self.expert_shape("down")[0]

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
