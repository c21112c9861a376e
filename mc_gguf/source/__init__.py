"""The source model, streamed: a Hugging Face directory or a 16/32-bit GGUF behind one interface.

    checkpoint = open_checkpoint(Path("Mixtral-8x7B-v0.1"))
    checkpoint.expert(layer=0, projection="gate", expert=3)     # (n_ff, n_embd) float32

Weights are read when they are asked for, and not kept.
"""

from __future__ import annotations

from pathlib import Path

from mc_gguf.common.errors import McError, SourceError, about
from mc_gguf.common.files import check_output, check_shards
from mc_gguf.ggml.shards import shard_stem
from mc_gguf.source.base import Checkpoint

_OURS = {".calib.safetensors": "a calibration", ".plan.json": "a plan"}

__all__ = ["Checkpoint", "open_checkpoint", "refuse_to_overwrite"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a source model; no weights are read. Raises SourceError with what is missing or not supported."""
    if path.is_dir():
        from mc_gguf.source.hf import HfCheckpoint

        return HfCheckpoint(path)
    if path.is_file():
        from mc_gguf.source.gguf import GgufCheckpoint

        for suffix, what in _OURS.items():
            if path.name.endswith(suffix):
                raise SourceError(f"{path} is {what}, not a model; give the directory or the GGUF of a model")
        if path.suffix in (".safetensors", ".json", ".bin"):
            raise SourceError(f"{path} is one file of a checkpoint; give the directory that it is in")
        return GgufCheckpoint(path)
    what = "is no regular file" if path.exists() else "does not exist"
    hint = f" (to download one: hf download {path} --local-dir DIR)" if _is_hub_name(path) else ""
    raise SourceError(f"{path} {what}; give a Hugging Face checkpoint directory or a GGUF file{hint}")


def _is_hub_name(path: Path) -> bool:
    """Whether it looks like OWNER/NAME on the Hugging Face hub, and not like a mistyped path."""
    return (
        len(path.parts) == 2
        and not path.is_absolute()
        and not path.parent.exists()
        and path.suffix != ".gguf"
    )


def refuse_to_overwrite(output: Path, source: Path, *inputs: Path) -> None:
    """Raises McError when `output` cannot be written, or when that would replace a file of the source model
    (a SourceError) or one of the other `inputs`. Every verb that writes a file calls this before it reads
    anything.
    """
    with about("output"):
        check_output(output, inputs)
    try:
        check_output(output, [source])
    except McError as error:
        raise _of_source(output) from error
    stem = shard_stem(source)
    if stem is not None and stem == shard_stem(output) and _folder(source) == _folder(output):
        raise _of_source(output)
    if source.is_dir() and output.match("model*.safetensors") and _folder(output) == source.resolve():
        raise SourceError(
            f"{output} would be taken for a file of the source model; write to another folder, or under a "
            "name that does not begin with model",
            parameter="output",
        )
    with about("output"):
        check_shards(output)


def _of_source(output: Path) -> SourceError:
    return SourceError(f"{output} is a file of the source model; write to another file", parameter="output")


def _folder(path: Path) -> Path:
    return path.resolve().parent
