"""llama_cpp on our checked libraries, which importing this module loads.

    from mc_gguf.runtime.llama_library import llama_cpp, listen, reason

It keeps llama.cpp's latest error messages, so that a failed call can be reported with llama.cpp's own words:

    listen()
    model = llama_cpp.llama_model_load_from_file(...)
    if not model:
        raise FormatError(reason())
"""

from __future__ import annotations

import ctypes
import logging
import sys

from mc_gguf.runtime.locate import use_in_llama_cpp

use_in_llama_cpp()  # before llama_cpp is imported: that is when it picks its libraries

import llama_cpp  # noqa: E402  after the line above
from llama_cpp._internals import LlamaModel  # noqa: E402
from llama_cpp._logger import logger  # noqa: E402

__all__ = ["LlamaModel", "listen", "llama_cpp", "reason"]

LOG_ERROR = 4  # enum ggml_log_level
KEPT_LINES = 8

_errors: list[str] = []  # llama.cpp's latest error messages, the oldest first


def listen() -> None:
    """Forget earlier errors, and receive llama.cpp's messages from now on."""
    _errors.clear()
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))


def reason() -> str:
    """Why llama.cpp failed, in its own words: the first of the errors that it kept, without the name of the
    function that reported it. Empty when there was none.
    """
    return _errors[0].split(": ", 1)[-1] if _errors else ""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama_cpp has no type information
def _log_callback(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    """Keep errors for reason(), and print everything when llama_cpp is verbose.

    This replaces llama_cpp's own callback, whose level numbers are not the library's: it prints warnings and
    drops errors.
    """
    line = text.decode("utf-8", "replace")
    if level == LOG_ERROR and line.strip():
        _errors.append(line.strip())
        del _errors[:-KEPT_LINES]
    if logger.level <= logging.DEBUG:
        sys.stderr.write(line)
