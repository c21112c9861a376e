"""The source model, streamed: a Hugging Face directory or a 16/32-bit GGUF behind one interface.

checkpoint = open_checkpoint(Path("Mixtral-8x7B-v0.1"))
checkpoint.expert(layer=0, projection="gate", expert=3)      # (n_ff, n_embd) float32, read now, kept by
nobody
"""

from __future__ import annotations

from pathlib import Path

from mc_gguf.checkpoint.base import Checkpoint
from mc_gguf.errors import SourceError

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a source model; no weights are read. Raises SourceError with what is missing or not supported."""
    if path.is_dir():
        from mc_gguf.checkpoint.hf import HfCheckpoint

        return HfCheckpoint(path)
    if path.is_file():
        from mc_gguf.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    raise SourceError(f"{path} does not exist; give a Hugging Face checkpoint directory or a GGUF file")
