"""llama.cpp's messages: errors are kept for reason(), and everything is printed when llama_cpp is verbose.

Import it from mc_gguf.runtime.llama_library, which sees to it that llama_cpp loads the right libraries.
"""

from __future__ import annotations

import ctypes
import logging
import sys

import llama_cpp
from llama_cpp._logger import logger, set_verbose

LOG_ERROR = 4  # enum ggml_log_level
LOG_WARN = 3
KEPT_LINES = 8
_OVERRIDE = "Bad metadata override type for key "

set_verbose(False)  # until somebody asks for it, as llama_cpp.Llama does
_errors: list[str] = []  # llama.cpp's latest error messages, the oldest first
_overrides: list[str] = []  # what it said of metadata overrides that it ignored


def listen() -> None:
    """Forget earlier errors, and receive llama.cpp's messages from now on."""
    _errors.clear()
    _overrides.clear()
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))


def reason() -> str:
    """Why llama.cpp failed, in its own words: the first of the errors that it kept, without the name of the
    function that reported it. Empty when there was none.
    """
    return _errors[0].split(": ", 1)[-1] if _errors else ""


def ignored_override() -> str:
    """What llama.cpp said of a metadata override of the wrong type; empty when there was none."""
    return f"{_overrides[0]}; give that type" if _overrides else ""


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
    if level == LOG_WARN and _OVERRIDE in line:
        _overrides.append(line.strip().split(_OVERRIDE, 1)[1])
    if logger.level <= logging.DEBUG:
        sys.stderr.write(line)
