"""Hugging Face directories of small random models as transformers writes them, one for each family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support import TINY

_SIZES: dict[str, Any] = {
    **{"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2},
    **{"intermediate_size": 96, "moe_intermediate_size": 96, "initializer_range": 0.1},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-5},
}
# Multi-head latent attention, one layer without experts, shared experts.
_LATENT: dict[str, Any] = {
    **{"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16},
    **{"v_head_dim": 32, "head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 8},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}


@dataclass(frozen=True)
class Family:
    """One family: its classes in transformers are NAMEForCausalLM and `config`.

    `changes` are to the sizes above, `stored` to config.json: published models have keys that transformers
    does not write. `leaves_out` names what published models do not store.
    """

    changes: Mapping[str, Any]
    config: str = ""
    stored: Mapping[str, Any] = field(default_factory=dict)
    leaves_out: str = ""


FAMILIES: dict[str, Family] = {
    "Mixtral": Family({"num_local_experts": 8, "sliding_window": None}),
    "Qwen2Moe": Family({"num_experts": 8, "head_dim": 16, "shared_expert_intermediate_size": 160}),
    "Qwen3Moe": Family({"num_experts": 8, "norm_topk_prob": True}),
    "DeepseekV2": Family(_LATENT | {"topk_method": "greedy"}),
    "DeepseekV3": Family(_LATENT, stored={"scoring_func": "sigmoid"}),
    "GptOss": Family({"num_local_experts": 8, "sliding_window": 128}),
    "Glm4Moe": Family(
        {
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        }
    ),
    "GraniteMoe": Family({"num_local_experts": 8, "head_dim": 16}),
    "Olmoe": Family({"num_experts": 8, "num_key_value_heads": 4, "head_dim": 16}),
    "Gemma4": Family(
        {"num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0},
        "Gemma4TextConfig",
    ),
    "Llama4": Family(
        {
            **{"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
            "num_hidden_layers": 4,
        },
        "Llama4TextConfig",
    ),
    "Lfm2Moe": Family(
        {
            **{"num_experts": 8, "num_dense_layers": 1, "head_dim": 16, "tie_word_embeddings": True},
            "layer_types": ["conv", "full_attention"],
        },
        leaves_out="lm_head.weight",
    ),
    "MiniMaxM2": Family({"num_local_experts": 8}, stored={"rotary_dim": 32, "scoring_func": "sigmoid"}),
}


def save_family(name: str, folder: Path) -> Any:
    """Write the directory, in BF16 and with the bundled model's tokenizer; returns transformers' own model,
    in float32 with the same weights.
    """
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config or f"{name}Config")(**(_SIZES | dict(family.changes)))
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    tensors = {k: v.bfloat16() for k, v in model.state_dict().items() if k != family.leaves_out}
    model.save_pretrained(folder, state_dict=tensors)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(family.stored)))
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / file, folder / file)
    return model
