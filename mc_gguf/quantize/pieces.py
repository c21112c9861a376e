"""A large file that is written piece by piece and survives being killed at any point.

The bytes go to `data`, and after each piece a line with its CRC-32 goes to `journal`. Only pieces whose bytes
still have that CRC count as done, so nothing depends on the order in which the system writes its cache back.
Both files lie in a folder that belongs to one file in the making (Workdir.part).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mc_gguf.common.errors import McError

_READ_BYTES = 8 << 20


class Pieces:
    """A file of `n_bytes` in the making in `folder`: `header`, then `pieces`, the (offset, length) of what
    write() will be called with, in order.

    A context manager that keeps what is done when its block fails. `done` counts the pieces that are there:
    after entering, those of an earlier run.
    """

    def __init__(self, folder: Path, header: bytes, n_bytes: int, pieces: Sequence[tuple[int, int]]) -> None:
        self.path, self._journal_path = folder / "data", folder / "journal"
        self.header, self.n_bytes, self.pieces = header, n_bytes, pieces
        self._crcs: list[int] = []

    @property
    def done(self) -> int:
        return len(self._crcs)

    def __enter__(self) -> Pieces:
        for path in (self.path, self._journal_path):
            path.touch()
        self._data, self._journal = self.path.open("r+b"), self._journal_path.open("r+b")
        self._crcs = self._trusted()
        if not self.done:
            self._data.truncate(0)
            self._data.seek(0)
            self._data.write(self.header)
        self._data.truncate(self.n_bytes)
        self._data.flush()
        self._journal.truncate(0)
        self._journal.seek(0)
        self._journal.write("".join(_line(crc) for crc in self._crcs).encode())
        self._journal.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()
        self._journal.close()
        if error is not None and not self.done:  # nothing to continue from
            self.path.unlink(missing_ok=True)
            self._journal_path.unlink(missing_ok=True)

    def _trusted(self) -> list[int]:
        """CRCs of the pieces that an earlier run wrote and that are still what it wrote."""
        lines = self._journal.read().decode("ascii", "replace").splitlines(keepends=True)
        if self._data.read(len(self.header)) != self.header:
            return []
        good: list[int] = []
        for line, (offset, length) in zip(lines, self.pieces, strict=False):
            crc = self._crc(offset, length)
            if line != _line(crc):
                break
            good.append(crc)
        return good

    def _crc(self, offset: int, length: int) -> int:
        """CRC-32 of a stored range (of what there is of it)."""
        self._data.seek(offset)
        crc = 0
        while length and (block := self._data.read(min(length, _READ_BYTES))):
            crc = zlib.crc32(block, crc)
            length -= len(block)
        return crc

    def write(self, data: bytes) -> None:
        """Store the next piece."""
        offset, length = self.pieces[self.done]
        if len(data) != length:
            raise McError(f"piece {self.done} of {self.path} has {len(data)} bytes instead of {length}")
        self._data.seek(offset)
        self._data.write(data)
        self._data.flush()
        crc = zlib.crc32(data)
        self._journal.write(_line(crc).encode())
        self._journal.flush()
        self._crcs.append(crc)

    def verify(self) -> None:
        """Read everything back from the disk and compare. Raises McError."""
        os.fsync(self._data.fileno())
        for (offset, length), crc in zip(self.pieces, self._crcs, strict=True):
            if self._crc(offset, length) != crc:
                raise McError(f"{self.path} does not hold what was written at byte {offset}; check the disk")


def _line(crc: int) -> str:
    """The journal's line for a piece."""
    return f"{crc:08x}\n"
