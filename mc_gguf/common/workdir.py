"""The directory beside an output in which a step keeps its work until the output is complete.

    with Workdir(Path("model.calib.safetensors"), {"model": ..., "seed": 0}) as work:
        with atomic_write(work.path("stats.safetensors")) as file:      # kept when the process is killed
            ...
        work.publish(work.path("result"))                               # the output appears, the work goes

Beside `model.calib.safetensors` that is `.model.calib.safetensors.partial/`:

    lock            held while a process is at work, with its process id
    identity.json   what everything else in the directory depends on
    ...             whatever the step keeps there

A run that was killed or interrupted leaves the directory, and the next run of the same identity continues
from it. Work of another identity is thrown away, with a word in the log. A run that ends before there is
anything to continue from leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from mc_gguf import __version__
from mc_gguf.common.errors import McError
from mc_gguf.common.files import (
    IDENTITY,
    LOCK,
    NO_ROOM,
    atomic_write,
    check_output,
    check_space,
    workdir_path,
)
from mc_gguf.common.lock import output_lock

_DISK_BLOCK_BYTES = 512  # the unit of st_blocks, on every file system

log = logging.getLogger(__name__)


class Workdir:
    """The working directory of one output; a context manager that holds its lock.

    `identity` is a JSON document of all that the work depends on; the version of mc_gguf is added. With
    `resume` False whatever an earlier run left is thrown away. Entering raises McError when another process
    is at work on the same output, or when the output is not a regular file; leaving raises one when the disk
    was full, and says that the work can be continued.
    """

    def __init__(self, output: Path, identity: Mapping[str, object], resume: bool = True) -> None:
        self.output, self.directory = output, workdir_path(output)
        self._identity, self._resume = identity, resume
        self._held = ExitStack()

    def __enter__(self) -> Workdir:
        with ExitStack() as held:
            held.enter_context(output_lock(self.output))
            held.callback(self._tidy)
            for path in self.directory.glob(".*.tmp"):  # of an atomic_write that was killed
                path.unlink()
            _claim(self.directory, self._identity, self._resume)
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            remedy = "raise ulimit -f" if error.errno == errno.EFBIG else "make room"
            again = "the same command continues" if self.directory.exists() else "run the same command again"
            raise McError(
                f"no room for the work on {self.output} ({error.strerror}): {remedy}; then {again}"
            ) from error

    def _tidy(self) -> None:
        """Leave nothing where there is nothing to continue from."""
        if not _holds_work(self.directory):
            _clear(self.directory)

    def path(self, name: str) -> Path:
        """Where to keep `name`."""
        return self.directory / name

    def part(self, name: str, identity: Mapping[str, object]) -> Path:
        """A folder inside for work that depends on more than the rest does; created, and emptied when what
        it holds is of another identity.
        """
        folder = self.path(name)
        folder.mkdir(exist_ok=True)
        _claim(folder, identity)
        return folder

    def check_space(self, n_bytes: int, folder: Path | None = None) -> None:
        """Raises McError when the disk is too small for `folder` (by default the whole directory) to grow to
        `n_bytes`.
        """
        there = _bytes_on_disk(folder or self.directory)
        check_space(self.output.parent, n_bytes - there, f"the work on {self.output.name}")

    def publish(self, file: Path) -> None:
        """`file`, which lies inside, becomes the output, and the directory is removed."""
        check_output(self.output)
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(self.output)
        _sync_folder(self.output.parent)  # before the work is gone from which it could be made again
        _clear(self.directory)


def work_bytes(*outputs: Path) -> int:
    """Bytes on the disk that earlier runs of these outputs left to continue from."""
    return sum(_bytes_on_disk(workdir_path(output)) for output in outputs)


def forget_work(output: Path) -> None:
    """Removes what an earlier run may have left to continue from. Raises McError while one is at work."""
    if workdir_path(output).exists():
        with Workdir(output, {}, resume=False):
            pass  # emptied on entering, and so removed on leaving


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Removes everything from a working directory, or a part of one, but `names`, its lock and identity."""
    for path in folder.iterdir():
        if path.name in (LOCK, IDENTITY, *names):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _clear(folder: Path) -> None:
    """Removes everything but the lock. The identity goes first: what a kill leaves then belongs to nobody."""
    (folder / IDENTITY).unlink(missing_ok=True)
    keep_only(folder, ())


def _claim(folder: Path, identity: Mapping[str, object], resume: bool = True) -> None:
    """Make `folder` one of this identity: as it is if it is one already, else empty."""
    wanted = json.loads(json.dumps({"mc_gguf": __version__, **identity}))
    found = _stored_identity(folder)
    if resume and found == wanted:
        if _holds_work(folder):
            log.info("continuing what an earlier run left in %s", folder)
        return
    if resume and _holds_work(folder):
        keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        why = f"made with another {', '.join(keys)}" if found else "it does not say what it is of"
        log.warning("not continuing the work in %s (%s); starting anew", folder, why)
    _clear(folder)
    with atomic_write(folder / IDENTITY) as file:
        file.write(json.dumps(wanted, indent=1, sort_keys=True).encode())


def _stored_identity(folder: Path) -> dict[str, object]:
    """Empty when there is none, or it is damaged."""
    try:
        found = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds_work(folder: Path) -> bool:
    """Whether there is a file of a step in it."""
    return any(path.name not in (LOCK, IDENTITY) and not path.is_dir() for path in folder.rglob("*"))


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * _DISK_BLOCK_BYTES for path in folder.rglob("*"))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)
