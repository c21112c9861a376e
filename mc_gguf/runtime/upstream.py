"""The pinned upstream (llama-cpp-python with llama.cpp inside) and our patch set: places and hashes.

patches/UPSTREAM is the one place that holds the pin. This module reads it, computes the digest of the patch
set, knows the per-user cache, and imports gguf-py and the HF converter from the pinned llama.cpp source,
never from elsewhere. It builds nothing: mc_gguf.runtime does.

Environment: MC_GGUF_CACHE moves the cache; MC_GGUF_SOURCE (for developers) names a llama.cpp tree to import
from.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

from mc_gguf.errors import RuntimeBuildError

BUILD_HINT = "run: mc-gguf runtime build"


@dataclass(frozen=True)
class Upstream:
    """The pin: what is downloaded, its hash, and the git trees before and after our patches."""

    package: str
    version: str
    sdist_sha256: str
    commit: str
    tree: str
    patched_tree: str

    @property
    def sdist_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def patches_dir() -> Path:
    """The directory with UPSTREAM, series and the patches; in the repository a link to its patches/."""
    path = Path(__file__).resolve().parent / "_patches"
    if not (path / "UPSTREAM").is_file():
        raise RuntimeBuildError(f"the patch set is missing from {path}: reinstall mc-gguf")
    return path


def pin() -> Upstream:
    """patches/UPSTREAM, read. Raises RuntimeBuildError that names a missing key."""
    path = patches_dir() / "UPSTREAM"
    lines = [line.partition("=") for line in path.read_text().splitlines() if "=" in line]
    values = {key.strip(): value.strip() for key, _, value in lines}
    missing = [field.name for field in fields(Upstream) if field.name not in values]
    if missing:
        raise RuntimeBuildError(f"{path} lacks {', '.join(missing)}: reinstall mc-gguf")
    return Upstream(**{field.name: values[field.name] for field in fields(Upstream)})


def series() -> list[Path]:
    """The patches in the order in which they are applied: the lines of patches/series."""
    path = patches_dir() / "series"
    if not path.is_file():
        return []
    names = [line.strip() for line in path.read_text().splitlines()]
    return [path.parent / name for name in names if name and not name.startswith("#")]


def own_sources() -> list[Path]:
    """Our own C and C++ files, patches/src/**, which are compiled into the runtime; sorted, maybe none."""
    return sorted(path for path in (patches_dir() / "src").rglob("*") if path.is_file())


def patchset_digest() -> str:
    """SHA-256 over names and bytes of the patches, in order, and of our sources: mc_patchset() returns it."""
    digest = hashlib.sha256()
    for path in (*series(), *own_sources()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(patches_dir()).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def cache_dir() -> Path:
    """The per-user cache: $MC_GGUF_CACHE, else mc_gguf in the platform's cache directory. Not created here.
    """
    if override := os.environ.get("MC_GGUF_CACHE"):
        return Path(override).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mc_gguf"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mc_gguf"


def source_dir() -> Path:
    """The llama.cpp source tree that an installed runtime was built from (has gguf-py/ and conversion/).

    Our patches touch neither, so the tree of the unpatched build serves too. Raises RuntimeBuildError
    without one.
    """
    from mc_gguf.runtime import find  # runtime imports this module

    if override := os.environ.get("MC_GGUF_SOURCE"):
        tree = Path(override)
        if not (tree / "gguf-py").is_dir():
            raise RuntimeBuildError(
                f"MC_GGUF_SOURCE is {tree}, which is no llama.cpp tree: it has no gguf-py"
            )
        return tree
    for patched in (True, False):
        found = find(patched=patched)
        if found and (found.source_dir / "gguf-py").is_dir():
            return found.source_dir
    raise RuntimeBuildError(f"the llama.cpp runtime is not built for this version of mc-gguf; {BUILD_HINT}")


def load_gguf() -> ModuleType:
    """gguf-py of the pinned source, imported. PyPI's gguf of the same version number lacks what conversion/
    needs.
    """
    return _import_from("gguf", source_dir() / "gguf-py")


def load_conversion() -> ModuleType:
    """llama.cpp's HF converter package `conversion`, imported (it imports torch and transformers)."""
    load_gguf()
    return _import_from("conversion", source_dir())


def _import_from(name: str, folder: Path) -> ModuleType:
    """Imports package `name` from `folder`; RuntimeBuildError when another one is already imported."""
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
    """Only during the import: the tree's other folders (tests, src, common) must not shadow anything later.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
