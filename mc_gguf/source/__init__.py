"""The source model, streamed: a Hugging Face directory or a 16/32-bit GGUF behind one interface.

checkpoint = open_checkpoint(Path("Mixtral-8x7B-v0.1"))
checkpoint.expert(layer=0, projection="gate", expert=3)      # (n_ff, n_embd) float32, read now, kept by
nobody
"""

from __future__ import annotations

import re
from pathlib import Path

from mc_gguf.checkpoint.base import Checkpoint
from mc_gguf.errors import SourceError

__all__ = ["Checkpoint", "keep_source", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a source model; no weights are read. Raises SourceError with what is missing or not supported."""
    if path.is_dir():
        from mc_gguf.checkpoint.hf import HfCheckpoint

        return HfCheckpoint(path)
    if path.is_file():
        from mc_gguf.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    raise SourceError(f"{path} does not exist; give a Hugging Face checkpoint directory or a GGUF file")


def keep_source(source: Path, output: Path) -> None:
    """Raises SourceError when writing `output` would replace a file of the source model."""
    if not (source.exists() and output.exists()):
        return
    if source.is_dir():
        clash = any(output.samefile(file) for file in source.iterdir())
    else:
        same_folder = output.resolve().parent == source.resolve().parent
        shard = same_folder and _shard_of(source) is not None and _shard_of(source) == _shard_of(output)
        clash = shard or output.samefile(source)
    if clash:
        raise SourceError(f"{output} is a file of the source model; write the result somewhere else")


def _shard_of(path: Path) -> str | None:
    """The name that the shards of one split GGUF share."""
    match = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name)
    return match[1] if match else None
