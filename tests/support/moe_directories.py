"""Hugging Face directories of small random MoE models, one for each architecture that calibration follows.

All have 64 experts, of which a token uses the best 8, and expert matrices whose widths (64 and 96) k-quants
cannot take.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mc_gguf.artifacts import PROJECTIONS, expert_tensor_name
from mc_gguf.runtime.packages import load_gguf
from mc_gguf.source import Checkpoint
from tests.support import TINY

# What the architectures do not share; attention heads are 32 wide where that can be chosen.
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 64, "norm_topk_prob": True, "moe_intermediate_size": 96, "head_dim": 32},
    "Olmoe": {"num_experts": 64, "intermediate_size": 96, "num_key_value_heads": 4, "pad_token_id": None},
    "Qwen2Moe": {
        "num_experts": 64,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
        "intermediate_size": 160,
    },
    "Mixtral": {"num_local_experts": 64, "intermediate_size": 96, "head_dim": 32, "sliding_window": None},
}


def random_moe(name: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in float32 with random weights that BF16 holds exactly. Norms are not ones, and
    biases are not zeros.
    """
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**(sizes | CONFIGS[name] | changes))
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn(weight.shape)
            elif key.endswith("experts.down_proj"):
                weight /= 2
            weight.copy_(weight.bfloat16())
    return model.eval()


def save_moe(model: Any, folder: Path) -> Path:
    """Save the model in BF16, with the bundled model's tokenizer."""
    model.save_pretrained(folder, state_dict={k: v.bfloat16() for k, v in model.state_dict().items()})
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


def write_f32(checkpoint: Checkpoint, path: Path) -> Path:
    """Write the checkpoint as a plain F32 GGUF, so that two forwards only differ in the order of sums."""
    writer = load_gguf().GGUFWriter(path, checkpoint.info.architecture)
    checkpoint.copy_kv(writer)
    stacks = {expert_tensor_name(i, p): (i, p) for i in checkpoint.info.expert_layers for p in PROJECTIONS}
    for tensor in checkpoint.info.tensors:
        if tensor.name in stacks:
            experts = range(checkpoint.info.n_expert)
            data = np.stack([checkpoint.expert(*stacks[tensor.name], e) for e in experts])
        else:
            data = checkpoint.tensor(tensor.name)
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
