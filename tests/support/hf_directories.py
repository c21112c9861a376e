"""Small Mixtral directories written by hand, so that everything about them can be wrong. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from tests.support import TINY

N_VOCAB, N_EMBD, N_EXPERT = 4096, 32, 4
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "I32": 4}

# name -> (type, shape)
Tensors = dict[str, tuple[str, tuple[int, ...]]]

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def mixtral_tensors(n_layer: int = 2) -> Tensors:
    """The tensors of a model with 4 experts, in BF16."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (N_VOCAB, N_EMBD),
        "model.norm.weight": (N_EMBD,),
        "lm_head.weight": (N_VOCAB, N_EMBD),
    }
    for layer in range(n_layer):
        for part in ("q", "k", "v", "o"):
            shapes[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = (N_EMBD, N_EMBD)
        for norm in ("input", "post_attention"):
            shapes[f"model.layers.{layer}.{norm}_layernorm.weight"] = (N_EMBD,)
        moe = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{moe}.gate.weight"] = (N_EXPERT, N_EMBD)
        for expert in range(N_EXPERT):
            for part in ("w1", "w2", "w3"):
                shapes[f"{moe}.experts.{expert}.{part}.weight"] = (N_EMBD, N_EMBD)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def mixtral_config(**changes: Any) -> dict[str, Any]:
    """config.json of that model; a change to None removes the key."""
    config = json.loads((TINY / "config.json").read_text()) | {
        "hidden_size": N_EMBD,
        "intermediate_size": N_EMBD,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": N_EXPERT,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def write_shard(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + _BYTES[kind] * prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_shards(folder: Path, tensors: Tensors, count: int, index: bool = False) -> list[Path]:
    """The tensors in `count` files, with or without an index."""
    paths = [folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = list(tensors)
    for i, path in enumerate(paths):
        write_shard(path, {name: tensors[name] for name in names[i::count]})
    if index:
        places = {name: paths[i % count].name for i, name in enumerate(names)}
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)
    return paths


def write_directory(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A directory with one file of tensors, by default those of a whole model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, folder / name)
    (folder / "config.json").write_text(json.dumps(mixtral_config(**config)))
    write_shard(folder / "model.safetensors", mixtral_tensors() if tensors is None else tensors)
    return folder
