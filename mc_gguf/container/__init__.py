"""The mixed-expert GGUF (docs/format.md): names, metadata, exact sizes, header, reading, validation.

The only package that knows a metadata key of ours. It lays a file out and reads it back; it neither quantizes
nor decides. A file is trusted only after every rule of the specification held.
"""

from __future__ import annotations

from mc_gguf.container.layout import (
    OutputTensor,
    attention_place,
    expert_bpw,
    file_bytes,
    fixed_type,
    header,
    layout,
    total_bytes,
)
from mc_gguf.container.reader import MixedGguf, describe, expert_bytes, validate
from mc_gguf.container.routing import base_metadata, read_routing, write_routing
from mc_gguf.container.update import load_routing, update_routing

__all__ = [
    "MixedGguf",
    "OutputTensor",
    "attention_place",
    "base_metadata",
    "describe",
    "expert_bpw",
    "expert_bytes",
    "file_bytes",
    "fixed_type",
    "header",
    "layout",
    "load_routing",
    "read_routing",
    "total_bytes",
    "update_routing",
    "validate",
    "write_routing",
]
