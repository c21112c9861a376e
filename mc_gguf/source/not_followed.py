"""Settings of config.json that llama.cpp's graphs do not follow: reported before any work starts, or refused.

Standard library only. docs/reference/configuration.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mc_gguf.common.errors import SourceError

Config = Mapping[str, Any]

# Whether the graph divides the weights of the chosen experts by their sum, by model_type. transformers does
# so for Mixtral always, and for the others if norm_topk_prob is true, which it is not by default.
_DIVIDES = {"mixtral": True, "qwen3_moe": True, "qwen2_moe": False, "olmoe": False}
# By class, for a config.json that does not name its model_type.
_KINDS = {"MixtralForCausalLM": "mixtral", "Qwen3MoeForCausalLM": "qwen3_moe"}
_KINDS |= {"Qwen2MoeForCausalLM": "qwen2_moe", "OlmoeForCausalLM": "olmoe"}
_FOLLOWED_ROPE = ("default", "none", "linear", "yarn")
_SILU = ("silu", "swish")


def check_activation(path: Path, config: Config) -> None:
    """Raises SourceError when the experts of config.json (`path`) have another activation than the graphs."""
    activation = config.get("hidden_act", "silu")
    if _kind(config) in _DIVIDES and activation not in _SILU:
        raise SourceError(
            f"{path}: hidden_act is {activation!r}, but the runtime's experts use 'silu', so the model would "
            "give other results; this model is not supported"
        )


def _kind(config: Config) -> str | None:
    return config.get("model_type") or _KINDS.get((config.get("architectures") or [""])[0])


def not_followed(config: Config) -> list[str]:
    """Sentences on what the runtime does otherwise than config.json says; none for other families."""
    if _kind(config) not in _DIVIDES:
        return []
    config = {**config, "model_type": _kind(config)}
    return [sentence for found in _CHECKS for sentence in found(config)]


def _expert_weights(config: Config) -> Iterator[str]:
    kind = config["model_type"]
    asked = kind == "mixtral" or bool(config.get("norm_topk_prob", False))
    if asked == _DIVIDES[kind]:
        return
    if asked:
        yield "norm_topk_prob is true, but expert weights are not divided by their sum"
    else:
        yield "norm_topk_prob is false, but expert weights are divided by their sum"


def _windows(config: Config) -> Iterator[str]:
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    is_off = config["model_type"] != "mixtral" and not config.get("use_sliding_window", False)
    by_layer = "sliding_attention" in (config.get("layer_types") or ())
    if not isinstance(window, int) or (is_off and not by_layer):
        return
    if not isinstance(longest, int) or window < longest:
        yield f"sliding_window is {window}, but attention is to all tokens, which differs in longer texts"


def _rope(config: Config) -> Iterator[str]:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        yield f"rope_scaling is {scaling!r}, which is no object, and is ignored"
        return
    kind = str(scaling.get("rope_type", scaling.get("type")) or "default").lower()
    if kind == "llama3" and config["model_type"] == "mixtral":
        return
    if kind in ("linear", "yarn") and not isinstance(scaling.get("factor"), int | float):
        yield f"rope_scaling of the type {kind!r} has no factor, and is ignored"
    if kind not in _FOLLOWED_ROPE:
        yield f"rope_scaling of the type {kind!r} is ignored, which differs beyond the original context"


def _clipping(config: Config) -> Iterator[str]:
    if config.get("clip_qkv") is not None:
        yield "clip_qkv is ignored: queries, keys and values are not clipped"


_CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (_expert_weights, _windows, _rope, _clipping)
