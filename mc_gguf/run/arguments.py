"""Checks of what Llama is given: llama.cpp wraps, ignores or asserts what is out of range.

What llama.cpp itself reports is left to it.
"""

from __future__ import annotations

import difflib
import numbers
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mc_gguf.common.arguments import FLOAT32_MAX, MAX_THREADS
from mc_gguf.common.errors import LlamaError
from mc_gguf.runtime.llama_library import is_whole

INT32 = 2**31
NO_SEED = (-1, 2**32 - 1)  # LLAMA_DEFAULT_SEED, signed and not: choose one

# (smallest, largest) of the options of the constructor that count something
_RANGES = {
    "n_ctx": (0, INT32 - 1),
    "n_batch": (1, INT32 - 1),
    "n_ubatch": (1, INT32 - 1),
    "n_threads": (1, MAX_THREADS),
    "n_threads_batch": (1, MAX_THREADS),
    "n_gpu_layers": (-1, INT32 - 1),
    "last_n_tokens_size": (-1, INT32 - 1),
    "yarn_orig_ctx": (0, INT32 - 1),
    "split_mode": (0, 3),
    "main_gpu": (-1, INT32 - 1),
    "rope_scaling_type": (-1, 3),
    "pooling_type": (-1, 4),
    "attention_type": (-1, 1),
}
_NUMBERS = (
    *("rope_freq_base", "rope_freq_scale", "lora_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"),
)
_FLAGS = (
    *("vocab_only", "use_mmap", "use_mlock", "logits_all", "embedding", "offload_kqv", "flash_attn"),
    *("op_offload", "swa_full", "no_perf", "spm_infill"),
)
_FUNCTIONS = ("chat_handler", "draft_model")

_SAMPLING_RANGES = {"mirostat_mode": (0, 2), "top_k": (-INT32, INT32 - 1)}
_FROM_SERVER = ("mul_mat_q", "rpc_servers")  # which llama_cpp.server gives, and nothing uses
_NOT_NUMBERS = {"penalize_nl", "logits_processor", "grammar"}


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """Raises LlamaError for an unknown option of the constructor."""
    for name in options:
        if name not in (*known, *_FROM_SERVER):
            close = difflib.get_close_matches(name, known, 1)
            raise LlamaError(
                f"Llama has no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )


def check_options(options: Mapping[str, Any]) -> None:
    """Raises LlamaError for options of the constructor that are out of range. None stands for the default."""
    _check_ranges(options, _RANGES)
    _check_numbers(options, _NUMBERS)
    for name in ("rope_freq_base", "rope_freq_scale"):
        if options.get(name, 0) < 0:
            raise LlamaError(f"{name} must be above 0, or 0 for the model's, not {options[name]!r}")
    for name in _FLAGS:
        value = options.get(name)
        if value is not None and not isinstance(value, bool | np.bool_) and value not in (0, 1):
            raise LlamaError(f"{name} must be True or False, not {value!r}")
    for name in _FUNCTIONS:
        if options.get(name) is not None and not callable(options[name]):
            raise LlamaError(f"{name} must be a function, not {options[name]!r}")
    _check_cache_types(options)
    _check_overrides(options.get("kv_overrides") or {})
    n_drafted = getattr(options.get("draft_model"), "num_pred_tokens", 0)
    if n_drafted >= options.get("n_batch", 512):
        raise LlamaError(f"n_batch must be above the {n_drafted} tokens that the draft model gives at once")


def _check_overrides(overrides: Any) -> None:
    if not isinstance(overrides, Mapping):
        raise LlamaError(f"kv_overrides must be a dict, not {overrides!r}")
    for name, value in overrides.items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise LlamaError(f"kv_overrides: {name!r} is {value!r}; give a bool, int, float or str")
        texts = [name, value] if isinstance(value, str) else [name]
        if any(len(text.encode("utf-8", "surrogatepass")) > 127 or "\0" in text for text in texts):
            raise LlamaError(f"kv_overrides: {name!r} or its value is longer than 127 bytes, or has a zero")
        if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
            raise LlamaError(f"kv_overrides: {name} is {value}, which is no finite float32")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise LlamaError(f"kv_overrides: {name} is {value}, which has more than 64 bits")


def check_sampling(options: Mapping[str, Any]) -> None:
    """Raises LlamaError for sampling parameters that are no numbers, or that stand for nothing."""
    _check_ranges(options, _SAMPLING_RANGES)
    _check_numbers(options, [name for name in options if name not in _NOT_NUMBERS | _SAMPLING_RANGES.keys()])


_CACHE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "IQ4_NL": 20,
    "BF16": 30,
}


def _check_cache_types(options: Mapping[str, Any]) -> None:
    """The types that llama.cpp's own programs take; with others its arithmetic fails."""
    for name in ("type_k", "type_v"):
        value = options.get(name)
        if value is not None and value not in _CACHE_TYPES.values():
            known = ", ".join(f"{number} ({kind})" for kind, number in _CACHE_TYPES.items())
            raise LlamaError(f"{name} must be one of {known}, not {value!r}")


def to_seed(seed: int | None) -> int:
    """A seed from 0 to 2^32 - 2; a random one for None and for llama.cpp's "no seed"."""
    if seed is None or seed in NO_SEED:
        return secrets.randbelow(2**32 - 2) + 1
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise LlamaError(f"seed must be from 0 to {2**32 - 2}, or -1 for a random one, not {seed!r}")
    return int(seed)


def _check_ranges(options: Mapping[str, Any], ranges: Mapping[str, tuple[int, int]]) -> None:
    for name, (smallest, largest) in ranges.items():
        value = options.get(name)
        if value is not None and not (is_whole(value) and smallest <= value <= largest):
            raise LlamaError(
                f"{name} must be a whole number from {smallest} to {largest}, not {value!r}",
                parameter=name.removeprefix("n_"),
            )


def _check_numbers(options: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        value = options.get(name)
        if value is not None and not (_is_real(value) and abs(value) <= FLOAT32_MAX):
            raise LlamaError(f"{name} must be a finite number, not {value!r}")


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real)


def odd_epsilon(metadata: Mapping[str, Any]) -> str | None:
    """The key of an epsilon with which llama.cpp makes no graph, and which it does not name."""
    return next(
        (key for key, value in metadata.items() if key.endswith("_epsilon") and not _is_epsilon(value)), None
    )


def _is_epsilon(value: Any) -> bool:
    return not isinstance(value, int | float) or value >= 0
