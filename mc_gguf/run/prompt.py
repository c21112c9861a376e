"""What the user types in a chat: messages of one line or of several."""

from __future__ import annotations

import sys
from typing import TextIO

from mc_gguf.common.errors import McError

BLOCK = '"""'


def read_message(out: TextIO) -> str | None:
    r"""A message from the user; None when the user leaves (Ctrl-D, Ctrl-C, or the end of the input).

    A line that ends with \ goes on in the next one, and what begins with three quotation marks goes on until
    there are three again.
    """
    line = _read_line("> ", out)
    if line is None:
        return None
    if line.lstrip().startswith(BLOCK):
        return _read_block(line.lstrip().removeprefix(BLOCK), out)
    lines = [line]
    while lines[-1].endswith("\\") and (line := _read_line(". ", out)) is not None:
        lines[-1] = lines[-1][:-1]
        lines.append(line)
    return "\n".join(lines)


def _read_block(line: str, out: TextIO) -> str:
    """The lines up to the end of the block, or of the input."""
    lines = [line]
    while not lines[-1].rstrip().endswith(BLOCK) and (following := _read_line(". ", out)) is not None:
        lines.append(following)
    return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")


def _read_line(prompt: str, out: TextIO) -> str | None:
    try:
        return as_text(input(prompt))
    except (KeyboardInterrupt, EOFError):
        out.write("\n")
        return None
    except UnicodeError as error:
        raise _unreadable() from error


def read_all() -> str:
    """All that is on stdin, without one newline at the end."""
    try:
        return as_text(sys.stdin.read().removesuffix("\n"))
    except UnicodeError as error:
        raise _unreadable() from error


def _unreadable() -> McError:
    return McError(f"stdin is not {sys.stdin.encoding}; set PYTHONIOENCODING to the encoding that it has")


def as_text(text: str) -> str:
    """UTF-8 that was read as another encoding, which keeps bytes that it does not know as surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:  # it was not UTF-8
        return text
