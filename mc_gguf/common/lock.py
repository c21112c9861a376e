"""One process at a time works on an output. It holds a lock in the output's working directory."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

from mc_gguf.common.errors import McError
from mc_gguf.common.files import LOCK, check_output, workdir_path

log = logging.getLogger(__name__)

_reserved: ContextVar[frozenset[Path]] = ContextVar("reserved", default=frozenset())


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Holds the lock of `output` while the block runs. The working directory is made, and removed afterwards
    if nothing else is in it.

    Raises McError when another process, or another block of this one, is at work on the output, or when it
    is not a file that can be replaced.
    """
    check_output(output)
    directory = workdir_path(output)
    if directory.absolute() in _reserved.get():
        yield
        return
    made = [folder for folder in directory.parents if not folder.exists()]  # the innermost first
    lock = _acquire(output, directory)
    try:
        yield
    finally:
        _release(lock, directory)
        for folder in made:
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()


@contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Holds the lock of `output` over several steps: each may take it again inside the block, other threads
    and processes may not. Raises what output_lock() raises.
    """
    with output_lock(output):
        token = _reserved.set(_reserved.get() | {workdir_path(output).absolute()})
        try:
            yield
        finally:
            _reserved.reset(token)


def _acquire(output: Path, directory: Path) -> TextIO:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock = (directory / LOCK).open("a+")
        except FileNotFoundError:
            continue  # another process has just removed the directory
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock:
                raise McError(_busy(output, lock)) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("cannot lock %s (%s); start no second run for the same output", lock.name, error)
        if _is_current(lock):
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            return lock
        lock.close()


def _is_current(lock: TextIO) -> bool:
    """Whether `lock` still is the file in the directory, not one that another process has removed."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), Path(lock.name).stat())
    except FileNotFoundError:
        return False


def _release(lock: TextIO, directory: Path) -> None:
    """Let go. The lock is removed last: whoever finds it gone finds nothing else either."""
    with lock:
        if all(path.name == LOCK for path in directory.iterdir()):
            (directory / LOCK).unlink()
            with contextlib.suppress(OSError):  # another process has begun with a lock of its own
                directory.rmdir()


def _busy(output: Path, lock: TextIO) -> str:
    lock.seek(0)
    pid = lock.read().strip() or "unknown"
    return f"another process (PID {pid}) is writing {output}; wait for it or stop it"
