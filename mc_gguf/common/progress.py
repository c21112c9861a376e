"""A progress line on stderr: percent, elapsed and remaining time.

    with progress("calibrate", total=32, unit="layer") as bar:
        for layer in layers:
            ...
            bar.advance(note=f"layer {layer}")

On a terminal one line is redrawn, ten times per second at most; elsewhere a line is printed about every 10 %.
It needs no thread and no dependency. MC_GGUF_QUIET=1 or quiet=True silences it. A program that shows
progress in its own way listens to it instead:

    with listening(lambda state: window.show(state.label, state.done, state.total)):
        ...
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TextIO

REDRAW_SECONDS = 0.1
LINE_SHARE = 0.1  # without a terminal: one line for each such share of the work


@dataclass(frozen=True)
class ProgressState:
    """What a listener is told: `done` of `total` units are done (total 0: not known yet); `note` says what is
    being worked on.
    """

    label: str
    done: float
    total: float
    unit: str
    note: str


ProgressListener = Callable[[ProgressState], None]
_listener: ContextVar[ProgressListener | None] = ContextVar("progress_listener", default=None)


@contextmanager
def listening(listener: ProgressListener | None) -> Iterator[None]:
    """Whatever makes progress in the block tells `listener`, and draws nothing. None changes nothing."""
    if listener is None:
        yield
        return
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """How much of `total` is done; a total of 0 means that it is not known yet. Made by progress()."""

    def __init__(self, label: str, total: float, unit: str, stream: TextIO, quiet: bool) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self._listener = _listener.get()
        self._stream, self._quiet = stream, quiet or self._listener is not None
        self._tty = stream.isatty()
        self._start = time.monotonic()
        self._drawn_at = float("-inf")
        self._drawn_share = -1.0
        self._open_line = False

    def advance(self, amount: float = 1, note: str = "") -> None:
        """`amount` more units are done; `note` says what the current one is."""
        self.update(self.done + amount, note=note)

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """`done` units of `total` are done; both are absolute, for work that counts on its own."""
        self.done = done
        self.total = self.total if total is None else total
        if self._listener:
            self._listener(ProgressState(self.label, self.done, self.total, self.unit, note))
        if self._is_due():
            self._draw(note)

    def say(self, text: str) -> None:
        """Print a line of its own, between the states of the bar."""
        if not self._quiet:
            self._write(("\r\x1b[K" if self._open_line else "") + text + "\n")
            self._open_line = False

    def _write(self, text: str) -> None:
        """Progress that cannot be shown (the disk behind stderr is full, its reader gone) ends no work."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._quiet = True

    def close(self, note: str = "") -> None:
        """The last state stays on the screen, ended by a newline."""
        if not self._quiet and (self._tty or self._drawn_share < self._share):
            self._draw(note)
        if self._open_line:
            self._write("\n")
            self._open_line = False

    @property
    def _share(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0

    def _is_due(self) -> bool:
        if self._quiet:
            return False
        if self._tty:
            return time.monotonic() - self._drawn_at >= REDRAW_SECONDS
        return self._drawn_share < 0 or self._share - self._drawn_share >= LINE_SHARE - 1e-9

    def _draw(self, note: str) -> None:
        self._drawn_at = time.monotonic()
        self._drawn_share = self._share
        text = self._text(self._drawn_at - self._start, note)
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + text[:width] + "\x1b[K")
            self._open_line = True
        else:
            self._write(text + "\n")

    def _text(self, elapsed_s: float, note: str) -> str:
        parts = [f"{self.label}: {100 * self._share:3.0f} %"]
        if self.total:
            parts.append(f"{self.done:g}/{self.total:g} {self.unit}".rstrip())
        parts.append(f"elapsed {clock(elapsed_s)}")
        if 0 < self._share < 1:
            parts.append(f"left {clock(elapsed_s / self._share - elapsed_s)}")
        if note:
            parts.append(note)
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def silenced(quiet: bool) -> bool:
    """Whether nothing is printed: `quiet` asks for that, or MC_GGUF_QUIET is set to anything but 0."""
    return quiet or os.environ.get("MC_GGUF_QUIET", "") not in ("", "0")


@contextmanager
def progress(label: str, total: float = 0, unit: str = "", quiet: bool = False) -> Iterator[Progress]:
    """A Progress for the length of the block."""
    bar = Progress(label, total, unit, sys.stderr, silenced(quiet))
    try:
        yield bar
    finally:
        bar.close()
