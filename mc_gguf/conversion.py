"""A conversion: calibrate, plan, refine (if asked for), quantize. Nothing else knows the order of the steps.

The intermediate files stay beside the output: NAME.calib.safetensors, NAME.plan.json and, after a search,
NAME.refined.plan.json. What is there already, made from the same inputs with the same options, is used again:
another budget needs no second calibration. A killed run continues inside the step that it was in.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from mc_gguf import container
from mc_gguf.artifacts import NO_CALIBRATION, Calibration, FixedTypes, ModelInfo, Plan
from mc_gguf.calibrate.arguments import CalibrationRequest
from mc_gguf.common.arguments import PathLike, to_path, to_paths, to_seconds
from mc_gguf.common.errors import ArtifactError, McError, NoBudgetError, about
from mc_gguf.common.extras import require_extra
from mc_gguf.common.files import check_file_size, check_output, check_space
from mc_gguf.common.lock import reserved
from mc_gguf.common.machine import memory_bytes
from mc_gguf.common.workdir import forget_work, work_bytes
from mc_gguf.container import MixedGguf
from mc_gguf.plan import stand_in
from mc_gguf.plan.problem import Experts, FileBytes
from mc_gguf.plan.proposals import propose_sizes
from mc_gguf.plan.request import PlanRequest
from mc_gguf.routing.metadata import RoutingMetadata, default_metadata, routing_metadata_from
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.source import Checkpoint, open_checkpoint, refuse_to_overwrite
from mc_gguf.source.text import Corpus

if TYPE_CHECKING:
    from mc_gguf.calibrate.options import CalibrationOptions
    from mc_gguf.refine.options import RefinementOptions

log = logging.getLogger(__name__)


def file_bytes_for(calibration: Calibration, source: ModelInfo | None = None) -> FileBytes | None:
    """The function that gives the exact size of a file; None for published statistics: they know no model.

    `source`: the model as it is now, with other metadata than it had when it was calibrated.
    """
    if calibration.model is None:
        return None
    return partial(_file_bytes, source or calibration.model, routing_metadata_from(calibration))


def _file_bytes(
    model: ModelInfo, routing: RoutingMetadata | None, experts: Experts, fixed: FixedTypes
) -> int:
    return container.file_bytes(model, experts, fixed, routing)


@dataclass(frozen=True, kw_only=True)
class ConversionRequest(PlanRequest, CalibrationRequest):
    """What is planned, what is calibrated on, and how the steps are run: the arguments of convert()."""

    calibration: PathLike | None = None
    compensate: bool = True
    refine: str | float | None = None
    resume: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        PlanRequest.__post_init__(self)
        CalibrationRequest.__post_init__(self)

    def refinement(self) -> RefinementOptions | None:
        """A search on the calibration's text, cut into other rows. None: no search.

        Raises McError when there is nothing to refine, or too little text for it.
        """
        if self.refine is None:
            return None
        from mc_gguf.refine.options import MIN_ROWS, RefinementOptions

        if self.budget.is_sixteen_bit:
            raise McError("16-bit experts leave nothing to refine; give a smaller bpw", parameter="refine")
        if self.tokens // self.ctx < MIN_ROWS:
            needed = MIN_ROWS * self.ctx
            raise McError(
                f"a search needs {MIN_ROWS} rows of text: at least {needed} tokens", parameter="refine"
            )
        text = to_paths(self.text)
        return RefinementOptions(
            to_seconds(self.refine, "refine"),
            text,
            min(self.tokens, max(RefinementOptions.tokens, MIN_ROWS * self.ctx)),
            self.ctx,
            self.seed + 1,
            self.threads or 0,
            compensate=self.compensate,
            calibration_text=text,
        )


@dataclass(frozen=True)
class Conversion:
    """One conversion, step by step: write(plan()), while the output is reserved(), is convert()."""

    source: Path
    output: Path
    request: ConversionRequest

    def reserved(self) -> AbstractContextManager[None]:
        """Keeps other processes from writing the same output, and what lies beside it, during all steps."""
        with about("output"):
            check_output(self.output)
        return reserved(self.output)

    def plan(self) -> Plan:
        """Calibrate, plan, and refine if that was asked for; what can be refused is refused first.

        The plan lies beside the output, in a file of its own when it was refined.
        """
        require_extra("convert")
        given = (*to_paths(self.request.text), *to_paths(self.request.calibration))
        refuse_to_overwrite(self.output, self.source, *given)
        for path in self._written_beside():
            refuse_to_overwrite(path, self.source, *given)
        search = self._check()
        file_bytes = file_bytes_for(self.calibration, self.checkpoint.info)
        decided = self.request.plan(self.calibration, file_bytes)
        plan = decided.save(self.plan_path)
        return self._refine(plan, search) if search else plan

    def write(self, plan: Plan) -> MixedGguf:
        """Quantize by `plan`, which plan() returned."""
        from mc_gguf.quantize.to_file import quantize_to_file

        request, refined = self.request, plan.refinement is not None
        return quantize_to_file(
            self.checkpoint,
            self.calibration,
            plan,
            self.output,
            compensate=request.compensate,
            text=to_paths(request.text),
            threads=request.threads,
            resume=request.resume or refined,  # the search has just left its matrices there
            quiet=request.quiet,
        )

    def discard(self, plan: Plan) -> None:
        """Remove what the search for `plan` keeps for write(), if there was one."""
        if plan.refinement is not None:
            forget_work(self.output)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.source)

    @cached_property
    def calibration(self) -> Calibration:
        """The given one, the one beside the output if it is what would be measured, or a new one; for a
        16-bit file none is needed.
        """
        request = self.request
        if request.budget.is_sixteen_bit:
            return Calibration.blank(self.checkpoint.info)
        if given := to_path(request.calibration):
            with about("calibration"):
                return Calibration.load(given)
        from mc_gguf.calibrate.calibrator import calibrate_to_file

        text, options = request.corpus(self.checkpoint), request.options()
        found = self._found_calibration() if request.resume else None
        path = self.calibration_path
        if found and self._is_current(found, text, options):
            forget_work(path)  # of a calibration with other options
            return found
        self._check_space(text, options)
        return calibrate_to_file(
            self.checkpoint, text, path, options, request.resume, request.quiet, self._hand_over
        )

    def _hand_over(self, calibration: Calibration, folder: Path) -> None:
        """What the runtime made of the text serves error compensation, too."""
        from mc_gguf.capture.copy import MODEL, SPOOL
        from mc_gguf.compensate.experts import STATES
        from mc_gguf.quantize.writer import model_workdir

        if not self.request.compensate:
            return
        with model_workdir(self.checkpoint.info, calibration, self.output, self.request.resume) as work:
            target = work.path(STATES)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for name in (MODEL, SPOOL):
                if (folder / name).exists():
                    (folder / name).rename(target / name)

    @property
    def calibration_path(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.calib.safetensors")

    @property
    def plan_path(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.plan.json")

    @property
    def refined_plan_path(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.refined.plan.json")

    def _written_beside(self) -> Iterator[Path]:
        """What plan() writes; a calibration that is given is not written."""
        yield self.plan_path
        if self.request.refine is not None:
            yield self.refined_plan_path
        if self.request.calibration is None:
            yield self.calibration_path

    def _check(self) -> RefinementOptions | None:
        """The search that is asked for. Raises McError for what no calibration could make possible."""
        request = self.request
        if not request.has_budget:
            memory = memory_bytes()
            raise NoBudgetError(propose_sizes(*self._trial(None), memory), memory)
        search = request.refinement()
        if not request.budget.is_sixteen_bit:
            check_file_size(self.output, self._trial_plan.file_bytes or 0)
        return search

    @cached_property
    def _trial_plan(self) -> Plan:
        """A plan within the budget that is made before anything is measured."""
        return self.request.plan(*self._trial(self.request.expert_types))

    def _check_space(self, text: Corpus, options: CalibrationOptions) -> None:
        """Raises McError when the disk is too small for the states of the calibration, or for the file and
        what its compensation keeps. The two do not lie there at the same time.
        """
        from mc_gguf.calibrate.calibrator import state_bytes
        from mc_gguf.compensate import experts

        model, plan = self.checkpoint.info, self._trial_plan
        finish = plan.file_bytes or 0
        if self.request.compensate:
            finish += experts.bank_bytes(model, experts.wanted_by(plan))
            finish += experts.state_bytes(self.checkpoint, text.rows.size)
        n_bytes = max(finish, state_bytes(self.checkpoint, text.rows, options))
        left_before = work_bytes(self.output, self.calibration_path)
        check_space(self.output.parent, n_bytes - left_before, f"making {self.output.name}")

    def _trial(self, types: tuple[str, ...] | None) -> tuple[Calibration, FileBytes]:
        """A stand-in for every calibration, and the size of files with the routing metadata it will give."""
        model, routing = self.checkpoint.info, None  # opened before torch is loaded, which takes seconds
        from mc_gguf.calibrate.options import measured_types
        from mc_gguf.calibrate.statistics import N_QUANTILES

        if model.n_expert_used > 1:
            profile = RoutingProfile.even(model, N_QUANTILES)
            routing = default_metadata(profile, NO_CALIBRATION, model.fingerprint)
        with about("types"):
            trial = stand_in(model, measured_types(model, types))
        return trial, partial(_file_bytes, model, routing)

    def _found_calibration(self) -> Calibration | None:
        """The one that lies beside the output, unless it is damaged."""
        if not self.calibration_path.is_file():
            return None
        try:
            return Calibration.load(self.calibration_path)
        except ArtifactError as error:
            log.warning("%s; calibrating again", error)
            return None

    def _is_current(self, found: Calibration, text: Corpus, options: CalibrationOptions) -> bool:
        """Whether `found` holds what would be measured now."""
        from mc_gguf.calibrate.options import is_calibration_of

        return is_calibration_of(found, self.checkpoint.info, text, options)

    def _refine(self, plan: Plan, options: RefinementOptions) -> Plan:
        """The refined plan, written beside the output, or the one that is there. The compensated matrices
        that the search measures are kept for write().
        """
        from mc_gguf.compensate.experts import BANK
        from mc_gguf.quantize.writer import model_workdir
        from mc_gguf.refine.refinement import refine_to_file, refined_before

        source, calibration, path = self.checkpoint, self.calibration, self.refined_plan_path
        resume, quiet = self.request.resume, self.request.quiet
        if resume and (found := refined_before(source, calibration, plan, path, options)):
            return found
        with model_workdir(source.info, calibration, self.output, resume) as work:
            options = replace(options, bank=work.path(BANK))
            return refine_to_file(source, calibration, plan, path, options, resume, quiet).plan
