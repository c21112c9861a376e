"""What Llama opens, before it does: the file, the options with their defaults, and errors about a context."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc_gguf.common.downloads import HEAD_BYTES, placeholder
from mc_gguf.common.errors import FormatError, LlamaError, McError, SourceError
from mc_gguf.common.machine import usable_cores
from mc_gguf.ggml.gguf_file import MAGIC, read_header
from mc_gguf.ggml.shards import check_first
from mc_gguf.run.arguments import check_options, odd_epsilon, to_seed

CONTEXT_STEP = 256  # tokens


def to_file(parameter: str, path: Any) -> Path:
    """`path` as a Path, after check_file(). Raises LlamaError for what is no path."""
    if not isinstance(path, str | bytes | os.PathLike) or not path:
        raise LlamaError(f"{parameter} must be the path of a GGUF, not {path!r}")
    found = Path(os.fsdecode(path))
    check_file(found)
    return found


def check_file(path: Path) -> None:
    """Raises SourceError unless `path` is a readable file, FormatError unless it begins like a GGUF,
    and when it is a shard other than the first, or others are missing.
    """
    try:
        path.stat()
    except FileNotFoundError as error:
        raise SourceError(
            f"{path}: no such file; give the path of a GGUF, for instance one made by mc-gguf convert"
        ) from error
    except (OSError, ValueError) as error:  # a name that is too long, has a zero, or lies in a closed folder
        raise SourceError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if path.is_dir():
        raise SourceError(
            f"{path} is a directory; give the path of a GGUF, for instance one made by mc-gguf convert"
        )
    if not path.is_file():
        raise SourceError(f"{path} is not a regular file; give the path of a GGUF")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if what := placeholder(head):
        raise FormatError(f"{path} {what}")
    if not head.startswith(MAGIC):
        raise FormatError(f"{path} is not a GGUF: it begins with {head[:4]!r}, not {MAGIC!r}")
    check_first(path)


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, checked, with our defaults for those that are not given."""
    checked = {name: value for name, value in options.items() if value is not None}
    for name in ("n_threads", "n_threads_batch"):
        checked[name] = checked.get(name) or (checked.get("n_threads") or usable_cores())
    check_options(checked)
    checked["seed"] = to_seed(checked.get("seed"))
    if checked.get("n_ctx"):  # llama_cpp allocates n_batch rows of logits
        checked["n_batch"] = min(
            checked.get("n_batch", 512), -(-checked["n_ctx"] // CONTEXT_STEP) * CONTEXT_STEP
        )
    return checked


def no_context(path: Path, why: str, options: Mapping[str, Any]) -> McError:
    """The error for a context that llama.cpp could not make."""
    if "GGML_ASSERT" not in why:  # memory that is missing asserts nothing
        return LlamaError(
            f"{path}: llama.cpp cannot make the context ({why}); there may be too little memory, of which a "
            "smaller context needs less",
            parameter="ctx",
        )
    if options.get("embedding") and options.get("n_ubatch", 512) < options.get("n_batch", 512):
        return LlamaError(f"{path}: embeddings may need an n_ubatch as large as n_batch ({why})")
    given = options.get("kv_overrides") or {}
    if key := odd_epsilon(given):
        return LlamaError(f"kv_overrides: {key} is {given[key]}; a norm needs a number from 0 on")
    with contextlib.suppress(McError):
        stored = {key: found.value for key, found in read_header(path).kv.items()}
        if key := odd_epsilon(stored):
            return FormatError(f"{path}: {key} is {stored[key]}; a norm needs a number from 0 on")
    return FormatError(f"{path}: llama.cpp cannot compute with such a model ({why})")
