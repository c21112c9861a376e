"""A strict reader of GGUF headers: metadata and tensor infos, but no weights. It depends on nothing else.

It knows GGUF (version 3, little-endian, as ggml/src/gguf.cpp of the pinned llama.cpp reads it) but not what
mc_gguf adds to it: that is mc_gguf.container's business. Whatever is wrong with a file becomes a FormatError
that names the key or the tensor.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mc_gguf.common.downloads import HEAD_BYTES, placeholder
from mc_gguf.common.errors import FormatError
from mc_gguf.ggml.types import TYPES_BY_ID, GgmlType

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63
MAX_DIMS = 4
MAX_KEY_BYTES = 65_535  # as the GGUF specification has it
# More than any vocabulary, merge list, tokenizer or template needs; llama.cpp's own limits are 2^30.
MAX_STRING_BYTES = 1 << 26
MAX_ITEMS = 1 << 24

STRING, ARRAY, UINT32, FLOAT32, FLOAT64 = 8, 9, 4, 6, 12
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True)
class Value:
    """One metadata value with the GGUF type ids it was stored under (`item_type` for arrays only)."""

    type: int
    value: Any
    item_type: int | None = None


@dataclass(frozen=True)
class TensorEntry:
    """One tensor info: shape in ggml order (fastest first), `offset` from the start of the file `path`."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    n_bytes: int
    path: Path


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a GGUF before the weights.

    `kv_spans` says where in the file each metadata entry is (key, type and value), `infos_span` where the
    tensor infos are: (start, end) in bytes, so that they can be copied as they are.
    """

    path: Path
    kv: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]
    alignment: int
    data_offset: int
    file_bytes: int
    kv_spans: Mapping[str, tuple[int, int]]
    infos_span: tuple[int, int]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or `default`."""
        found = self.kv.get(key)
        return default if found is None else found.value


