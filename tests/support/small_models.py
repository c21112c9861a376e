"""A Checkpoint in memory, made from a transformers Mixtral, for the tests of calibration.

It converts names and permutes Q and K itself, independently of mc_gguf.source.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import EXPERT_STACK, PROJECTIONS, ModelInfo, TensorSpec, expert_tensor_name
from mc_gguf.ggml.gguf_file import FLOAT32, STRING, UINT32, Value
from mc_gguf.ggml.gguf_writer import add_values
from mc_gguf.source.base import measure_metadata
from tests.support import TINY

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}


def tiny_mixtral() -> Any:
    """The bundled trained model as transformers loads it, float32."""
    from transformers import MixtralForCausalLM

    model: Any = MixtralForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model.eval()


def random_mixtral(seed: int = 0, **changes: Any) -> Any:
    """A random Mixtral, by default with 2 layers, 5 experts, top-3, and sizes that k-quants cannot take. Its
    matrices are exact in BF16.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 128,
        "rope_theta": 1000.0,
        "initializer_range": 0.3,
        "sliding_window": None,
    }
    model: Any = MixtralForCausalLM(MixtralConfig(**(sizes | changes)))
    model.float().eval().load_state_dict(
        {name: _exact(name, value) for name, value in model.state_dict().items()}
    )
    return model


def _exact(name: str, value: torch.Tensor) -> torch.Tensor:
    """The tensor as the converter's BF16 files have it."""
    is_rounded = value.ndim > 1 and not name.endswith("mlp.gate.weight")
    return value.bfloat16().float() if is_rounded else value


def _as_stored(weights: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    flat = np.ascontiguousarray(weights).reshape(-1)
    if kind == "F32":
        return flat.view(np.uint8)
    return (flat.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


class MemoryCheckpoint:
    """A mc_gguf.source.Checkpoint over a transformers Mixtral. Its matrices are stored as `kind`: the runtime
    multiplies F32 in float32, and rounds the other factor of BF16.
    """

    def __init__(self, model: Any, kind: str = "BF16") -> None:
        config, self.kind = model.config, kind
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.hparams: Mapping[str, Any] = {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "attention.key_length": head_dim,
            "rope.freq_base": config.rope_parameters["rope_theta"],
            "rope.dimension_count": head_dim,
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
        self.gguf: Path | None = None
        self.bos_id: int | None = config.bos_token_id
        self.add_bos = True
        self.n_reads = 0
        self._tensors: dict[str, NDArray[np.float32]] = {}
        self._experts: dict[tuple[int, str], NDArray[np.float32]] = {}
        for name, value in model.state_dict().items():
            self._add(name, (value if kind == "F32" else _exact(name, value)).float().numpy(), config)
        specs = [TensorSpec(n, t.shape[::-1], self._type(n, t)) for n, t in self._tensors.items()]
        specs += [
            TensorSpec(expert_tensor_name(*key), t.shape[::-1], kind) for key, t in self._experts.items()
        ]
        self.info = ModelInfo(
            architecture="llama",
            n_layer=config.num_hidden_layers,
            n_expert=config.num_local_experts,
            n_expert_used=config.num_experts_per_tok,
            n_embd=config.hidden_size,
            n_ff=config.intermediate_size,
            fingerprint="memory",
            kv_bytes=measure_metadata(self._metadata(config), "llama"),
            n_kv=len(self._kv) + 1,
            tensors=tuple(specs),
        )

    def _metadata(self, config: Any) -> dict[str, Value]:
        counts = {k: v for k, v in self.hparams.items() if isinstance(v, int)}
        counts |= {"attention.value_length": self.hparams["attention.key_length"]}
        counts |= {"vocab_size": config.vocab_size, "embedding_length": config.hidden_size}
        counts |= {"feed_forward_length": config.intermediate_size}
        reals = {k: v for k, v in self.hparams.items() if isinstance(v, float)}
        self._kv = {f"llama.{k}": Value(UINT32, v) for k, v in counts.items()}
        self._kv |= {f"llama.{k}": Value(FLOAT32, float(np.float32(v))) for k, v in reals.items()}
        self._kv["tokenizer.ggml.model"] = Value(STRING, "none")
        return self._kv

    def _add(self, name: str, value: NDArray[np.float32], config: Any) -> None:
        if name in _NAMES:
            self._tensors[_NAMES[name]] = value
            return
        layer, rest = int(name.split(".")[2]), name.split(".", 3)[3]
        if rest == "mlp.experts.gate_up_proj":
            for projection, half in zip(PROJECTIONS, np.split(value, 2, axis=1), strict=False):
                self._experts[layer, projection] = half
        elif rest == "mlp.experts.down_proj":
            self._experts[layer, "down"] = value
        else:
            heads = {
                "self_attn.q_proj.weight": config.num_attention_heads,
                "self_attn.k_proj.weight": config.num_key_value_heads,
            }
            if rest in heads:  # halves (0..d/2, d/2..d) to neighbouring pairs
                value = value.reshape(heads[rest], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            self._tensors[f"blk.{layer}.{_LAYER_NAMES[rest]}"] = value

    def _type(self, name: str, weights: NDArray[np.float32]) -> str:
        """The type of a tensor that is no stack of experts, as in the converter's files."""
        return "F32" if weights.ndim == 1 or "ffn_gate_inp" in name else self.kind

    def copy_kv(self, writer: Any) -> None:
        add_values(writer, self._kv)

    def raw(self, name: str, expert: int | None = None) -> NDArray[np.uint8]:
        match = EXPERT_STACK.fullmatch(name)
        if match and expert is not None:
            return _as_stored(self._experts[int(match[1]), match[2]][expert], self.kind)
        weights = self._tensors[name]
        return _as_stored(weights, self._type(name, weights))

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name].copy()

    def expert(self, layer: int, projection: str, expert: int) -> NDArray[np.float32]:
        self.n_reads += 1
        return np.array(self._experts[layer, projection][expert])

    def tokenize(self, text: str) -> list[int]:
        """One token per byte, in the vocabulary's range after the special tokens."""
        return [3 + byte % 93 for byte in text.encode()]
