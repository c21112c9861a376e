"""Refine a plan on the real KL divergence: what the integer program could not see, within the same budget.

    refine_to_file(checkpoint, calibration, Plan.load("m.plan.json"), Path("m2.plan.json"), Options(600))

The program of allocate adds up errors that were measured one matrix at a time. Here a plan's own divergence
from the unquantized model is measured, with everything quantized, on text; the search (search.py) follows its
gradients. Attention, embeddings and output matrix are taken as in the source: they are the same in every
candidate. What is found is checked on rows of the text that the search never saw.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mc_gguf.artifacts import Calibration, Floats, Plan
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.common.machine import usable_cores
from mc_gguf.common.progress import Progress, progress
from mc_gguf.common.workdir import Workdir
from mc_gguf.compensate.experts import BANK, STATES
from mc_gguf.plan.problem import Ints
from mc_gguf.refine.blocks import NEAR, Blocks, can_compensate, compensated_blocks, ggml_blocks
from mc_gguf.refine.budget import Scope, scope_of
from mc_gguf.refine.matrices import Matrices
from mc_gguf.refine.passes import Evaluator, Layers
from mc_gguf.refine.search import Search
from mc_gguf.refine.state import State, identity, request_digest
from mc_gguf.source.decoder import Decoder
from mc_gguf.source.text import Corpus, load_corpus

if TYPE_CHECKING:
    from mc_gguf.source import Checkpoint

__all__ = ["Options", "Refined", "refine_to_file", "refined_before"]

HELD_OUT = 4  # every fourth row
MIN_ROWS = 8
SEARCH = "search"  # in the working directory
_MEMORY_BYTES = 4 << 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How long, and on what. `seconds` counts everything but the final check; `threads` 0: all cores.

    `memory_bytes` may be taken by dequantized experts (None: 4 GiB); `bank` keeps quantized ones (None: in
    the state, which goes at the end). `compensate`: measure the blocks that quantize makes with error
    compensation on the calibration's text (`calibration_text`, the bundled one if empty).
    """

    seconds: float
    text: tuple[Path, ...] = ()
    tokens: int = 32768
    ctx: int = 512
    seed: int = 1
    threads: int = 0
    memory_bytes: int | None = None
    bank: Path | None = None
    compensate: bool = True
    calibration_text: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Refined:
    """What a search found: mean KL divergence (nats a token) of the plan before and after."""

    plan: Plan
    search_start: float
    search_kld: float
    held_out_start: float
    held_out_kld: float
    held_out_change_se: float
    rounds: int
    accepted: int
    evaluations: int
    changed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        body = {k: v for k, v in asdict(self).items() if k != "plan"}
        return body | {"expert_bpw": self.plan.expert_bpw, "file_bytes": self.plan.file_bytes}

    def lines(self) -> list[str]:
        """As text, one fact a line."""
        change, error = self.held_out_kld - self.held_out_start, self.held_out_change_se
        share = self.held_out_kld / self.held_out_start if self.held_out_start > 0 else 1.0
        rows = [
            ("search KLD", f"{self.search_start:.5f} -> {self.search_kld:.5f}"),
            (
                "held-out KLD",
                f"{self.held_out_start:.5f} -> {self.held_out_kld:.5f} ({share:.3f} of it; "
                f"change {change:+.5f} +- {error:.5f})",
            ),
            (
                "search",
                f"{self.rounds} rounds, {self.accepted} steps accepted, {self.evaluations} "
                f"measurements, {self.seconds:.0f} s",
            ),
            ("changed", f"{self.changed} matrices have another type"),
            ("bits", f"{self.plan.expert_bpw:.4f} per expert weight"),
        ]
        return [f"{name:<16}{text}" for name, text in rows]


