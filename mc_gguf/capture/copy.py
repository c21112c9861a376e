"""The GGUF that the runtime evaluates: the source itself, or a copy in the source's own 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_gguf import container
from mc_gguf.artifacts import NO_CALIBRATION, FixedTypes
from mc_gguf.common.files import atomic_write
from mc_gguf.common.progress import Progress
from mc_gguf.container.layout import OutputTensor
from mc_gguf.ggml.gguf_file import DEFAULT_ALIGNMENT, pad
from mc_gguf.source import Checkpoint

MODEL, SPOOL = "model.gguf", "spool"  # in the folder in which a text's evaluation is kept


def runnable(checkpoint: Checkpoint, path: Path, bar: Progress) -> Path:
    """A GGUF with the weights of `checkpoint`: its own file, or `path`, which is written if need be."""
    own = checkpoint.gguf
    if own is not None:
        return own
    if not path.is_file():
        bar.advance(0, "writing a GGUF for the runtime")
        write_copy(checkpoint, path)
    return path


def copy_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the copy that `runnable` writes."""
    return 0 if checkpoint.gguf is not None else container.total_bytes(_tensors(checkpoint))


def write_copy(checkpoint: Checkpoint, path: Path) -> None:
    """Write a plain GGUF with the tensors of `checkpoint` as they are; it appears once it is complete."""
    tensors = _tensors(checkpoint)
    header = container.encode_header(checkpoint, tensors, NO_CALIBRATION, NO_CALIBRATION, None)
    with atomic_write(path) as file:
        file.write(header)
        for t in tensors:
            for data in _data(checkpoint, t):
                file.write(data.data)
            file.write(bytes(pad(t.n_bytes, DEFAULT_ALIGNMENT) - t.n_bytes))


def _tensors(checkpoint: Checkpoint) -> tuple[OutputTensor, ...]:
    info = checkpoint.info
    types = {
        p: [(info.stacks[layer, p].type,) * info.n_expert for layer in info.expert_layers]
        for p in info.projections
    }
    own = {t.name: t.type for t in info.tensors}
    return container.layout(info, types, FixedTypes(others=own), None)


def _data(checkpoint: Checkpoint, tensor: OutputTensor) -> Iterator[NDArray[np.uint8]]:
    if tensor.experts is None:
        yield checkpoint.raw(tensor.source.name)
        return
    for expert in tensor.experts:
        yield checkpoint.raw(tensor.source.name, expert)
