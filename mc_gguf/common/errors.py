"""The errors that mc_gguf raises on purpose.

Every message says what is wrong, where, and what to do next; the command line prints it on one line and
exits 1. Anything that is not an McError is a bug in mc_gguf.
"""

from __future__ import annotations


class McError(Exception):
    """Base of all errors that a user can do something about."""


class SourceError(McError):
    """The source model (HF directory or GGUF) is missing, incomplete or of a kind that is not supported."""


class ArtifactError(McError):
    """A calibration or plan file is missing, damaged, of another version, or belongs to another model."""


class BudgetError(McError):
    """No allocation meets the budget; the message gives the feasible range."""


class FormatError(McError):
    """A GGUF violates docs/reference/format.md; the message names the tensor or key."""


class RuntimeBuildError(McError):
    """The patched llama.cpp cannot be fetched, built, found or loaded."""
