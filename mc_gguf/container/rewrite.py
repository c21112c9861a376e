"""Give a GGUF other routing keys: the file is copied with a new header, its tensors byte for byte."""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from mc_gguf.common.errors import McError
from mc_gguf.common.files import atomic_write
from mc_gguf.common.progress import Progress
from mc_gguf.common.workdir import Workdir
from mc_gguf.container.keys import ROUTING_PREFIX
from mc_gguf.container.routing import encode_metadata, parse_routing, routing_kv
from mc_gguf.ggml.gguf_file import MAGIC, VERSION, GgufHeader, Value, pad, read_header
from mc_gguf.routing.metadata import RoutingMetadata

_COPY_BYTES = 16 << 20


def write_routing(
    path: Path, output: Path, metadata: RoutingMetadata, progress: Progress | None = None
) -> None:
    """Copy the GGUF `path` to `output` (which may be `path`) with these routing keys in place of its own.

    All other metadata, the tensor infos and the tensors are copied byte for byte. `output` appears, or is
    replaced, when everything is written; whatever stops the copy earlier leaves it as it was.

    Raises FormatError when `metadata` does not fit the model, McError when the disk is too small, another
    process is writing `output`, or a shard would be moved away from the others.
    """
    header = read_header(path)
    output = output.resolve()  # the file that a link points to is replaced, not the link
    _check_shard(header, output)
    kept = {key: value for key, value in header.kv.items() if not key.startswith(ROUTING_PREFIX)}
    added = routing_kv(metadata)
    parse_routing(replace(header, kv={**kept, **added}))  # nothing is written that would not be read
    mode = stat.S_IMODE(output.stat().st_mode) if output.exists() else None
    with Workdir(output, {}, resume=False) as work, path.open("rb") as source:
        head = _header(header, source, kept, added)
        n_bytes = header.file_bytes - header.data_offset
        work.check_space(len(head) + n_bytes)
        with atomic_write(copy := work.path("copy")) as target:
            target.write(head)
            source.seek(header.data_offset)
            _copy(source, target, n_bytes, progress)
        if mode is not None:
            copy.chmod(mode)
        work.publish(copy)


def _check_shard(header: GgufHeader, output: Path) -> None:
    """Raises McError unless `header` is of a whole file, or of the first shard of a split one, which carries
    the metadata and whose name leads to the other shards.
    """
    count = header.get("split.count", 1)
    if count == 1:
        return
    if header.get("split.no", 0) != 0:
        raise McError(
            f"{header.path} is not the first of {count} shards; give that one, which carries the metadata"
        )
    if output != header.path.resolve():
        raise McError(
            f"{header.path} is one of {count} shards and can only be changed in place", parameter="output"
        )


def _header(
    header: GgufHeader, source: BinaryIO, kept: Mapping[str, Value], added: Mapping[str, Value]
) -> bytes:
    """The header's bytes: `kept` as they stand in the file, then `added`; padded to the first tensor."""

    def stored(span: tuple[int, int]) -> bytes:
        source.seek(span[0])
        return source.read(span[1] - span[0])

    data = MAGIC + struct.pack("<IQQ", VERSION, len(header.tensors), len(kept) + len(added))
    data += b"".join(stored(header.kv_spans[key]) for key in kept) + encode_metadata(added)
    data += stored(header.infos_span)
    return data.ljust(pad(len(data), header.alignment), b"\0")


def _copy(source: BinaryIO, target: BinaryIO, n_bytes: int, progress: Progress | None) -> None:
    done = 0
    while done < n_bytes:
        block = source.read(min(_COPY_BYTES, n_bytes - done))
        if not block:
            raise McError(f"{source.name} became shorter while it was copied; nothing was changed")
        target.write(block)
        done += len(block)
        if progress:
            progress.update(round(done / 1e6, 1), round(n_bytes / 1e6, 1))
