"""The text in a user's file, which must be UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path

from mc_gguf.common.errors import SourceError

_OTHER_ENCODINGS = {  # by their byte order mark; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_bytes(path: Path, what: str = "the text") -> bytes:
    """The bytes of the file, which is `what`. Raises SourceError when it cannot be read."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise SourceError(f"{what} {path} is not a regular file; write it into one first")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {what} {path}: {error.strerror}") from error


def decode(data: bytes, path: Path, what: str = "the text") -> str:
    """`data`, which is the content of `path`, as text, without a byte order mark. Raises SourceError, which
    says what to do, when it is not UTF-8.
    """
    for mark, name in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise SourceError(f"{what} {path} is {name}; {_convert(name)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{what} {path} is not UTF-8 (see byte {error.start})"
        raise SourceError(f"{where}; {_convert('LATIN1')}, if that is what it is") from error


def _convert(encoding: str) -> str:
    return f"convert it, for instance with: iconv -f {encoding} -t UTF-8"
