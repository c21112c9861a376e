"""The header fields that every artifact has: name and version of its format."""

from __future__ import annotations

from pathlib import Path

from mc_gguf.common.errors import ArtifactError


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
