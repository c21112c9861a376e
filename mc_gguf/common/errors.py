"""The errors that mc_gguf raises on purpose.

Every message says what is wrong, where, and what to do next. It speaks of parameters ("give size or bpw");
the command line puts the options of the error's `parameters` before it, prints one line, and exits.
Anything that is not an McError is a bug in mc_gguf.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_MAX_CHARACTERS = 2000  # of a message, which may cite what a damaged file says
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines


class McError(Exception):
    """Base of all errors that a user can do something about.

    `parameters` are the names of the function's parameters that the error is about; empty where it is about
    none, for instance about a damaged file.
    """

    exit_code = 1  # of the command line

    def __init__(self, message: str, *, parameter: str | Sequence[str] = ()) -> None:
        super().__init__(_readable(message))
        self.parameters = (parameter,) if isinstance(parameter, str) else tuple(parameter)


def _readable(message: str) -> str:
    """`message` with control characters as escapes, and without the middle of what is very long."""
    if (extra := len(message) - _MAX_CHARACTERS) > 0:
        half = _MAX_CHARACTERS // 2
        message = f"{message[:half]} [{extra} characters left out] {message[-half:]}"
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], message)


@contextmanager
def about(*parameters: str) -> Iterator[None]:
    """Errors raised in the block are about these parameters, unless they already name their own.

    with about("size"):
        size_bytes = parse_size(size)
    """
    try:
        yield
    except McError as error:
        error.parameters = error.parameters or parameters
        raise


class SourceError(McError):
    """The source model (HF directory or GGUF) is missing, incomplete or of a kind that is not supported."""


class ArtifactError(McError):
    """A calibration or plan file is missing, damaged, of another version, or belongs to another model."""


class BudgetError(McError):
    """No allocation meets the budget; the message gives the feasible range."""


@dataclass(frozen=True)
class SizeProposal:
    """A size that a model could be converted to. `bpw`: average bits per routed expert weight in such a file;
    `fits`: whether this machine's memory can hold it, with room for the context.
    """

    size_bytes: int
    bpw: float
    fits: bool


class NoBudgetError(BudgetError):
    """No budget was given. `proposals` are some to choose from, smallest first; `memory_bytes` is what this
    machine has.
    """

    exit_code = 2  # as for other incomplete command lines

    def __init__(self, proposals: Sequence[SizeProposal], memory_bytes: int) -> None:
        super().__init__("no budget was given: give size or bpw", parameter=("size", "bpw"))
        self.proposals, self.memory_bytes = tuple(proposals), memory_bytes


class MissingExtraError(McError):
    """A package that this function needs is not installed; the message names the extra that brings it."""


class FormatError(McError):
    """A GGUF violates docs/reference/format.md; the message names the tensor or key."""


class RuntimeBuildError(McError):
    """The patched llama.cpp cannot be fetched, built, found or loaded."""


class LlamaError(McError):
    """llama.cpp could not do what it was called for, or what it was given would have ended the process."""
