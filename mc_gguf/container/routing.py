"""The routing keys of a GGUF (docs/format.md, "Routing"), read and validated."""

from __future__ import annotations

from pathlib import Path

from mc_gguf.gguf_file import read_header
from mc_gguf.routing.metadata import RoutingMetadata


def read_routing(path: Path) -> RoutingMetadata | None:
    """The routing metadata of a GGUF, ours or plain; None when it carries none.

    Only the header is read. Raises FormatError that names the key when it violates docs/format.md.
    """
    raise NotImplementedError(read_header(path))
