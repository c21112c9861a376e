"""The patched llama.cpp: build it once into the user's cache, find it, check it, load it.

    mc-gguf runtime build [--backend cpu|cuda|vulkan|metal] [--unpatched]

- source.py   the pinned source distribution: fetched through pip, checked, unpacked, patched
- builder.py  configured, compiled and installed; programs compiled against it
- locate.py   which runtime is installed where; loading with the check of the patch digest
"""

from __future__ import annotations

from mc_gguf.runtime.builder import build, build_tests, compile_program
from mc_gguf.runtime.locate import (
    BACKENDS,
    Runtime,
    check_struct,
    describe,
    find,
    info,
    library_path,
    load,
    load_ggml_base,
    require,
    use_in_llama_cpp,
)

__all__ = [
    "BACKENDS",
    "Runtime",
    "build",
    "build_tests",
    "check_struct",
    "compile_program",
    "describe",
    "find",
    "info",
    "library_path",
    "load",
    "load_ggml_base",
    "require",
    "use_in_llama_cpp",
]
