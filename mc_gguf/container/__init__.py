"""The mixed-expert GGUF, as docs/reference/format.md specifies it.

    keys.py      metadata keys, tensor names
    layout.py    which tensors a file has, where, and the bytes of its header
    validate.py  the rules of the specification
    reader.py    MixedGguf: where each expert's matrix lies, and its type
    routing.py   the routing keys, read and encoded
    rewrite.py   a copy of a GGUF with other routing keys
    update.py    routing keys of a file by path: loaded, computed anew
    table.py     what a file contains, as text

No other package knows a metadata key of ours. This one neither quantizes nor decides. A file is used only
when it keeps every rule.
"""

from __future__ import annotations

from mc_gguf.container.keys import has_own_keys
from mc_gguf.container.layout import (
    OutputTensor,
    encode_header,
    expert_bpw,
    file_bytes,
    fixed_type,
    layout,
    total_bytes,
)
from mc_gguf.container.reader import MixedGguf, describe_model, expert_bytes, validate
from mc_gguf.container.rewrite import write_routing
from mc_gguf.container.routing import base_metadata, read_routing
from mc_gguf.container.update import load_routing, update_routing

__all__ = [
    "MixedGguf",
    "OutputTensor",
    "base_metadata",
    "describe_model",
    "encode_header",
    "expert_bpw",
    "expert_bytes",
    "file_bytes",
    "fixed_type",
    "has_own_keys",
    "layout",
    "load_routing",
    "read_routing",
    "total_bytes",
    "update_routing",
    "validate",
    "write_routing",
]
