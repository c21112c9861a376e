"""Checks of what Llama is given: llama.cpp wraps, ignores or asserts what is out of range.

What llama.cpp itself reports is left to it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mc_gguf.common.errors import LlamaError
from mc_gguf.runtime.llama_library import is_whole

MAX_THREADS = 512  # GGML_MAX_N_THREADS
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
}
_SAMPLING_RANGES = {"mirostat_mode": (0, 2), "top_k": (-INT32, INT32 - 1)}
_FROM_SERVER = ("mul_mat_q", "rpc_servers")  # which llama_cpp.server gives, and nothing uses
_NOT_NUMBERS = {"penalize_nl", "logits_processor", "grammar"}


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """Raises LlamaError for an option of the constructor that there is not."""
    for name in options:
        if name not in (*known, *_FROM_SERVER):
            close = difflib.get_close_matches(name, known, 1)
            raise LlamaError(
                f"Llama has no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )


def check_options(options: Mapping[str, Any]) -> None:
    """Raises LlamaError for options of the constructor that are out of range. None stands for the default."""
    _check_ranges(options, _RANGES)
    _check_numbers(options, ("rope_freq_base", "rope_freq_scale", "lora_scale"))
    _check_cache_types(options)
    for name, value in (options.get("kv_overrides") or {}).items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise LlamaError(f"kv_overrides: {name!r} is {value!r}; give a bool, int, float or str")
        if len(name.encode()) > 127 or (isinstance(value, str) and len(value.encode()) > 127):
            raise LlamaError(f"kv_overrides: {name!r} or its value is longer than 127 bytes")


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
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise LlamaError(f"{name} must be a finite number, not {value!r}")


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises LlamaError for a value with which llama.cpp makes no graph, and which it does not name."""
    for key, value in metadata.items():
        if key.endswith("_epsilon") and not float(value) >= 0:
            raise LlamaError(f"{key} is {value}; a norm needs a number from 0 on")
