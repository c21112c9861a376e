"""The architectures that calibration supports, and the numbers of a model's graph beside its weights.

To support another architecture whose graph consists of the parts that decoder.py has, add a line to
ARCHITECTURES.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mc_gguf.common.errors import SourceError

if TYPE_CHECKING:
    from mc_gguf.source import Checkpoint


MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS: with more, the runtime ends the process
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp does for some architectures and not for others.

    Attributes:
        neox: whether the rotary embedding turns the pairs (i, i + d/2) rather than (2i, 2i + 1).
        renormalise: whether the weights of the chosen experts are divided by their sum.
    """

    neox: bool
    renormalise: bool


# By GGUF name: Mixtral, Qwen3-MoE, OLMoE and Qwen2-MoE.
ARCHITECTURES = {
    "llama": Architecture(neox=False, renormalise=True),
    "qwen3moe": Architecture(neox=True, renormalise=True),
    "olmoe": Architecture(neox=True, renormalise=False),
    "qwen2moe": Architecture(neox=True, renormalise=False),
}


@dataclass(frozen=True)
class Shape:
    """What the layers need besides their weights: from the GGUF metadata, with llama.cpp's defaults."""

    architecture: Architecture
    n_head: int
    n_head_kv: int
    head_dim: int
    rope_base: float
    rope_scale: float
    eps: float
    attn_scale: float
    n_expert: int
    n_used: int
    weight_scale: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Shape:
        """The shape of a checkpoint. Raises SourceError when the model needs something that Decoder does not
        do.
        """
        info, hparams = checkpoint.info, checkpoint.hparams
        if info.architecture not in ARCHITECTURES or info.n_expert < 1:
            raise SourceError(
                f"calibration supports the GGUF architectures {', '.join(ARCHITECTURES)}, with experts, not "
                f"{info.architecture!r} with {info.n_expert} experts"
            )
        n_head = _count(hparams, "attention.head_count")
        n_head_kv = _count(hparams, "attention.head_count_kv", n_head)
        head_dim = _count(hparams, "attention.key_length", info.n_embd // n_head)
        if _count(hparams, "rope.dimension_count", head_dim) != head_dim or head_dim % 2 != 0:
            raise SourceError(
                "calibration does not support a rope.dimension_count that is odd or other than the head "
                f"size, {head_dim}"
            )
        return cls(
            architecture=ARCHITECTURES[info.architecture],
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            rope_base=_number(hparams, "rope.freq_base", 10000.0, or_zero=False),
            rope_scale=_rope_scale(hparams),
            eps=_number(hparams, "attention.layer_norm_rms_epsilon"),
            attn_scale=_attn_scale(info.architecture, hparams) or head_dim**-0.5,
            n_expert=info.n_expert,
            n_used=info.n_expert_used,
            weight_scale=_number(hparams, "expert_weights_scale", 0.0) or 1.0,
        )


def _need(hparams: Mapping[str, Any], key: str, default: Any) -> Any:
    value = hparams.get(key, default)
    if value is None:
        raise SourceError(f"the model's metadata lack {key}")
    return value


def _count(hparams: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _need(hparams, key, default)
    if isinstance(value, list):
        raise SourceError(f"calibration does not support a {key} that differs between layers ({value})")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(f"the model's metadata have {value!r} as {key}, which is no whole number above 0")
    return value


def _number(
    hparams: Mapping[str, Any], key: str, default: float | None = None, or_zero: bool = True
) -> float:
    """A finite number above 0, or 0 with `or_zero`."""
    value = _need(hparams, key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf or (value == 0 and not or_zero):
        raise SourceError(
            f"the model's metadata have {value!r} as {key}, which is no finite number "
            f"{'from 0 on' if or_zero else 'above 0'}"
        )
    return float(value)


def _attn_scale(architecture: str, hparams: Mapping[str, Any]) -> float:
    """The factor of the attention logits; 0 means 1 / sqrt(head size). Only the graph of `llama` reads
    another.
    """
    return _number(hparams, "attention.scale", 0.0) if architecture == "llama" else 0.0


def _rope_scale(hparams: Mapping[str, Any]) -> float:
    kind = str(hparams.get("rope.scaling.type", "none"))
    if kind not in ("none", "linear"):
        raise SourceError(
            f"calibration does not support rope.scaling.type {kind!r}, only none and linear: convert a copy "
            "of the model without it (in config.json: rope_scaling; the weights are the same), and ask for "
            "it when running, with rope_scaling_type, rope_freq_scale and yarn_orig_ctx of Llama"
        )
    return 1.0 / (_number(hparams, "rope.scaling.factor", 1.0) or 1.0) if kind == "linear" else 1.0