def refine_to_file(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    plan: Plan,
    output: Path,
    options: Options,
    resume: bool = True,
    quiet: bool = False,
) -> Refined:
    """Search for `options.seconds` and write the best plan to `output`, with `refinement` saying what it won.

    A killed search is continued (unless `resume` is False); Ctrl-C ends it as if its time were over (while
    blocks are still made for it, it ends everything).
    Raises ArtifactError when source, plan and calibration do not belong together, SourceError for an
    architecture that forward.py does not know, McError when there is too little text.
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
            work = _Work.prepare(checkpoint, calibration, plan, folder, options, quiet)
            return work.run(began, bar)
    finally:
        torch.set_num_threads(before)


def refined_before(
    checkpoint: Checkpoint, calibration: Calibration, plan: Plan, output: Path, options: Options
) -> Plan | None:
    """The plan in `output` if it is what refine_to_file() would search for, from the same and as long."""
    try:
        found = Plan.load(output)
    except (ArtifactError, OSError):
        return None
    asked = request_digest(_identity(checkpoint, calibration, plan, _text(checkpoint, options), options))
    known = found.refinement or {}
    return found if (known.get("request"), known.get("seconds")) == (asked, options.seconds) else None


def _text(checkpoint: Checkpoint, options: Options) -> Corpus:
    length = checkpoint.hparams.get("context_length")
    return load_corpus(checkpoint, options.text, options.tokens, options.ctx, options.seed, length)


def _identity(
    checkpoint: Checkpoint, calibration: Calibration, plan: Plan, text: Corpus, options: Options
) -> dict[str, Any]:
    """All that a search depends on but its time."""
    return identity(
        model=checkpoint.info.fingerprint,
        calibration=calibration.fingerprint,
        plan=plan.fingerprint,
        text=text.to_json(),
        seed=options.seed,
        compensate=options.compensate,
    )


@dataclass(frozen=True, eq=False)
class _Work:
    plan: Plan
    folder: Workdir
    request: str
    options: Options
    scope: Scope
    start: Ints
    layers: Layers
    blocks: Blocks
    search_rows: np.ndarray[Any, np.dtype[np.int32]]
    held_out_rows: np.ndarray[Any, np.dtype[np.int32]]
    directory: Path
    state: State

    @classmethod
    def prepare(
        cls,
        checkpoint: Checkpoint,
        calibration: Calibration,
        plan: Plan,
        folder: Workdir,
        options: Options,
        quiet: bool,
    ) -> _Work:
        scope, start = scope_of(plan, calibration)
        decoder, text = Decoder(checkpoint), _text(checkpoint, options)
        if len(text.rows) < MIN_ROWS:
            raise McError(
                f"{len(text.rows)} rows of text are too few to compare plans on; give more --tokens or --text"
            )
        rows = np.random.default_rng(options.seed).permutation(text.rows)  # the first few are a sample
        held_out = np.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
        blocks = _blocks(checkpoint, calibration, scope, start, folder, options, quiet)
        memory_bytes = options.memory_bytes or _MEMORY_BYTES
        matrices = Matrices(checkpoint, blocks.quantizer, blocks.bank, memory_bytes)
        asked = _identity(checkpoint, calibration, plan, text, options)
        directory = folder.part(SEARCH, asked | {"compensated blocks": blocks.compensated})
        return cls(
            plan,
            folder,
            request_digest(asked),
            options,
            scope,
            start,
            Layers(decoder, matrices),
            blocks,
            rows[~held_out],
            rows[held_out],
            directory,
            State.resume(directory / "state.json", start),
        )

    def run(self, began: float, bar: Progress) -> Refined:
        types = self.scope.problem.types
        evaluator = Evaluator(self.layers, self.search_rows, types)
        search = Search(
            self.scope,
            evaluator,
            self.state,
            self.directory,
            self.options.seed,
            self.options.seconds,
            began,
            reach=self.reach(),
            allowed=self.blocks.allowed,
        )
        search_start, stopped = evaluator.settle(search.assignment(self.start)), False
        try:
            search.run(bar)
        except KeyboardInterrupt:
            stopped = True
            bar.say("stopped; checking the best plan so far (Ctrl-C again to write nothing)")
        if not self.state.rounds:
            log.warning("no round was finished: give more --time, or fewer --tokens")
        found = self.state.columns
        search_kld = evaluator.settle(search.assignment(found))
        del evaluator
        held = Evaluator(self.layers, self.held_out_rows, types)
        before = held.settle(search.assignment(self.start))
        after = held.sweep([search.assignment(found)])[0]
        if after.mean() > before.mean():
            log.warning(
                "what the search found is worse on held-out text (KLD %.5f instead of %.5f): the plan stays "
                "as it was; give more --tokens or another --text",
                after.mean(),
                before.mean(),
            )
            found, after, search_kld = self.start, before, search_start
        return self._result(found, search_start, search_kld, before, after, stopped)

    def reach(self) -> int:
        """Sizes up and down that are tried: all when all matrices fit into the memory, or when few types are
        allowed, else the nearest, so that less is quantized and dequantized in every round."""
        problem = self.scope.problem
        needed = 4 * problem.n_weight * len(problem.types)
        every = self.blocks.allowed is not None or needed <= self.layers.matrices.limit_bytes
        return len(problem.types) if every else NEAR

    def _result(
        self,
        found: Ints,
        search_start: Floats,
        search_kld: Floats,
        before: Floats,
        after: Floats,
        stopped: bool,
    ) -> Refined:
        change = after - before
        figures: dict[str, float] = {
            "search_start": float(search_start.mean()),
            "search_kld": float(search_kld.mean()),
            "held_out_start": float(before.mean()),
            "held_out_kld": float(after.mean()),
            "held_out_change_se": float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else 0.0,
        }
        seconds = self.state.seconds if stopped else self.options.seconds
        asked: dict[str, float | str] = {"request": self.request, "seconds": seconds}
        problem, plan = self.scope.problem, self.plan
        experts = problem.experts(found)
        name = plan.strategy if plan.strategy.endswith("+refine") else f"{plan.strategy}+refine"
        refined = replace(
            plan,
            strategy=name,
            experts=experts,
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
        state = self.state
        return Refined(
            refined,
            **figures,
            rounds=state.rounds,
            accepted=state.accepted,
            evaluations=state.evaluations,
            changed=int((found != self.start).sum()),
            seconds=state.seconds,
        )


def _blocks(
    checkpoint: Checkpoint,
    calibration: Calibration,
    scope: Scope,
    start: Ints,
    work: Workdir,
    options: Options,
    quiet: bool,
) -> Blocks:
    """Those that quantize would write; ggml's where compensation would take too long."""
    folder, threads = options.bank or work.path(BANK), options.threads or usable_cores()
    if options.compensate and can_compensate(calibration):
        found = compensated_blocks(
            checkpoint,
            calibration,
            scope.problem,
            start,
            options.calibration_text,
            folder,
            work.path(STATES),
            threads,
            options.seconds,
            quiet,
        )
        if found is not None:
            return found
    return ggml_blocks(checkpoint, calibration, folder, threads)
