"""Refine a plan on the real KL divergence: what the integer program could not see, within the same budget.

    plan = Plan.load(Path("m.plan.json"))
    refine_to_file(checkpoint, calibration, plan, Path("m2.plan.json"), RefinementOptions(seconds=600))

plan() adds up errors that were measured one matrix at a time. Here a plan's own divergence from the
unquantized model is measured on text, with all experts quantized, and the search (search.py) follows its
gradients. Attention, embeddings and the output matrix are taken from the source: they are the same in every
candidate. What the search finds is checked on rows of the text that it never saw.

docs/explanation/refinement.md explains the method and what it is worth.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration, Floats, Plan
from mc_gguf.common.errors import ArtifactError, McError, about
from mc_gguf.common.machine import usable_cores
from mc_gguf.common.progress import Progress, progress
from mc_gguf.common.workdir import Workdir
from mc_gguf.compensate.experts import BANK, STATES
from mc_gguf.plan.problem import Ints
from mc_gguf.refine.blocks import NEAR, Blocks, can_compensate, compensated_blocks, ggml_blocks
from mc_gguf.refine.budget import Scope, scope_of
from mc_gguf.refine.matrices import Matrices
from mc_gguf.refine.options import MIN_ROWS, Refined, RefinementOptions
from mc_gguf.refine.passes import Assignment, Evaluator, Layers
from mc_gguf.refine.search import Search
from mc_gguf.refine.state import SearchState, identity, request_digest
from mc_gguf.source.decoder import Decoder
from mc_gguf.source.text import Corpus, load_corpus

if TYPE_CHECKING:
    from mc_gguf.source import Checkpoint

HELD_OUT = 4  # every fourth row
SEARCH = "search"  # in the working directory
_MEMORY_BYTES = 4 << 30

log = logging.getLogger(__name__)


def refine_to_file(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    plan: Plan,
    output: Path,
    options: RefinementOptions,
    resume: bool = True,
    quiet: bool = False,
) -> Refined:
    """Search for `options.seconds` and write the best plan to `output`; its `refinement` says what was won.

    A search that was killed is continued unless `resume` is False. Ctrl-C ends a search as if its time were
    over; while quantized experts are still made for it, Ctrl-C ends everything.

    Raises:
        ArtifactError: source, plan and calibration do not belong together.
        SourceError: the decoder (source/decoder.py) does not know the architecture.
        McError: the text is too short.
    """
    if calibration is None or plan.model_fingerprint != checkpoint.info.fingerprint:
        raise ArtifactError("the plan was not made from a calibration of this source; run: mc-gguf plan")
    before, began = torch.get_num_threads(), time.monotonic()
    made_from = {"model": checkpoint.info.fingerprint, "calibration": calibration.fingerprint}
    torch.set_num_threads(options.threads or usable_cores())
    try:
        with (
            Workdir(output, made_from, resume) as folder,
            progress("refine", options.seconds, "s", quiet) as bar,
        ):
            request = _Request(checkpoint, calibration, plan, options)
            return _Refinement.prepare(request, folder, quiet).run(began, bar)
    finally:
        torch.set_num_threads(before)


def refined_before(
    checkpoint: Checkpoint, calibration: Calibration, plan: Plan, output: Path, options: RefinementOptions
) -> Plan | None:
    """The plan in `output` if refine_to_file() would search for the same one, from the same and for as
    long.
    """
    try:
        found = Plan.load(output)
    except (ArtifactError, OSError):
        return None
    asked = request_digest(_Request(checkpoint, calibration, plan, options).identity())
    known = found.refinement or {}
    return found if (known.get("request"), known.get("seconds")) == (asked, options.seconds) else None


@dataclass(frozen=True, eq=False)
class _Request:
    """What is refined, and how."""

    checkpoint: Checkpoint
    calibration: Calibration
    plan: Plan
    options: RefinementOptions

    @cached_property
    def text(self) -> Corpus:
        options, length = self.options, self.checkpoint.hparams.get("context_length")
        rows = (options.text, options.tokens, options.ctx, options.seed, length)
        with about("text"):
            return load_corpus(self.checkpoint, *rows)

    def identity(self) -> dict[str, Any]:
        """All that a search depends on but its time."""
        return identity(
            model=self.checkpoint.info.fingerprint,
            calibration=self.calibration.fingerprint,
            plan=self.plan.fingerprint,
            text=self.text.to_json(),
            seed=self.options.seed,
            compensate=self.options.compensate,
        )

    def split_rows(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows of the text to search on, and held-out rows. Raises McError when there are too few."""
        if len(self.text.rows) < MIN_ROWS:
            raise McError(
                f"{len(self.text.rows)} rows of text are too few to compare plans on; give more text or "
                "more tokens",
                parameter=("text", "tokens"),
            )
        # Shuffled, so that the first few are a sample of the whole text.
        rows = np.random.default_rng(self.options.seed).permutation(self.text.rows)
        held_out = np.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
        return rows[~held_out], rows[held_out]

    def blocks(self, scope: Scope, start: Ints, work: Workdir, quiet: bool) -> Blocks:
        """The blocks that quantize would write, or ggml's where compensation would take too long."""
        options = self.options
        folder, threads = options.bank or work.path(BANK), options.threads or usable_cores()
        found = None
        if options.compensate and can_compensate(self.calibration):
            found = compensated_blocks(
                self.checkpoint,
                self.calibration,
                scope.problem,
                start,
                options.calibration_text,
                folder,
                work.path(STATES),
                threads,
                options.seconds,
                quiet,
            )
        return found or ggml_blocks(self.checkpoint, self.calibration, folder, threads)


