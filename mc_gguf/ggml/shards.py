"""Split GGUFs: the shards of one model as gguf-split makes them, NAME-00001-of-00003.gguf and so on.

The first shard has the metadata; the keys split.no and split.count say which shard of how many a file is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mc_gguf.common.errors import FormatError
from mc_gguf.common.files import SHARD_NAME
from mc_gguf.ggml.gguf_file import GgufHeader, TensorEntry, read_header


def shard_paths(path: Path) -> list[Path]:
    """The paths of all shards of the model that `path` belongs to, in order, whether they exist or not.

    A file that is not named like a shard is its own only shard.
    """
    name = SHARD_NAME.fullmatch(path.name)
    if not name:
        return [path]
    count = int(name["count"])
    return [path.with_name(f"{name['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]


def shard_stem(path: Path) -> str | None:
    """The name that all shards of one model share, or None for a file that is not named like a shard."""
    name = SHARD_NAME.fullmatch(path.name)
    return name["stem"] if name else None


def read_shards(path: Path) -> list[GgufHeader]:
    """The headers of all shards of the model that the GGUF `path` belongs to, first shard first.

    Raises FormatError when shards are missing, or of another model.
    """
    header = read_header(path)
    count = header.get("split.count", 1)
    if not isinstance(count, int):
        raise FormatError(f"{path}: key split.count is {count!r}, not a whole number")
    if count <= 1:
        return [header]
    paths = shard_paths(path)
    if len(paths) != count:
        raise FormatError(
            f"{path} is one of {count} shards, but is not named like ...-00001-of-{count:05d}.gguf"
        )
    if missing := [p.name for p in paths if not p.is_file()]:
        raise FormatError(
            f"{path.parent} lacks {len(missing)} of {count} shards: {', '.join(missing[:5])}; download them, "
            "and keep all shards in one folder"
        )
    headers = [read_header(p) for p in paths]
    _check_numbers(headers)
    return headers


def _check_numbers(shards: Sequence[GgufHeader]) -> None:
    """Raises FormatError unless these are the shards of one model in their order, by what they say."""
    count = len(shards)
    for number, shard in enumerate(shards):
        if (shard.get("split.no"), shard.get("split.count")) != (number, count):
            raise FormatError(
                f"{shard.path} is not shard {number + 1} of {count} of one model: its keys split.no and "
                f"split.count are {shard.get('split.no')} and {shard.get('split.count')}, not {number} and "
                f"{count}; download it again"
            )
    expected = shards[0].get("split.tensors.count")
    found = sum(len(shard.tensors) for shard in shards)
    if expected is not None and expected != found:
        raise FormatError(
            f"{shards[0].path}: the shards hold {found} tensors, key split.tensors.count says {expected}"
        )


def check_first(path: Path) -> None:
    """Raises FormatError for a file named like a shard that is not the first of a complete set. That is left
    to llama.cpp for all other files, and for those that we cannot read.
    """
    if not SHARD_NAME.fullmatch(path.name):
        return
    try:
        header = read_header(path)
    except FormatError:
        return
    if header.get("split.no"):
        raise FormatError(f"{path} is not the first of its shards; give {shard_paths(path)[0].name}")
    read_shards(path)


def joined(shards: Sequence[GgufHeader]) -> GgufHeader:
    """One header with the first shard's metadata and the tensors of all. Raises FormatError for a tensor that
    two shards have.
    """
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in shard.tensors.items():
            if name in tensors:
                raise FormatError(f"{shard.path}: tensor {name} is also in {tensors[name].path.name}")
            tensors[name] = entry
    return replace(shards[0], tensors=tensors, file_bytes=sum(shard.file_bytes for shard in shards))


def read_first(path: Path) -> GgufHeader:
    """The header with the metadata of the model that the GGUF `path` belongs to: that of the first shard."""
    header = read_header(path)
    first = shard_paths(path)[0]
    if not header.get("split.no") or first == path:
        return header
    if not first.is_file():
        raise FormatError(f"{path} is not the first of its shards, and {first.name} is not beside it")
    return read_header(first)
