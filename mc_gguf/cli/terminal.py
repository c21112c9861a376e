"""The standard streams, made such that nothing that is read from or written to them can end a program."""

from __future__ import annotations

import codecs
import os
import sys
from io import TextIOWrapper

_ERRORS = "mc_gguf.printable"


def prepare() -> None:
    """What a stream cannot encode is written as an escape, such as \\xe9, and the bytes of a file name as
    they are. Bytes on stdin that are no text become surrogates, which are refused where the text is used.

    Where a stream is closed, its number belongs to the next file that is opened, and what a library writes
    to stdout would end up in it. So these numbers are taken. sys.stdin stays None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    codecs.register_error(_ERRORS, _printable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    if isinstance(sys.stdin, TextIOWrapper):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of codecs: bytes that are in a text as surrogates, else an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)