@dataclass(frozen=True, eq=False)
class _Refinement:
    """One refinement, ready to run: the search starts from the columns `start` of `scope`."""

    request: _Request
    folder: Workdir
    scope: Scope
    start: Ints
    layers: Layers
    blocks: Blocks
    search_rows: NDArray[np.int32]
    held_out_rows: NDArray[np.int32]
    directory: Path
    state: SearchState

    @classmethod
    def prepare(cls, request: _Request, folder: Workdir, quiet: bool) -> _Refinement:
        scope, start = scope_of(request.plan, request.calibration)
        decoder = Decoder(request.checkpoint)
        search_rows, held_out_rows = request.split_rows()
        blocks = request.blocks(scope, start, folder, quiet)
        memory_bytes = request.options.memory_bytes or _MEMORY_BYTES
        matrices = Matrices(request.checkpoint, blocks.quantizer, blocks.bank, memory_bytes)
        directory = folder.part(SEARCH, request.identity() | {"compensated blocks": blocks.compensated})
        return cls(
            request,
            folder,
            scope,
            start,
            Layers(decoder, matrices),
            blocks,
            search_rows,
            held_out_rows,
            directory,
            SearchState.resume(directory / "state.json", start),
        )

    def run(self, began: float, bar: Progress) -> Refined:
        """Search, check what was found on held-out rows, and write the better plan."""
        evaluator = Evaluator(self.layers, self.search_rows, self.scope.problem.types)
        search_start = evaluator.settle(self._assignment(self.start))
        stopped = self._search(evaluator, began, bar)
        found = self.state.columns
        search_kld = evaluator.settle(self._assignment(found))
        del evaluator  # its hidden states, before those of the next one are made
        before, after = self._check(found)
        if after.mean() > before.mean():
            log.warning(
                "what the search found is worse on held-out text (KLD %.5f, not %.5f nats per token), so the "
                "plan stays as it was; give more text or more tokens",
                after.mean(),
                before.mean(),
            )
            found, after, search_kld = self.start, before, search_start
        change = after - before
        figures = {
            "search_start": float(search_start.mean()),
            "search_kld": float(search_kld.mean()),
            "held_out_start": float(before.mean()),
            "held_out_kld": float(after.mean()),
            "held_out_change_se": float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else 0.0,
        }
        return self._publish(found, figures, self.state.seconds if stopped else self.request.options.seconds)

    def _search(self, evaluator: Evaluator, began: float, bar: Progress) -> bool:
        """Search until the time is over; whether the user stopped it before."""
        search = Search(
            self.scope,
            evaluator,
            self.state,
            self.directory,
            self.request.options.seed,
            self.request.options.seconds,
            began,
            reach=self._reach(),
            allowed=self.blocks.allowed,
        )
        stopped = False
        try:
            search.run(bar)
        except KeyboardInterrupt:
            stopped = True
            bar.say("stopped; checking the best plan so far (Ctrl-C again to write nothing)")
        if not self.state.rounds:
            log.warning("no round was finished: give the search more time, or fewer tokens")
        return stopped

    def _check(self, found: Ints) -> tuple[Floats, Floats]:
        """Divergence of each held-out row, of the plan as it was and of `found`."""
        evaluator = Evaluator(self.layers, self.held_out_rows, self.scope.problem.types)
        before = evaluator.settle(self._assignment(self.start))
        return before, evaluator.sweep([self._assignment(found)])[0]

    def _assignment(self, columns: Ints) -> Assignment:
        return Assignment(self.scope.problem.types, columns)

    def _reach(self) -> int:
        """How many sizes up and down from the incumbent's are tried.

        All of them when all matrices fit into the memory, or when few types are allowed anyway. Otherwise
        only the nearest, so that each round has less to quantize and dequantize.
        """
        problem = self.scope.problem
        needed = 4 * problem.n_weight * len(problem.types)
        every = self.blocks.allowed is not None or needed <= self.layers.matrices.limit_bytes
        return len(problem.types) if every else NEAR

    def _publish(self, found: Ints, figures: dict[str, float], seconds: float) -> Refined:
        """The plan with the columns `found`, written; `seconds` is how long this search counts as."""
        problem, plan, state = self.scope.problem, self.request.plan, self.state
        asked: dict[str, float | str] = {
            "request": request_digest(self.request.identity()),
            "seconds": seconds,
        }
        refined = replace(
            plan,
            strategy=plan.strategy if plan.strategy.endswith("+refine") else f"{plan.strategy}+refine",
            experts=problem.experts(found),
            expert_bpw=problem.bpw(found),
            expert_bytes=problem.expert_bytes(found),
            file_bytes=self.scope.file_bytes(found),
            predicted_error=problem.predicted_error(found),
            optimality_gap=None,
            bits=None,
            predicted_kld=None,
            layer_ratio=None,
            refinement={**figures, **asked},
        ).save(self.folder.path("result.json"))
        self.folder.publish(self.folder.path("result.json"))
        return Refined(
            refined,
            **figures,
            rounds=state.rounds,
            accepted=state.accepted,
            evaluations=state.evaluations,
            changed=int((found != self.start).sum()),
            seconds=state.seconds,
        )
