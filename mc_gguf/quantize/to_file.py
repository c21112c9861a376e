"""The whole step: matrices compensated into a bank, then the file written."""

from __future__ import annotations

from pathlib import Path

from mc_gguf.artifacts import Calibration, Plan
from mc_gguf.common.files import check_file_size
from mc_gguf.common.machine import usable_cores
from mc_gguf.common.progress import progress
from mc_gguf.compensate.experts import compensated_bank
from mc_gguf.container import MixedGguf
from mc_gguf.quantize.writer import model_workdir, write_model_in
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
    quiet: bool = False,
) -> MixedGguf:
    """The output, written and validated.

    `compensate`: round with error compensation on the calibration's own text (`text`; the bundled one if
    empty), taking the matrices that `bank` has. `resume` False removes what the working directory holds.
    """
    n_thread, compensated = threads or usable_cores(), None
    check_file_size(output, plan.file_bytes or 0)
    with model_workdir(checkpoint.info, calibration, output, resume) as work:
        if compensate:
            compensated = compensated_bank(checkpoint, calibration, plan, work, text, n_thread, quiet, bank)
        with progress("quantize", unit="M weights", quiet=quiet) as bar:
            return write_model_in(work, checkpoint, calibration, plan, n_thread, bar, compensated)
