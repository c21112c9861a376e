"""What a download leaves in the place of a file: a Git LFS pointer, an error page, or nothing."""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 512  # that placeholder() looks at
_AGAIN = "download the file again (hf download)"
_PAGES = (
    b"<!doctype",
    b"<html",
    b"<?xml",
    b"<error",
    b'{"error"',
    b"entry not found",
    b"repository not found",
    b"invalid username or password",
    b"access to model",
    b"invalid credentials",
)
_ARCHIVES = {b"PK\x03\x04": "a ZIP archive (pickled PyTorch weights are one)", b"\x1f\x8b": "a gzip archive"}


def placeholder(head: bytes) -> str | None:
    """What a file that starts with `head` is instead of a model's file, and what to do; None for all others.

    An empty file is one too.
    """
    if not head:
        return f"is empty; {_AGAIN}"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run: git lfs pull (or hf download)"
    if start.startswith(_PAGES):
        return f"is a web page or an error message, not the file itself; {_AGAIN}"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"is {name}; {_AGAIN}, or unpack it"
    return None


def placeholder_at(path: Path) -> str | None:
    """placeholder() of the file `path`, which must exist. Raises OSError."""
    with path.open("rb") as file:
        return placeholder(file.read(HEAD_BYTES))