def pad(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple of `alignment`."""
    return -(-n // alignment) * alignment


def read_header(path: Path) -> GgufHeader:
    """Parse and check the header of `path`. Raises FormatError (OSError becomes one too)."""
    try:
        if path.is_dir():
            raise FormatError(f"{path} is a directory; give the path of a GGUF")
        if path.exists() and not path.is_file():
            raise FormatError(f"{path} is not a regular file")  # opening a pipe would wait
        with path.open("rb") as file:
            if what := placeholder(file.read(HEAD_BYTES)):
                raise FormatError(f"{path} {what}")
            size = file.seek(0, 2)
            if size < 24:
                raise FormatError(f"{path}: {size} bytes are too few for a GGUF header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, size).header()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error


def encode_kv(key: str, value: Value) -> bytes:
    """One metadata entry as it stands in a file: key, type, value."""
    head = _encode_string(key) + struct.pack("<I", value.type)
    if value.type == STRING:
        return head + _encode_string(value.value)
    if value.type != ARRAY:
        return head + struct.pack(_SCALARS[value.type], value.value)
    item_type = value.item_type
    assert item_type is not None
    head += struct.pack("<IQ", item_type, len(value.value))
    if item_type == STRING:
        return head + b"".join(map(_encode_string, value.value))
    return head + struct.pack(f"<{len(value.value)}{_SCALARS[item_type][1]}", *value.value)


def _encode_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


class _Parser:
    """A cursor over the mapped file; `where` says what is being read, for messages."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.position, self.where = 0, "the header"
        self.kv_spans: dict[str, tuple[int, int]] = {}

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {self.where}: {what}")

    def take(self, n_bytes: int) -> int:
        """Position of the next `n_bytes`, which must be inside the file."""
        start, end = self.position, self.position + n_bytes
        if end > self.size:
            raise self.fail(f"the file ends at byte {self.size}, {end - self.size} bytes too early")
        self.position = end
        return start

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))
        return value

    def string(self, max_bytes: int = MAX_STRING_BYTES) -> str:
        length = self.scalar("<Q")
        if length > max_bytes:
            raise self.fail(f"a text of {length} bytes; at most {max_bytes} are possible")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", "surrogateescape")

    def header(self) -> GgufHeader:
        start = self.take(4)
        if self.data[start : start + 4] != MAGIC:
            raise self.fail("no GGUF magic; this is not a GGUF file")
        version = self.scalar("<I")
        if version != VERSION:
            raise self.fail(f"GGUF version {version:#x}; only version {VERSION}, little-endian, is supported")
        n_tensor, n_kv = self.scalar("<Q"), self.scalar("<Q")
        kv = self.metadata(n_kv)
        infos_start = self.position
        stored = kv.get("general.alignment", Value(UINT32, DEFAULT_ALIGNMENT))
        alignment = stored.value
        if stored.type != UINT32 or alignment <= 0 or alignment & (alignment - 1):
            raise FormatError(f"{self.path}: key general.alignment: {alignment!r} is not a power of two")
        infos = self.infos(n_tensor, alignment)
        infos_span = infos_start, self.position
        data_offset = pad(self.position, alignment)
        tensors = {t.name: replace(t, offset=data_offset + t.offset) for t in infos}
        for tensor in tensors.values():
            if tensor.offset + tensor.n_bytes > self.size:
                self.where = f"tensor {tensor.name}"
                end = tensor.offset + tensor.n_bytes
                raise self.fail(f"ends at byte {end}, the file has {self.size}; it is truncated")
        return GgufHeader(
            self.path, kv, tensors, alignment, data_offset, self.size, self.kv_spans, infos_span
        )

    def metadata(self, n_kv: int) -> dict[str, Value]:
        kv: dict[str, Value] = {}
        for index in range(n_kv):
            self.where = f"key number {index}"
            start = self.position
            key = self.string(MAX_KEY_BYTES)
            self.where = f"key {key}"
            if key in kv:
                raise self.fail("appears twice")
            kv[key] = self.value(self.scalar("<I"))
            self.kv_spans[key] = start, self.position
        return kv

    def value(self, type_id: int) -> Value:
        if type_id == STRING:
            return Value(type_id, self.string())
        if type_id in _SCALARS:
            return Value(type_id, self.number(type_id))
        if type_id != ARRAY:
            raise self.fail(f"unknown value type {type_id}")
        item_type, length = self.scalar("<I"), self.scalar("<Q")
        if length > MAX_ITEMS:
            raise self.fail(f"an array of {length} items; at most {MAX_ITEMS} are possible")
        if item_type == STRING:
            return Value(ARRAY, [self.string() for _ in range(length)], item_type)
        if item_type not in _SCALARS:
            raise self.fail(f"unknown array item type {item_type}")
        code = _SCALARS[item_type]
        start = self.take(length * struct.calcsize(code))
        if item_type == 7 and any(b > 1 for b in self.data[start : start + length]):
            raise self.fail("a boolean that is neither 0 nor 1")
        return Value(ARRAY, list(struct.unpack_from(f"<{length}{code[1]}", self.data, start)), item_type)

    def number(self, type_id: int) -> Any:
        if type_id == 7 and self.data[self.position : self.position + 1] not in (b"\0", b"\1"):
            raise self.fail("a boolean that is neither 0 nor 1")
        return self.scalar(_SCALARS[type_id])

    def infos(self, n_tensor: int, alignment: int) -> list[TensorEntry]:
        found: dict[str, TensorEntry] = {}
        expected = 0
        for index in range(n_tensor):
            self.where = f"tensor number {index}"
            name = self.string(MAX_NAME_BYTES)
            self.where = f"tensor {name}"
            if name in found:
                raise self.fail("appears twice")
            entry = self.info(name)
            if entry.offset != expected:
                raise self.fail(f"offset {entry.offset}, but the tensors before it end at {expected}")
            expected += pad(entry.n_bytes, alignment)
            found[name] = entry
        self.where = "the end of the tensor infos"
        return list(found.values())

    def info(self, name: str) -> TensorEntry:
        n_dims = self.scalar("<I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.fail(f"{n_dims} dimensions; 1 to {MAX_DIMS} are possible")
        shape = tuple(self.scalar("<Q") for _ in range(n_dims))
        if not all(shape) or prod(shape) >= 1 << 62:
            raise self.fail(f"impossible shape {shape}")
        type_id = self.scalar("<I")
        if type_id not in TYPES_BY_ID:
            raise self.fail(f"unknown tensor type {type_id}")
        kind = TYPES_BY_ID[type_id]
        if not kind.fits(shape[0]):
            raise self.fail(
                f"rows of {shape[0]} weights are not whole blocks of {kind.name} ({kind.block_size} weights)"
            )
        n_bytes = kind.row_bytes(shape[0]) * prod(shape[1:])
        return TensorEntry(name, shape, kind, self.scalar("<Q"), n_bytes, self.path)
