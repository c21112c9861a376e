"""Llama: llama_cpp.Llama on the patched runtime. Every method of it works.

    from mc_gguf import Llama
    llm = Llama("model.gguf", n_ctx=2048)
    print(llm("Once upon a time", max_tokens=32)["choices"][0]["text"])

Importing this module loads the runtime and checks its patch set; RuntimeBuildError says what to run when
that fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from pathlib import Path
from typing import Any

from mc_gguf import runtime
from mc_gguf.cores import usable_cores
from mc_gguf.errors import FormatError, SourceError

runtime.use_in_llama_cpp()  # before llama_cpp is imported: that is when it picks its libraries

import llama_cpp  # noqa: E402  after the line above
from llama_cpp._logger import logger  # noqa: E402

GGUF_MAGIC = b"GGUF"
LOG_WARN, LOG_ERROR, LOG_CONTINUED = 3, 4, 5  # enum ggml_log_level
KEPT_LINES = 8
CONTEXT_STEP = 256  # tokens

_problems: list[str] = []  # the latest errors and warnings of llama.cpp, oldest first


class Llama(llama_cpp.Llama):
    """A llama_cpp.Llama that is quiet and uses all cores by default.

    model_path: a GGUF file, plain or mixed-expert. All keyword arguments are llama_cpp.Llama's. Raises
    SourceError when there is no such file and FormatError, with llama.cpp's reason, when it cannot be
    loaded.
    """

    _stack = contextlib.ExitStack()  # so that __del__ works on an object whose __init__ raised early

    def __init__(self, model_path: str | Path, *, verbose: bool = False, **options: Any) -> None:
        path = Path(model_path)
        check_file(path)
        if not options.get("n_threads"):
            options["n_threads"] = usable_cores()
        if not options.get("n_threads_batch"):
            options["n_threads_batch"] = options["n_threads"]
        if wanted := options.get("n_ctx"):
            # llama.cpp rounds up by itself, but llama_cpp sizes its arrays by the number that it was given.
            options["n_ctx"] = -(-wanted // CONTEXT_STEP) * CONTEXT_STEP
        _problems.clear()
        llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
        try:
            super().__init__(str(path), verbose=verbose, **options)
        except ValueError as error:
            if not str(error).startswith(
                "Failed to "
            ):  # those are about the file, the others about an argument
                raise
            raise FormatError(f"{path}: {_reason() or error}") from error


def check_file(path: Path) -> None:
    """SourceError when `path` is no readable file, FormatError when it does not begin like a GGUF."""
    if not path.exists():
        raise SourceError(
            f"{path}: no such file; give the path of a GGUF, for instance one made by mc-gguf convert"
        )
    if path.is_dir():
        raise SourceError(
            f"{path} is a directory; give the path of a GGUF, for instance one made by mc-gguf convert"
        )
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise FormatError(f"{path} is not a GGUF: it begins with {magic!r}, not {GGUF_MAGIC!r}")


def _reason() -> str:
    """llama.cpp's own words on why it failed: the first of the last errors, without the function's name."""
    errors = [line for line in _problems if line]
    return errors[0].split(": ", 1)[-1] if errors else ""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama_cpp has no type information
def _log_callback(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    """Keeps errors for _reason, prints all when verbose.

    Replaces llama_cpp's, whose level numbers are not the library's: it prints warnings and drops errors.
    """
    line = text.decode("utf-8", "replace")
    if level == LOG_ERROR:
        _problems.append(line.strip())
        del _problems[:-KEPT_LINES]
    if logger.level <= logging.DEBUG:
        sys.stderr.write(line)
