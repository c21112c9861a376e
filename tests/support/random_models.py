"""Tiny GGUF models with random weights, of architectures that treat routing weights differently.

qwen3moe   softmax over all experts, weights normalised over the selected ones
olmoe      softmax over all experts, weights left alone
gpt-oss    softmax over the selected experts; biases, attention sinks, sliding window
dots1      sigmoid, normalised or not (norm=); a dense first layer, a shared expert
llama      here without experts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mc_gguf.runtime.packages import load_gguf

N_LAYER, N_EMBD, N_HEAD, N_FF, N_EXPERT, N_USED, N_VOCAB = 3, 64, 4, 32, 8, 4, 96
HEAD = N_EMBD // N_HEAD
SIGMOID = 2  # enum llama_expert_gating_func_type


def write_random_model(path: Path, architecture: str, norm: bool = True, shard_tensors: int = 0) -> Path:
    """Write a model of 3 layers and 8 experts, of which a token uses 4. `norm` is for dots1. With
    `shard_tensors` the files hold that many tensors each and are named like llama.cpp's.
    """
    writer = load_gguf().GGUFWriter(path, architecture, split_max_tensors=shard_tensors)
    _metadata(writer, architecture, norm)
    rng = np.random.default_rng(3)
    for name, shape in _shapes(architecture).items():  # numpy order
        scale = 2.0 if name.endswith("gate_inp.weight") else 1.0
        if name.endswith("norm.weight"):
            data = 1 + 0.1 * rng.standard_normal(shape)
        else:
            data = scale * rng.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: Any, architecture: str, norm: bool) -> None:
    numbers = {
        "block_count": N_LAYER,
        "context_length": 1024,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "expert_feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
        "expert_count": N_EXPERT,
        "expert_used_count": N_USED,
        "attention.sliding_window": 32,
    }
    if architecture == "llama":
        del numbers["expert_count"], numbers["expert_used_count"]
    if architecture == "dots1":
        numbers |= {"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_gating_func": SIGMOID}
        writer.add_bool("dots1.expert_weights_norm", norm)
    for key, number in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(N_VOCAB)])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([1] * N_VOCAB)


def _shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        "output.weight": (N_VOCAB, N_EMBD),
        "output_norm.weight": (N_EMBD,),
    }
    for layer in range(N_LAYER):
        own = _attention(architecture)
        if architecture == "llama" or (architecture == "dots1" and layer == 0):
            own |= _feed_forward("")
        else:
            own |= {"ffn_gate_inp.weight": (N_EXPERT, N_EMBD), **_feed_forward("_exps", (N_EXPERT,))}
            if architecture == "dots1":
                own |= _feed_forward("_shexp")
            if architecture == "gpt-oss":
                own |= {"ffn_gate_inp.bias": (N_EXPERT,), "ffn_down_exps.bias": (N_EXPERT, N_EMBD)}
                own |= {f"ffn_{name}_exps.bias": (N_EXPERT, N_FF) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def _attention(architecture: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"attn_{name}.weight": (N_EMBD, N_EMBD) for name in ("q", "k", "v", "output")
    }
    shapes |= {"attn_norm.weight": (N_EMBD,)}
    if architecture == "gpt-oss":
        shapes |= {f"attn_{name}.bias": (N_EMBD,) for name in ("q", "k", "v", "output")}
        return shapes | {"attn_sinks.weight": (N_HEAD,), "post_attention_norm.weight": (N_EMBD,)}
    if architecture == "llama":
        return shapes | {"ffn_norm.weight": (N_EMBD,)}
    size = N_EMBD if architecture == "olmoe" else HEAD
    return shapes | {
        "ffn_norm.weight": (N_EMBD,),
        "attn_q_norm.weight": (size,),
        "attn_k_norm.weight": (size,),
    }


def _feed_forward(suffix: str, lead: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    up, down = (*lead, N_FF, N_EMBD), (*lead, N_EMBD, N_FF)
    return {
        f"ffn_{name}{suffix}.weight": shape
        for name, shape in zip(("gate", "up", "down"), (up, up, down), strict=True)
    }
