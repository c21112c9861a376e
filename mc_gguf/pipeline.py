"""calibrate, plan, refine (if asked for) and quantize in one: what `mc-gguf convert` does.

The intermediate files stay beside the output: <name>.calib.safetensors, <name>.plan.json and
<name>.refined.plan.json. A calibration that is there and was made from the same model, text and options is
used again, so another budget costs no second calibration, and so is a refined plan that was searched for from
the same plan, on the same text, for as long. A run that was killed continues inside whichever step it was in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mc_gguf.artifacts import Calibration, Plan
from mc_gguf.calibrate.attention import attention_types
from mc_gguf.calibrate.calibrator import calibrate_to_file
from mc_gguf.calibrate.request import CalibrationOptions, is_calibration_of
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.machine import usable_cores
from mc_gguf.common.progress import progress
from mc_gguf.common.workdir import forget_work
from mc_gguf.container import MixedGguf
from mc_gguf.quantize.writer import model_workdir, quantize_in
from mc_gguf.source import Checkpoint
from mc_gguf.source.text import Corpus

if TYPE_CHECKING:
    from mc_gguf.refine.options import RefinementOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """One conversion: from where to where, and the files in between."""

    checkpoint: Checkpoint
    output: Path
    resume: bool = True
    quiet: bool = False

    @property
    def calibration_path(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.calib.safetensors")

    @property
    def plan_path(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.plan.json")

    def calibrate(self, text: Corpus, options: CalibrationOptions, given: Path | None = None) -> Calibration:
        """The calibration: the given file, the one beside the output if it is the same, or a new one."""
        if given is not None:
            return Calibration.load(given)
        if self.resume and self.calibration_path.is_file():
            try:
                found = Calibration.load(self.calibration_path)
            except ArtifactError as error:
                log.warning("%s; calibrating again", error)
            else:
                current = found.attention_types == attention_types(self.checkpoint.info)  # not an older one
                if current and is_calibration_of(found, self.checkpoint.info, text, options):
                    forget_work(self.calibration_path)  # of a calibration with other options
                    return found
        return calibrate_to_file(
            self.checkpoint, text, self.calibration_path, options, self.resume, self.quiet
        )

    def plan(self, calibration: Calibration, decide: Callable[[Calibration], Plan]) -> Plan:
        """The plan, written beside the output."""
        return decide(calibration).save(self.plan_path)

    @property
    def refined_plan_path(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.refined.plan.json")

    def refine(self, calibration: Calibration, plan: Plan, options: RefinementOptions) -> Plan:
        """The refined plan, written beside the output, or the one that is there. The compensated matrices
        that the search measures are kept for quantize().
        """
        from mc_gguf.compensate.experts import BANK
        from mc_gguf.refine.refinement import refine_to_file, refined_before

        source, path = self.checkpoint, self.refined_plan_path
        if self.resume and (found := refined_before(source, calibration, plan, path, options)):
            return found
        with model_workdir(source.info, calibration, self.output, self.resume) as work:
            options = replace(options, bank=work.path(BANK))
            return refine_to_file(source, calibration, plan, path, options, self.resume, self.quiet).plan

    def quantize(
        self,
        calibration: Calibration | None,
        plan: Plan,
        threads: int | None,
        compensate: bool = True,
        text: tuple[Path, ...] = (),
        bank_folder: Path | None = None,
        keep_bank: bool = False,
    ) -> MixedGguf:
        """The output, written and validated. `compensate`: with error compensation, on the calibration's own
        text (`text`, the bundled one if empty), taking what `bank_folder` has. `keep_bank`: what lies beside
        the output is refine()'s, made in this run.
        """
        from mc_gguf.compensate.experts import compensated_bank

        n_thread, bank = threads or usable_cores(), None
        resume = self.resume or keep_bank
        with model_workdir(self.checkpoint.info, calibration, self.output, resume) as work:
            if compensate:
                bank = compensated_bank(
                    self.checkpoint, calibration, plan, work, text, n_thread, self.quiet, bank_folder
                )
            with progress("quantize", unit="M weights", quiet=self.quiet) as bar:
                return quantize_in(work, self.checkpoint, calibration, plan, n_thread, bar, bank)


def refinement_text(plan: Plan) -> str:
    """One line for the user: what refinement won."""
    found = plan.refinement or {}
    start, end = found["held_out_start"], found["held_out_kld"]
    return f"refined: KL divergence on held-out text {start:.4f} -> {end:.4f}"
