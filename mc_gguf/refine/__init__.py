"""Refinement: search for a better plan on the real KL divergence, within the plan's own budget.

- refinement.py  refine_to_file(): text, search, check      - options.py    what is asked, what comes of it
- search.py      rounds of candidates                       - state.py      what is kept after every round
- expansion.py   gradients and curvature of the divergence  - memory.py     those of all rounds together
- program.py     the next candidates                        - budget.py     what may be chosen
- passes.py      the divergence of candidates               - matrices.py   experts in every type
- blocks.py      which quantized blocks are measured
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mc_gguf.common.arguments import (
    MAX_THREADS,
    PathLike,
    Paths,
    to_bytes,
    to_path,
    to_paths,
    to_seconds,
    whole,
)
from mc_gguf.common.errors import about
from mc_gguf.common.extras import require_extra
from mc_gguf.common.files import check_folder
from mc_gguf.common.progress import ProgressListener, listening

if TYPE_CHECKING:
    from mc_gguf.refine.options import Refined


def refine(
    source: PathLike,
    plan: PathLike,
    output: PathLike,
    *,
    time: str | float = "10m",
    calibration: PathLike | None = None,
    text: Paths = (),
    tokens: int = 32_768,
    ctx: int = 512,
    compensate: bool = True,
    calibration_text: Paths = (),
    bank: PathLike | None = None,
    memory: str | int | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = True,
    quiet: bool = False,
    progress: ProgressListener | None = None,
) -> Refined:
    """Search for a better plan of the same size, by the KL divergence of the model's output.

    The search stops when its time is over, or at Ctrl-C, and the best plan found is written. A killed search
    continues where it was when it is started again with the same arguments.

    Args:
        source: the model, a Hugging Face directory or a 16-bit GGUF.
        plan: the plan to start from (JSON).
        output: the plan to write.
        time: how long to search, preparations included: "90s", "10m", "2h", or seconds.
        calibration: the plan's calibration file; by default it is looked for beside the plan.
        text: UTF-8 files to measure on; by default the mixture that comes with mc_gguf.
        tokens: tokens of the text; a quarter of them is held out for the final check.
        ctx: tokens per row of text; at most the model's context.
        compensate: measure experts as quantize rounds them with error compensation (types near the plan's),
            or as ggml's quantizers round them (all types).
        calibration_text: the text that the calibration was made from; by default the mixture that comes with
            mc_gguf.
        bank: keep and reuse quantized experts in this folder; quantize() takes the compensated ones.
        memory: for dequantized experts, "4GiB" or bytes.
        seed: random seed. The rows of text differ from those that calibrate() takes with the same seed.
        threads: threads; by default all usable cores.
        resume: continue a killed search; False starts again.
        quiet: show no progress on stderr.
        progress: called with a ProgressState for every bit of progress, instead of showing it on stderr.

    Returns:
        The new plan, with the divergences before and after and what the search did.

    Raises:
        MissingExtraError: torch or another package of mc-gguf[convert] is not installed.
        SourceError: the model or the text cannot be read, or the architecture is not supported.
        ArtifactError: model, plan and calibration do not belong together.
        McError: there is too little text, a number is too small, or `time` or `memory` cannot be understood.

    Example:
        >>> from mc_gguf.refine import refine
        >>> found = refine(
        ...     "models/tiny-mixtral", "m.plan.json", "m.refined.plan.json", time="1s", tokens=1024, ctx=128,
        ...     compensate=False,
        ... )
        >>> found.plan.expert_bpw <= 2.8
        True
    """
    require_extra("convert")
    from mc_gguf.artifacts import Plan
    from mc_gguf.artifacts.matching import find_calibration, possible_calibrations
    from mc_gguf.refine.options import RefinementOptions
    from mc_gguf.source import open_checkpoint, refuse_to_overwrite

    tokens, ctx = whole(2, tokens=tokens, ctx=ctx)
    (threads,) = whole(1, MAX_THREADS, or_none=True, threads=threads)
    (seed,) = whole(0, seed=seed)
    with about("bank"):
        check_folder(to_path(bank))
    texts, calibrated = to_paths(text), to_paths(calibration_text)
    found = possible_calibrations(Path(plan).parent)
    inputs = (Path(plan), *texts, *calibrated, *found, *to_paths(calibration))
    refuse_to_overwrite(Path(output), Path(source), *inputs)
    start = Plan.load(Path(plan))
    options = RefinementOptions(
        seconds=to_seconds(time, "time"),
        text=texts,
        tokens=tokens,
        ctx=ctx,
        seed=seed + 1,  # not the calibration's rows
        threads=threads or 0,
        memory_bytes=None if memory is None else to_bytes(memory, "memory"),
        bank=to_path(bank),
        compensate=compensate,
        calibration_text=calibrated,
    )
    with about("calibration"):
        statistics = find_calibration(start, Path(plan).parent, to_path(calibration))
    checkpoint = open_checkpoint(Path(source))  # before torch is loaded, which takes seconds
    from mc_gguf.refine.refinement import refine_to_file

    with listening(progress):
        return refine_to_file(checkpoint, statistics, start, Path(output), options, resume, quiet)
