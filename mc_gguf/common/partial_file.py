"""An output file that is written piece by piece and survives being killed at any point.

The data goes to `.<name>.partial`, and after each piece a line with its CRC-32 goes to `.<name>.journal`,
whose first line says what is being written. Only pieces whose bytes still have the CRC count as done, so
nothing depends on the order in which the system writes its cache back. Neither file is the output: that
appears by a rename, at the end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mc_gguf.common.errors import McError

_READ_BYTES = 8 << 20


class PartialFile:
    """A file of `n_bytes` in the making; a context manager that keeps the two files when the block fails.

    `key` identifies everything that the bytes depend on: work of another key is thrown away.
    `pieces` are the (offset, length) of what write() will be called with, in order.
    """

    def __init__(self, output: Path, key: str, n_bytes: int, pieces: Sequence[tuple[int, int]]) -> None:
        self.output, self.key, self.n_bytes, self.pieces = output, key, n_bytes, pieces
        self.path = output.with_name(f".{output.name}.partial")
        self.journal_path = output.with_name(f".{output.name}.journal")
        self.done = 0
        self._crcs: list[int] = []

    def __enter__(self) -> PartialFile:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        # Neither is truncated on opening: another process may be at work on them.
        self._data = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._journal = os.fdopen(os.open(self.journal_path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()
        self._journal.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise McError(f"another process is writing {self.output}; wait for it") from None

    def start(self, header: bytes, resume: bool) -> int:
        """Prepare both files; returns how many pieces are already done."""
        self._crcs = self._trusted(header) if resume else []
        self.done = len(self._crcs)
        self._check_space()
        if not self.done:
            self._data.truncate(0)
            self._data.seek(0)
            self._data.write(header)
        self._data.truncate(self.n_bytes)
        self._data.flush()
        self._journal.truncate(0)
        self._journal.seek(0)
        self._journal.write("".join([f"{self.key}\n", *(f"{crc:08x}\n" for crc in self._crcs)]).encode())
        self._journal.flush()
        return self.done

    def _trusted(self, header: bytes) -> list[int]:
        """CRCs of the pieces that an earlier run wrote for the same key and that are still what it wrote."""
        lines = self._journal.read().decode("ascii", "replace").split("\n")
        if lines[0] != self.key or self._data.read(len(header)) != header:
            return []
        good = []
        for line, (offset, length) in zip(lines[1:-1], self.pieces, strict=False):
            if line != f"{self._crc(offset, length):08x}":
                break
            good.append(int(line, 16))
        return good

    def _crc(self, offset: int, length: int) -> int:
        """CRC-32 of a stored range (of what there is of it)."""
        self._data.seek(offset)
        crc = 0
        while length and (block := self._data.read(min(length, _READ_BYTES))):
            crc = zlib.crc32(block, crc)
            length -= len(block)
        return crc

    def _check_space(self) -> None:
        written = self.pieces[self.done - 1] if self.done else (0, 0)
        needed = self.n_bytes - sum(written)
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise McError(f"{self.output.parent} has {free} bytes free, the file needs {needed} more")

    def write(self, data: bytes) -> None:
        """Store the next piece."""
        offset, length = self.pieces[self.done]
        if len(data) != length:
            raise McError(f"piece {self.done} of {self.output} has {len(data)} bytes instead of {length}")
        self._data.seek(offset)
        self._data.write(data)
        self._data.flush()
        self._crcs.append(zlib.crc32(data))
        self._journal.write(f"{self._crcs[-1]:08x}\n".encode())
        self._journal.flush()
        self.done += 1

    def verify(self) -> None:
        """Read everything back from the file and compare. Raises McError."""
        os.fsync(self._data.fileno())
        for (offset, length), crc in zip(self.pieces, self._crcs, strict=True):
            if self._crc(offset, length) != crc:
                raise McError(f"{self.path} does not hold what was written at byte {offset}; check the disk")

    def publish(self) -> None:
        """The finished file gets its name; what was kept for resuming goes."""
        self.path.replace(self.output)
        self.journal_path.unlink()
