"""The last step of a conversion: a plan carried out on a source model, into one GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mc_gguf.common.arguments import MAX_THREADS, PathLike, Paths, to_path, to_paths, whole
from mc_gguf.common.errors import about
from mc_gguf.common.extras import require_extra
from mc_gguf.common.files import check_folder
from mc_gguf.common.progress import ProgressListener, listening

if TYPE_CHECKING:
    from mc_gguf.container import MixedGguf


def quantize(
    source: PathLike,
    plan: PathLike,
    output: PathLike,
    *,
    calibration: PathLike | None = None,
    compensate: bool = True,
    calibration_text: Paths = (),
    bank: PathLike | None = None,
    threads: int | None = None,
    resume: bool = True,
    quiet: bool = False,
    progress: ProgressListener | None = None,
) -> MixedGguf:
    """Quantize a model by a plan into one GGUF.

    A killed run continues where it was when it is started again with the same arguments, and gives the same
    bytes.

    Args:
        source: a Hugging Face directory or a 16-bit GGUF.
        plan: the plan to carry out (JSON).
        output: the GGUF to write.
        calibration: the plan's calibration file; by default it is looked for beside the plan.
        compensate: round experts with error compensation: slower, and much closer to 16 bits.
        calibration_text: the text that the calibration was made from; by default the mixture that comes with
            mc_gguf.
        bank: take compensated experts from this folder, and keep them there.
        threads: threads; by default all usable cores.
        resume: continue a killed run; False starts again.
        quiet: show no progress on stderr.
        progress: called with a ProgressState for every bit of progress, instead of showing it on stderr.

    Returns:
        The file that was written, opened and validated.

    Raises:
        MissingExtraError: torch or another package of mc-gguf[convert] is not installed.
        SourceError: the model cannot be read, or `output` is one of its files.
        ArtifactError: model, plan and calibration do not belong together.
        McError: a tensor cannot have the type that the plan gives it, or `threads` is too small.

    Example:
        >>> from mc_gguf.quantize import quantize
        >>> model = quantize("models/tiny-mixtral", "m.plan.json", "m.gguf", compensate=False)
        >>> model.is_mixed
        True
    """
    require_extra("convert")
    from mc_gguf.artifacts import Plan
    from mc_gguf.artifacts.matching import find_calibration, possible_calibrations
    from mc_gguf.source import open_checkpoint, refuse_to_overwrite

    (threads,) = whole(1, MAX_THREADS, or_none=True, threads=threads)
    with about("bank"):
        check_folder(to_path(bank))
    texts = to_paths(calibration_text)
    found = possible_calibrations(Path(plan).parent)
    refuse_to_overwrite(Path(output), Path(source), Path(plan), *texts, *found, *to_paths(calibration))
    the_plan = Plan.load(Path(plan))
    with about("calibration"):
        statistics = find_calibration(the_plan, Path(plan).parent, to_path(calibration))
    checkpoint = open_checkpoint(Path(source))  # before torch is loaded, which takes seconds
    from mc_gguf.quantize.to_file import quantize_to_file

    with listening(progress):
        return quantize_to_file(
            checkpoint,
            statistics,
            the_plan,
            Path(output),
            compensate=compensate,
            text=texts,
            bank=to_path(bank),
            threads=threads,
            resume=resume,
            quiet=quiet,
        )
