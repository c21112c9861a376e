"""`mc-gguf chat` in a terminal of its own: what the keys do."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.native

CTRL_C, CTRL_D = b"\x03", b"\x04"
TIMEOUT_S = 40


class Terminal:
    """A program in a pseudo-terminal, whose output is awaited piece by piece."""

    def __init__(self, *arguments: object) -> None:
        words = [sys.executable, "-m", "mc_gguf", *map(str, arguments)]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shells ignore in what they run with &
            os.execve(sys.executable, words, os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"})
        self.seen = b""

    def wait_for(self, pattern: bytes) -> None:
        """Read until the output since the last call has what the regex `pattern` matches."""
        end = time.monotonic() + TIMEOUT_S
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern!r} is not in {self.seen!r}"
            self.seen += os.read(self.fd, 4096)
        self.seen = self.seen[found.end() :]

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def exit_code(self) -> int:
        end = time.monotonic() + TIMEOUT_S
        while True:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the program does not end"
            try:
                os.read(self.fd, 4096)
            except OSError:  # its end
                break
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(tiny_gguf: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", tiny_gguf, "--ctx", 1024, "--threads", 1, "--seed", 1)
    yield opened
    opened.close()


def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(terminal: Terminal) -> None:
    terminal.wait_for(rb"> ")
    for _ in range(2):
        terminal.type(b"one two\r")
        terminal.wait_for(rb"one two\r\n.{20}")
        terminal.type(CTRL_C)
        terminal.wait_for(rb"\(stopped\)\r\n> ")
    time.sleep(1)  # a signal that comes before readline waits for keys is noticed at the next key only
    terminal.type(CTRL_C)
    assert terminal.exit_code() == 0


def test_several_lines_and_ctrl_d(terminal: Terminal) -> None:
    terminal.wait_for(rb"> ")
    terminal.type(b'"""one\r')
    terminal.wait_for(rb"\. ")
    terminal.type(b'two"""\r')
    terminal.wait_for(rb"\r\n> ")
    terminal.type(b"/nothing\r")
    terminal.wait_for(rb"There is no /nothing\..*> ")
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
