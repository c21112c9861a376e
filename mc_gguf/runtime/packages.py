"""gguf-py and the Hugging Face converter of the pinned llama.cpp source, imported from nowhere else.

They lie in the source tree that is kept with an installed runtime.

Environment: MC_GGUF_SOURCE (for developers) names a llama.cpp tree to import from instead.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.runtime.locate import find
from mc_gguf.runtime.upstream import BUILD_HINT


def source_dir() -> Path:
    """The llama.cpp source tree that an installed runtime was built from (has gguf-py/ and conversion/).

    Our patches touch neither, so the tree of the unpatched build serves too. Raises RuntimeBuildError
    without one.
    """
    if override := os.environ.get("MC_GGUF_SOURCE"):
        tree = Path(override)
        if not (tree / "gguf-py").is_dir():
            raise RuntimeBuildError(
                f"MC_GGUF_SOURCE is {tree}, which is no llama.cpp tree: it has no gguf-py; unset the variable"
            )
        return tree
    for patched in (True, False):
        found = find(patched=patched)
        if found and (found.source_dir / "gguf-py").is_dir():
            return found.source_dir
    raise RuntimeBuildError(f"the llama.cpp runtime is not built for this version of mc-gguf; {BUILD_HINT}")


def load_gguf() -> ModuleType:
    """gguf-py of the pinned source, imported. PyPI's package of the same version number lacks what the
    converter needs.
    """
    return _import_from("gguf", source_dir() / "gguf-py")


def load_conversion() -> ModuleType:
    """llama.cpp's converter package `conversion`, imported, and with it torch and transformers."""
    load_gguf()
    return _import_from("conversion", source_dir())


def _import_from(name: str, folder: Path) -> ModuleType:
    """Import package `name` from `folder`. Raises RuntimeBuildError when another one is imported already."""
    with _first_on_path(folder):
        module = importlib.import_module(name)
    origin = Path(module.__file__ or "").resolve().parent.parent
    if origin != folder.resolve():
        raise RuntimeBuildError(
            f"{name} is already imported from {origin}, but mc-gguf needs the one in {folder}: "
            f"import mc_gguf's modules before {name}"
        )
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Put `folder` on sys.path while importing, and no longer: the tree's other folders (tests, src, common)
    must not shadow anything later.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
