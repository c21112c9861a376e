"""What every artifact is checked for: the kind of file, and name and version of its format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import kind_of


def check_header(path: Path, header: object, kind: str, version: int) -> None:
    """Raises ArtifactError unless `header`, read from `path`, is of format `kind` and this `version`."""
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} is not a {kind} file: it holds no JSON object")
    if header.get("format") != kind:
        raise ArtifactError(f"{path} is not a {kind} file: its format field is {header.get('format')!r}")
    if header.get("version") != version:
        raise ArtifactError(
            f"{path} has format version {header.get('version')}; this mc_gguf reads version {version}: "
            "make the file again"
        )


def check_kind(path: Path, expected: Sequence[str], what: str, verb: str) -> None:
    """Raises ArtifactError unless the file is one of the kinds `expected` (see kind_of).

    This comes before the file is read in full: somebody may have given the model itself. `what` says what the
    file should be, and `verb` makes one.
    """
    try:
        kind = kind_of(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if kind not in expected:
        raise ArtifactError(f"{path} is {kind}, not {what}; make one with: mc-gguf {verb}")


def why(error: Exception) -> str:
    """What is wrong with a file whose contents made a parser raise `error`, in a few words."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(error).split())[:120]
