"""The whole step: matrices compensated into a bank, the file written, the bank removed."""

from __future__ import annotations

from pathlib import Path

from mc_gguf.artifacts import Calibration, Plan
from mc_gguf.common.machine import usable_cores
from mc_gguf.common.progress import progress
from mc_gguf.compensate.experts import compensated_bank, forget_bank
from mc_gguf.container import MixedGguf
from mc_gguf.quantize.writer import quantize
from mc_gguf.source import Checkpoint


def quantize_to_file(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    plan: Plan,
    output: Path,
    *,
    compensate: bool = True,
    text: tuple[Path, ...] = (),
    bank: Path | None = None,
    threads: int | None = None,
    resume: bool = True,
    keep_bank: bool = False,
    quiet: bool = False,
) -> MixedGguf:
    """The output, written and validated.

    `compensate`: round with error compensation on the calibration's own text (`text`; the bundled one if
    empty), taking the matrices that `bank` has. `keep_bank`: a search has just filled the bank beside the
    output; use it also when `resume` is False.
    """
    n_thread, compensated = threads or usable_cores(), None
    if not resume and not keep_bank:
        forget_bank(output)
    if compensate:
        compensated = compensated_bank(checkpoint, calibration, plan, output, text, n_thread, quiet, bank)
    with progress("quantize", unit="M weights", quiet=quiet) as bar:
        model = quantize(checkpoint, calibration, plan, output, n_thread, bar, resume, compensated)
    forget_bank(output)
    return model
