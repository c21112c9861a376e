"""The pinned upstream (llama-cpp-python with llama.cpp inside) and our patch set: places and hashes.

patches/UPSTREAM is the one place that holds the pin. This module reads it, computes the digest of the patch
set and knows the per-user cache. It fetches, builds and imports nothing.

Environment: MC_GGUF_CACHE moves the cache.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from mc_gguf.common.errors import McError, RuntimeBuildError

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
    path = Path(__file__).resolve().parent.parent / "_patches"
    if not (path / "UPSTREAM").is_file():
        raise RuntimeBuildError(f"the patch set is missing from {path}: reinstall mc-gguf")
    return path


def pin() -> Upstream:
    """patches/UPSTREAM, read. Raises RuntimeBuildError that names a missing key."""
    path = patches_dir() / "UPSTREAM"
    lines = [line.partition("=") for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]
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
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [path.parent / name for name in names if name and not name.startswith("#")]


def own_sources() -> list[Path]:
    """Our own C and C++ files, patches/src/**, which are compiled into the runtime; sorted."""
    return sorted(path for path in (patches_dir() / "src").rglob("*") if path.is_file())


def patchset_digest() -> str:
    """SHA-256 over the names and bytes of the patches, in order, and of our sources. The patched libllama
    returns it from mc_patchset().
    """
    digest = hashlib.sha256()
    for path in (*series(), *own_sources()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(patches_dir()).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def cache_dir() -> Path:
    """The user's cache: $MC_GGUF_CACHE, else mc_gguf in the platform's cache directory. It may not exist.

    Raises McError for a user without a home directory.
    """
    try:
        if override := os.environ.get("MC_GGUF_CACHE"):
            return Path(override).expanduser().resolve()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "mc_gguf"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mc_gguf"
    except RuntimeError as error:  # of pathlib
        raise McError("you have no home directory; set MC_GGUF_CACHE to a folder for mc-gguf") from error
