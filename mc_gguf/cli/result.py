"""What commands print: text for people, or one JSON document and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_gguf.common.units import format_size

if TYPE_CHECKING:
    from mc_gguf.container import MixedGguf


def show(document: Any, text: str, as_json: bool) -> None:
    click.echo(json.dumps(document, indent=1) if as_json else text)


@dataclass
class Results:
    """Results of a command with several steps: text at once, or parts of the document."""

    as_json: bool
    document: dict[str, Any] = field(default_factory=dict)

    def add(self, facts: dict[str, Any], text: str) -> None:
        self.document |= facts
        if not self.as_json:
            click.echo(text)


@contextmanager
def results(as_json: bool) -> Iterator[Results]:
    """Prints the document at the end of the block, if that is wanted."""
    found = Results(as_json)
    yield found
    if as_json:
        show(found.document, "", as_json)


def file_facts(output: Path, model: MixedGguf) -> dict[str, Any]:
    """A file that was written, as JSON."""
    return {"output": str(output), "file_bytes": model.header.file_bytes, "expert_bpw": model.expert_bpw}


def file_line(output: Path, model: MixedGguf) -> str:
    """A file that was written, as a line of text."""
    size = format_size(model.header.file_bytes)
    return f"{output}: {size}, {model.expert_bpw:.4f} bits per expert weight"
