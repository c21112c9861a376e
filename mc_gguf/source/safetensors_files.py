"""The safetensors files of a checkpoint: which they are, whether they are whole, and what is in them.

Standard library only: what is wrong with a file is said before torch is imported, which takes seconds. No
weight is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mc_gguf.common.downloads import placeholder_at
from mc_gguf.common.errors import SourceError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# Bytes per element of the types that safetensors knows.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4}
_BYTES |= {"U16": 2, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library reads
_NUMBERED = re.compile(r"(?P<stem>model.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard: shape as stored (rows first), `offset` from the start of the file."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, by the index or, without one, by their names.

    Raises SourceError when there are none, when one is missing, and when files of two models are mixed.
    """
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_index(folder).values()))]
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    sets: dict[str, list[str]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        sets.setdefault(f"{found['stem']} in {int(found['count'])} shards" if found else name, []).append(
            name
        )
    if len(sets) > 1:
        raise SourceError(
            f"{folder} has no {INDEX}, and holds files of several models: {', '.join(sets)}; remove those "
            "that do not belong to it"
        )
    for files in sets.values():
        _check_numbers(folder, files)
    return [folder / name for name in names]


def _check_numbers(folder: Path, names: list[str]) -> None:
    """Raises SourceError when numbered shards are not all there."""
    found = _NUMBERED.fullmatch(names[0])
    if found is None:
        return
    count = int(found["count"])
    wanted = [f"{found['stem']}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    _say_missing(folder, wanted, [name for name in wanted if name not in names])


def _say_missing(folder: Path, wanted: list[str], missing: list[str]) -> None:
    if missing:
        raise SourceError(
            f"{folder} lacks {len(missing)} of {len(wanted)} shards: {', '.join(missing[:5])}; download them"
        )


def read_index(folder: Path) -> dict[str, str]:
    """The name of the shard of every tensor. Raises SourceError when it cannot be read, or a shard is missing
    or makes no sense beside it.
    """
    path = folder / INDEX
    try:
        text = path.read_text(encoding="utf-8")
        index: dict[str, str] = dict(json.loads(text, object_pairs_hook=_unique)["weight_map"].items())
        names = sorted(set(index.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"{path} has no readable weight_map; download the file again") from error
    _say_missing(folder, names, [name for name in names if not (folder / name).is_file()])
    if WHOLE not in names and (folder / WHOLE).is_file():
        raise SourceError(
            f"{folder} holds two models: {WHOLE}, and {len(names)} shards with an index; remove one of them"
        )
    return index


def read_stored(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model in `folder`, by name.

    Raises SourceError for files that are truncated, damaged or not there, for a tensor that is in two of
    them, and for an index that does not fit them.
    """
    found: dict[str, StoredTensor] = {}
    for shard in find_shards(folder):
        for name, tensor in read_shard(shard).items():
            if name in found:
                raise SourceError(
                    f"{name} is both in {found[name].shard} and in {shard.name}: files of two models are "
                    "mixed; remove those that do not belong to it"
                )
            found[name] = tensor
    if (folder / INDEX).is_file():
        _check_index(folder, found)
    return found


def _check_index(folder: Path, found: Mapping[str, StoredTensor]) -> None:
    for name, shard in read_index(folder).items():
        if name not in found or found[name].shard.name != shard:
            raise SourceError(
                f"{folder / INDEX} says that {name} is in {shard}, where it is not; index and shards are not "
                "of one model: download them again"
            )
    if extra := sorted(found.keys() - read_index(folder).keys()):
        raise SourceError(
            f"{folder}: {found[extra[0]].shard.name} holds {extra[0]}, which {INDEX} does not know; index "
            "and shards are not of one model: download them again"
        )


def read_shard(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises SourceError for one that is truncated, damaged or something else."""
    try:
        if what := placeholder_at(path):
            raise SourceError(f"{path} {what}")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise SourceError(f"{path} is no safetensors file; download the file again")
            if length > size - 8:
                raise SourceError(
                    f"{path} is truncated: its header alone needs {8 + length} bytes, it has {size}"
                )
            text = file.read(length)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        tensors = [
            _entry(path, name, entries[name], 8 + length) for name in entries.keys() - {"__metadata__"}
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} has a damaged safetensors header; download the file again") from error
    _check_places(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for one with the same key twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _entry(path: Path, name: str, entry: Mapping[str, Any], data_offset: int) -> StoredTensor:
    """Raises ValueError, KeyError or TypeError for an entry that makes no sense."""
    start, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), str(entry["dtype"])
    if not all(isinstance(n, int) and n >= 0 for n in (start, end, *shape)):
        raise ValueError(name)
    if dtype in _BYTES and end - start != _BYTES[dtype] * prod(shape):
        raise ValueError(name)
    return StoredTensor(name, path, dtype, shape, data_offset + start, end - start)


def _check_places(path: Path, tensors: Iterable[StoredTensor], data_offset: int, size: int) -> None:
    """Raises SourceError unless the tensors fill the file without gaps and overlaps."""
    end, last = data_offset, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.n_bytes)):
        if tensor.offset != end:
            raise SourceError(
                f"{path}: {tensor.name} begins at byte {tensor.offset}, but {last} ends at {end}; download "
                "the file again"
            )
        end, last = tensor.offset + tensor.n_bytes, tensor.name
        if end > size:
            raise SourceError(f"{path} is truncated: {last} ends at byte {end} of {size}; download it again")
    if end != size:
        raise SourceError(f"{path} has {size} bytes, but its tensors end at {end}; download the file again")
