"""Puts parsed metadata values into a gguf.GGUFWriter of the pinned gguf-py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mc_gguf.ggml.gguf_file import Value


def add_values(writer: Any, kv: Mapping[str, Value]) -> None:
    """Put parsed metadata values into a gguf.GGUFWriter with the types they had."""
    from mc_gguf.runtime.packages import load_gguf

    value_type = load_gguf().GGUFValueType
    for key, value in kv.items():
        item = None if value.item_type is None else value_type(value.item_type)
        writer.add_key_value(key, _encoded(value.value), value_type(value.type), item)


def _encoded(value: Any) -> Any:
    """Strings as the bytes they were read from: GGUF strings need not be UTF-8."""
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
