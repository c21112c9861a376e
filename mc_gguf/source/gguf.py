"""A GGUF, in one file or in gguf-split shards, as a source: the weights are what its types stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import TensorSpec, expert_tensor_name
from mc_gguf.common.errors import FormatError, RuntimeBuildError, SourceError
from mc_gguf.ggml.gguf_file import GgufHeader, TensorEntry
from mc_gguf.ggml.gguf_writer import add_values
from mc_gguf.ggml.shards import joined, read_shards
from mc_gguf.ggml.types import READABLE
from mc_gguf.source.base import bos_of, hparams_of, make_info, sample_offsets, select_metadata
from mc_gguf.source.values import NUMBERS, as_float32, check_weights

if TYPE_CHECKING:
    from mc_gguf.runtime.vocabulary import Vocabulary

_FLOATS = ("F32", "F16", "BF16")


class GgufCheckpoint:
    """The Checkpoint (mc_gguf.source) of a GGUF; `path` may be any of its shards."""

    def __init__(self, path: Path) -> None:
        header = _open(path)
        self._path, self._entries, kv = header.path, header.tensors, header.kv
        architecture = header.get("general.architecture")
        if not isinstance(architecture, str):
            raise SourceError(f"{path} has no key general.architecture, so it is not a model")
        specs = [TensorSpec(e.name, e.shape, e.type.name) for e in self._entries.values()]
        for spec in specs:
            if spec.type not in (*_FLOATS, *READABLE, *([] if _is_weight(spec) else NUMBERS)):
                raise SourceError(f"{path}: {spec.name} is {spec.type}, which this mc_gguf cannot read")
        self.gguf: Path | None = header.path
        self._kv = select_metadata(kv)
        self.hparams: Mapping[str, Any] = hparams_of(kv, architecture)
        self.bos_id, self.add_bos = bos_of(kv)
        self.info = make_info(path, kv, architecture, specs, self._samples())
        self._check_loading()

    def _check_loading(self) -> None:
        """Raises SourceError when llama.cpp would not load a file with this metadata. Without a runtime it is
        the first run of the file that says so.
        """
        with contextlib.suppress(RuntimeBuildError):
            try:
                _ = self._vocabulary
            except FormatError as error:
                raise SourceError(str(error), parameter="source") from error

    def copy_kv(self, writer: Any) -> None:
        add_values(writer, self._kv)

    def tensor(self, name: str) -> NDArray[np.float32]:
        entry = self._entry(name)
        return self._values(name, entry.shape[0]).reshape(tuple(reversed(entry.shape)))

    def expert(self, layer: int, projection: str, expert: int) -> NDArray[np.float32]:
        name = expert_tensor_name(layer, projection)
        rows, cols = self.info.expert_shape(projection, layer)
        return self._values(name, cols, expert).reshape(rows, cols)

    def _values(self, name: str, cols: int, expert: int | None = None) -> NDArray[np.float32]:
        kind = self._entry(name).type.name
        weights = as_float32(self.raw(name, expert), kind, cols)
        if kind in READABLE:  # the others are checked as they are read
            check_weights(self._entry(name).path, name, weights, "F32", expert)
        return weights

    def raw(self, name: str, expert: int | None = None) -> NDArray[np.uint8]:
        entry = self._entry(name)
        path = entry.path
        n_bytes = entry.n_bytes if expert is None else entry.n_bytes // entry.shape[-1]
        data = np.fromfile(path, dtype=np.uint8, count=n_bytes, offset=entry.offset + n_bytes * (expert or 0))
        if len(data) != n_bytes:
            raise SourceError(f"{path}: {name} is cut off; the file has become shorter since it was opened")
        if entry.type.name in _FLOATS:
            check_weights(path, name, data, entry.type.name, expert)
        return data

    def tokenize(self, text: str) -> list[int]:
        return self._vocabulary.tokenize(text)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """llama.cpp's tokenizer. The first shard has all of the metadata."""
        from mc_gguf.runtime.vocabulary import Vocabulary

        return Vocabulary(self._path)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise SourceError(f"{self._path} has no tensor {name}")
        return self._entries[name]

    def _samples(self) -> Iterator[bytes]:
        for name in sorted(self._entries):
            entry = self._entries[name]
            n_part = entry.shape[-1] if len(entry.shape) == 3 else 1
            n_bytes = entry.n_bytes // n_part
            with entry.path.open("rb") as file:
                for part in range(n_part):
                    for start, length in sample_offsets(n_bytes):
                        file.seek(entry.offset + part * n_bytes + start)
                        yield f"{name}.{part}".encode() + file.read(length)


def _is_weight(spec: TensorSpec) -> bool:
    return spec.name.endswith(".weight")


def _open(path: Path) -> GgufHeader:
    """The header of the whole model that `path` belongs to."""
    try:
        return joined(read_shards(path))
    except FormatError as error:
        raise SourceError(str(error)) from error
