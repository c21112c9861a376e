"""llama_cpp on our checked libraries and with guarded functions (guarded.py). Importing this loads them.

    from mc_gguf.runtime.llama_library import llama_cpp, listen, reason

A call that fails is reported with llama.cpp's own words:

    listen()
    model = llama_cpp.llama_model_load_from_file(...)
    if not model:
        raise FormatError(reason())
"""

from __future__ import annotations

from mc_gguf.runtime.locate import use_in_llama_cpp

use_in_llama_cpp()  # before llama_cpp is imported: that is when it picks its libraries

import llama_cpp  # noqa: E402  after the line above

from mc_gguf.runtime import guarded  # noqa: E402
from mc_gguf.runtime.llama_log import ignored_override, listen, reason  # noqa: E402

ChatFormatter = guarded.ChatFormatter
LlamaModel = guarded.Model
check_tokens = guarded.check_tokens
is_whole = guarded.is_whole
to_path = guarded.to_path
to_utf8 = guarded.to_utf8

__all__ = [
    "ChatFormatter",
    "LlamaModel",
    "check_tokens",
    "ignored_override",
    "is_whole",
    "listen",
    "llama_cpp",
    "reason",
    "to_path",
    "to_utf8",
]

guarded.install()
