"""The strict GGUF header reader: every value type against gguf-py, and damage."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf.common.errors import FormatError
from mc_gguf.ggml.gguf_file import pad, read_header
from mc_gguf.runtime.packages import load_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with a value of every type and two tensors, by gguf-py."""
    gguf = load_gguf()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    numbers = {"uint8": 200, "int8": -100, "uint16": 60000, "int16": -30000, "uint32": 4 << 29, "int32": -5}
    for kind, number in (numbers | {"uint64": 1 << 63, "int64": -(1 << 62)}).items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", number)
    writer.add_float32("x.float32", 0.1)
    writer.add_float64("x.float64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "zwölf")
    writer.add_array("x.strings", ["a", "", "日本"])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_array("x.bools", [True, False])
    writer.add_custom_alignment(64)
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.zeros((4, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


@pytest.mark.native
def test_every_value_type_as_gguf_py(model: Path) -> None:
    header = read_header(model)
    reader = load_gguf().GGUFReader(model)
    assert len(header.kv) == 18
    for key, value in header.kv.items():
        field = reader.get_field(key)
        assert value.value == field.contents()
        assert value.type == field.types[0]
        if len(field.types) > 1:
            assert value.item_type == field.types[-1]
    assert header.alignment == 64
    for t in reader.tensors:
        entry = header.tensors[t.name]
        assert (entry.shape, entry.offset, entry.n_bytes) == (tuple(t.shape), t.data_offset, t.n_bytes)
    assert header.get("x.nothing", 7) == 7


def _header(*parts: bytes, n_tensor: int = 0, n_kv: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensor, n_kv) + b"".join(parts)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _string(name) + dims + struct.pack("<IQ", kind, offset)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty; download"),
    "magic": (b"GGML" + bytes(60), "no GGUF magic"),
    "old version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 0x1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 0x3000000"),
    "value type": (
        _header(_string("k"), struct.pack("<I", 99), bytes(8), n_kv=1),
        "key k: unknown value type 99",
    ),
    "item type": (
        _header(_string("k"), struct.pack("<IIQ", 9, 9, 1), bytes(8), n_kv=1),
        "key k: unknown array item type 9",
    ),
    "boolean": (_header(_string("k"), struct.pack("<IB", 7, 2), n_kv=1), "key k: a boolean"),
    "booleans": (_header(_string("k"), struct.pack("<IIQBB", 9, 7, 2, 1, 2), n_kv=1), "key k: a boolean"),
    "key twice": (_header((_string("k") + struct.pack("<IB", 7, 1)) * 2, n_kv=2), "key k: appears twice"),
    "long key": (_header(struct.pack("<Q", 1 << 60), n_kv=1), "key number 0: a text of 115292150460684"),
    "a key past the end": (_header(struct.pack("<Q", 1 << 10), n_kv=1), "key number 0: the file ends"),
    "long text": (
        _header(_string("k"), struct.pack("<IQ", 8, 1 << 31), n_kv=1),
        "key k: a text of 2147483648 bytes; at most",
    ),
    "array past the end": (
        _header(_string("k"), struct.pack("<IIQ", 9, 4, 1 << 24), n_kv=1),
        "key k: the file ends at byte",
    ),
    "alignment": (
        _header(_string("general.alignment"), struct.pack("<II", 4, 48), n_kv=1),
        r"general\.alignment: 48 is not a power",
    ),
    "alignment type": (
        _header(_string("general.alignment"), struct.pack("<IB", 7, 1), n_kv=1),
        r"general\.alignment: True is not",
    ),
    "tensor twice": (
        _header(_tensor(), _tensor(offset=128), bytes(512), n_tensor=2),
        "tensor t: appears twice",
    ),
    "long name": (_header(_tensor("n" * 64), bytes(512), n_tensor=1), "a text of 64 bytes; at most 63"),
    "no dimensions": (_header(_tensor(shape=()), bytes(512), n_tensor=1), "tensor t: 0 dimensions"),
    "five dimensions": (_header(_tensor(shape=(1,) * 5), bytes(512), n_tensor=1), "tensor t: 5 dimensions"),
    "zero rows": (_header(_tensor(shape=(32, 0)), bytes(512), n_tensor=1), "tensor t: impossible shape"),
    "overflow": (
        _header(_tensor(shape=(1 << 40, 1 << 40)), bytes(512), n_tensor=1),
        "tensor t: impossible shape",
    ),
    "tensor type": (_header(_tensor(kind=77), bytes(512), n_tensor=1), "tensor t: unknown tensor type 77"),
    "part of a block": (
        _header(_tensor(shape=(33,), kind=8), bytes(512), n_tensor=1),
        "tensor t: rows of 33",
    ),
    "offset": (_header(_tensor(offset=32), bytes(512), n_tensor=1), "tensor t: offset 32, but"),
    "past the end": (
        _header(_tensor(shape=(4096,)), bytes(512), n_tensor=1),
        "tensor t: ends at byte .* truncated",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_header(tmp_path / "bad.gguf")


@pytest.mark.parametrize("item_type", [8, 0, 7, 12])
def test_huge_arrays_are_refused_at_once(tmp_path: Path, item_type: int) -> None:
    """2^27 empty texts took a minute, 2^30 bytes or booleans all of the memory. The file is sparse."""
    path = tmp_path / "huge.gguf"
    path.write_bytes(_header(_string("k"), struct.pack("<IIQ", 9, item_type, 1 << 27), n_kv=1))
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    began = time.monotonic()
    with pytest.raises(FormatError, match="key k: an array of 134217728 items; at most"):
        read_header(path)
    assert time.monotonic() - began < 1


def test_what_a_file_says_does_not_flood_the_message(tmp_path: Path) -> None:
    key = "k\x1b[31m" * 9000
    (tmp_path / "bad.gguf").write_bytes(_header(_string(key), struct.pack("<I", 99), n_kv=1))
    with pytest.raises(FormatError, match=r"\d+ characters left out") as caught:
        read_header(tmp_path / "bad.gguf")
    message = str(caught.value)
    assert message.endswith("unknown value type 99")
    assert len(message) < 6000
    assert "\x1b" not in message
    assert r"\x1b[31m" in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot read .*nothing: No such file"):
        read_header(tmp_path / "nothing")
    with pytest.raises(FormatError, match="is a directory; give the path of a GGUF"):
        read_header(tmp_path)


@pytest.mark.native
def test_text_need_not_be_utf8(tmp_path: Path) -> None:
    """Token lists of byte-level vocabularies: kept, and written back as they were."""
    from mc_gguf.ggml.gguf_writer import add_values

    entry = _string("k") + struct.pack("<IQ", 8, 3) + b"a\xff\xfe"
    (tmp_path / "m.gguf").write_bytes(_header(entry, n_kv=1))
    kv = read_header(tmp_path / "m.gguf").kv
    writer: Any = load_gguf().GGUFWriter(None, "test")
    add_values(writer, kv)
    assert writer.kv_data[0]["k"].value == b"a\xff\xfe"


def test_pad() -> None:
    assert [pad(n, 32) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]
