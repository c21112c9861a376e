"""The patched llama.cpp: built once into the user's cache, found, checked and loaded.

    mc-gguf runtime build [--backend cpu|cuda|vulkan|metal] [--unpatched]

    upstream.py       the pin (patches/UPSTREAM), our patch set and its digest, the user's cache
    fetch.py          the pinned source distribution: downloaded through pip, checked, unpacked, patched
    builder.py        source -> cmake -> an installed runtime; programs compiled against one
    shell.py          a build's commands and their log
    locate.py         which runtimes are installed; loading one, after a check of its patch digest
    facts.py          what `mc-gguf runtime info` prints
    packages.py       gguf-py and the Hugging Face converter of the pinned source
    llama_library.py  llama_cpp on the checked libraries, and llama.cpp's own words when it fails
    vocabulary.py     llama.cpp's tokenizer of a GGUF

This module offers what it takes to find and load a runtime. Building is in builder.py, which is imported by
whoever builds.
"""

from __future__ import annotations

from mc_gguf.runtime.locate import (
    BACKENDS,
    Runtime,
    check_struct,
    find,
    library_path,
    load,
    load_ggml_base,
    require,
    use_in_llama_cpp,
)

__all__ = [
    "BACKENDS",
    "Runtime",
    "check_struct",
    "find",
    "library_path",
    "load",
    "load_ggml_base",
    "require",
    "use_in_llama_cpp",
]
