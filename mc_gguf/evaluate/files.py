"""What identifies a model: the bytes of its file, or of all its shards.

Hashing 90 GB takes minutes, so the SHA-256 of a large file is kept in the user's cache, under the file's
path. It is believed as long as size, modification time, change time (which no program can set back) and
inode stay the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from mc_gguf.common.errors import McError
from mc_gguf.common.files import atomic_write, sha256_of
from mc_gguf.ggml.shards import shard_paths
from mc_gguf.runtime import upstream

MEMOISED_BYTES = 64 << 20  # smaller files are hashed each time
SETTLED_SECONDS = 2.0  # a file that has just changed may change again within the same time stamp


def files_of(model: Path) -> list[Path]:
    """The files of a model: itself, or all shards beside it (gguf-split's naming), in order."""
    paths = shard_paths(model)
    return paths if len(paths) == 1 else [path for path in paths if path.is_file()]


def model_file_bytes(model: Path) -> int:
    """Size of all of the model's files."""
    return sum(path.stat().st_size for path in files_of(model))


def model_sha256(model: Path) -> str:
    """SHA-256 of the model's file; of the shards' hashes where it has several."""
    hashes = [_sha256(path) for path in files_of(model)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _sha256(path: Path) -> str:
    before = _state(path)
    if before["bytes"] < MEMOISED_BYTES:
        return sha256_of(path)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    memo = upstream.cache_dir() / "hashes" / f"{name}.json"
    try:
        known = json.loads(memo.read_text())
        if known["state"] == before:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError):
        pass  # there is none, or it is damaged: hash the file
    found = sha256_of(path)
    settled = time.time() - max(before["changed_ns"], before["modified_ns"]) / 1e9 > SETTLED_SECONDS
    if settled and _state(path) == before:
        entry = {"path": str(path.resolve()), "state": before, "sha256": found}
        with suppress(OSError, McError), atomic_write(memo) as file:  # it only saves time
            file.write(json.dumps(entry).encode())
    return found


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
        "changed_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }
