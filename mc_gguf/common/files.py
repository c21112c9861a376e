"""Files: written whole or not at all, never over an input, and hashed."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.common.units import format_size


def check_output(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises McError when `output` is something that must not be replaced: anything but a regular file, or
    one of `inputs` (the same file on the same device, whatever its name). An output that does not exist yet
    is always fine, and so are inputs that do not exist.
    """
    try:
        found = output.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise McError(f"{output} is {kind}, so it cannot be replaced; give the name of a file to write")
    for path in inputs:
        if path.exists() and os.path.samestat(found, path.stat()):
            raise McError(f"{output} is the same file as the input {path}; write to another file")


def check_space(
    folder: Path, n_bytes: int, purpose: str, remedy: str = "make room, or write to another disk"
) -> None:
    """Raises McError when the disk that holds `folder`, or will hold it, has less than `n_bytes` free. The
    message says what takes the space, `purpose`, and what to do, `remedy`.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise McError(
            f"{existing} has {format_size(free)} free, but {purpose} takes {format_size(n_bytes)}; {remedy}"
        )


@contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends without an error.

    It is written to a new file beside `path`, which is then renamed. `sync` waits until the bytes are on the
    disk; without it a power cut can leave an incomplete file, so the reader has to check what it reads.
    Raises McError when `path` exists and is not a regular file.
    """
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("xb") as file:  # a new file: it gets the permissions that the user's umask allows
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises ArtifactError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
