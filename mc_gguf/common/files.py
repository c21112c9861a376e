"""Files: written whole or not at all, never over an input, and hashed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mc_gguf.common.downloads import HEAD_BYTES, placeholder
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.common.units import format_size

# Beside NAME lie .NAME.partial/ and, while they are written, .NAME.0123456789abcdef.tmp.
_NAME_BYTES = 255 - len("..0123456789abcdef.tmp")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")  # of llama.cpp
# What mc_gguf writes beside a model that it converts in its own folder.
_OURS = (".gguf", ".calib.safetensors", ".plan.json", ".html")
LOCK, IDENTITY = "lock", "identity.json"  # one of which is in every working directory
_MAX_SHARDS = 10_000
# The disk, the user's quota, or the size that a file may have is used up.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def check_output(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises McError when `output` cannot be written, or must not be replaced.

    What must not be replaced is anything but a regular file, and one of `inputs`, or a file in a folder among
    them (the same file on the same device, whatever its name). Inputs that do not exist are fine.
    """
    if str(output) in ("", "."):
        raise McError("the name of the output is empty; give the name of a file to write")
    if (length := len(os.fsencode(output.name))) > _NAME_BYTES:
        raise McError(
            f"the name {output.name[:40]}... has {length} bytes; at most {_NAME_BYTES} leave room "
            "for the names of working files"
        )
    inputs = tuple(inputs)
    try:
        found = output.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise McError(f"{output} cannot be written: {error.strerror}") from error
    else:
        _check_replaced(output, found, inputs)
    _check_folder(output)
    _check_workdir(output, inputs)


def _check_replaced(output: Path, found: os.stat_result, inputs: Iterable[Path]) -> None:
    """Raises McError unless the file that is there may be replaced."""
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise McError(f"{output} is {kind}, so it cannot be replaced; give the name of a file to write")
    for path in inputs:
        files = _files_of_model(path) if path.is_dir() else (path,)
        if any(os.path.samestat(found, file.stat()) for file in files if file.exists()):
            where = "in the input" if path.is_dir() else "the same file as the input"
            raise McError(f"{output} is {where} {path}; write to another file")


def _files_of_model(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.endswith(_OURS))


def check_shards(output: Path) -> None:
    """Raises McError for the name of a shard whose siblings are there: it would belong to them."""
    if not (name := SHARD_NAME.fullmatch(output.name)):
        return
    for i in range(min(int(name["count"]), _MAX_SHARDS)):
        other = output.with_name(f"{name['stem']}-{i + 1:05}-of-{name['count']}.gguf")
        if other.name != output.name and other.exists():
            raise McError(f"{output} would be a shard of the model of {other}; write to another file")


def workdir_path(output: Path) -> Path:
    """The working directory of `output` (workdir.py), whether it exists or not."""
    return output.with_name(f".{output.name}.partial")


def _check_workdir(output: Path, inputs: Iterable[Path]) -> None:
    """Raises McError when the working directory would be something else than mc_gguf's, or has an input."""
    folder = workdir_path(output)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise McError(f"{folder}, where the work on {output} is kept, is no folder; remove it")
    if not folder.is_dir():
        return
    is_ours = any((folder / name).exists() for name in (LOCK, IDENTITY))
    if not is_ours and any(folder.iterdir()):
        raise McError(f"{folder}, where the work on {output} is kept, has files of others; move it away")
    for path in inputs:
        if path.resolve().is_relative_to(folder.resolve()):
            raise McError(f"{path} lies where the work on {output} is kept; write to another file")


def _check_folder(output: Path) -> None:
    """Raises McError unless files can be made in the folder of `output`, or it can be made."""
    folder = output.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise McError(f"{output} cannot be written: {folder} is not a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise McError(f"{output} cannot be written: you may not write into {folder}")


def check_folder(folder: Path | None) -> None:
    """Raises McError when `folder` is there and no folder."""
    if folder is not None and folder.exists() and not folder.is_dir():
        raise McError(f"{folder} is not a directory")


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


def check_file_size(path: Path, n_bytes: int) -> None:
    """Raises McError when this process may not write a file of `n_bytes` (`ulimit -f`)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and n_bytes > limit:
        raise McError(
            f"{path} will have {format_size(n_bytes)}, but files may have {format_size(limit)} here; "
            "raise the limit (ulimit -f)"
        )


@contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends without an error.

    It is written to a new file beside `path`, which is then renamed. `sync` waits until the bytes are on the
    disk; without it a power cut can leave an incomplete file, so the reader has to check what it reads.
    Raises McError when `path` exists and is not a regular file, and an OSError that names `path` when there
    is no room for it.
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            error.filename = os.fspath(path)
        raise


def kind_of(path: Path) -> str:
    """What is in a file or folder, in words: "a GGUF", "a safetensors file", "JSON", ... Raises OSError."""
    if path.is_dir():
        return "a directory"
    if path.exists() and not path.is_file():
        return "no regular file"
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"GGUF"):
        return "a GGUF"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "a safetensors file"
    if (found := placeholder(head)) is not None:
        return found.removeprefix("is ").split(";")[0]
    return "JSON" if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else "a file of another kind"


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
