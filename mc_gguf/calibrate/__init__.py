"""The first step: every expert and attention matrix measured on text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mc_gguf.common.arguments import Names, PathLike, Paths, to_paths
from mc_gguf.common.extras import require_extra
from mc_gguf.common.progress import ProgressListener, listening

if TYPE_CHECKING:
    from mc_gguf.artifacts import Calibration


def calibrate(
    source: PathLike,
    output: PathLike,
    *,
    text: Paths = (),
    tokens: int = 65_536,
    ctx: int = 512,
    rows: int = 256,
    types: Names | None = None,
    seed: int = 0,
    threads: int | None = None,
    gpu_layers: int = 0,
    cpu_moe: int = 0,
    resume: bool = True,
    quiet: bool = False,
    progress: ProgressListener | None = None,
) -> Calibration:
    """Measure the experts of a model: how often they are used, and their error under every type.

    The runtime evaluates the text, so every Mixture-of-Experts model that it runs can be measured.

    A killed run continues where it was when it is started again with the same arguments.

    Args:
        source: a Hugging Face directory or a GGUF; of a quantized one, what its types stand for.
        output: the calibration file to write, .safetensors.
        text: UTF-8 files; by default the mixture that comes with mc_gguf.
        tokens: tokens to use, spread over the whole text.
        ctx: tokens per row of text; at most the model's context.
        rows: rows of a matrix on which the errors of the types are measured.
        types: ggml types to measure; by default all candidates that fit the model.
        seed: random seed.
        threads: threads; by default all usable cores.
        gpu_layers: layers that the runtime computes on a GPU; 0 computes on the CPU.
        cpu_moe: how many of these layers keep their experts in the CPU's memory.
        resume: continue a killed run; False starts again.
        quiet: show no progress on stderr.
        progress: called with a ProgressState for every bit of progress, instead of showing it on stderr.

    Returns:
        The calibration that was written.

    Raises:
        MissingExtraError: torch or another package of mc-gguf[convert] is not installed.
        SourceError: the model or the text cannot be read, or the architecture is not supported.
        McError: a type is unknown or fits no matrix of the model, or a number is too small.

    Example:
        >>> from mc_gguf.calibrate import calibrate
        >>> few = {"tokens": 2048, "ctx": 128, "types": "Q2_K,Q3_K"}
        >>> found = calibrate("models/tiny-mixtral", "m.calib.safetensors", **few)
        >>> found.frequency.shape  # layers, experts
        (6, 8)
    """
    require_extra("convert")
    from mc_gguf.calibrate.arguments import CalibrationRequest
    from mc_gguf.source import open_checkpoint, refuse_to_overwrite

    request = CalibrationRequest(
        text=text,
        tokens=tokens,
        ctx=ctx,
        rows=rows,
        types=types,
        seed=seed,
        threads=threads,
        gpu_layers=gpu_layers,
        cpu_moe=cpu_moe,
    )
    refuse_to_overwrite(Path(output), Path(source), *to_paths(text))
    checkpoint = open_checkpoint(Path(source))  # before torch is loaded, which takes seconds
    from mc_gguf.calibrate.calibrator import calibrate_to_file

    corpus = request.corpus(checkpoint)
    with listening(progress):
        return calibrate_to_file(checkpoint, corpus, Path(output), request.options(), resume, quiet)
