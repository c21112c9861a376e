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
from mc_gguf.cores import usable_cores
from mc_gguf.corpus import load_corpus
from mc_gguf.errors import ArtifactError, McError, SourceError
from mc_gguf.forward import Decoder
from mc_gguf.progress import Progress, progress
from mc_gguf.quantize.bank import Bank, bank_key
from mc_gguf.refine.budget import Scope, scope_of
from mc_gguf.refine.matrices import GgmlQuantizer, Matrices, Quantizer
from mc_gguf.refine.passes import Evaluator, Layers
from mc_gguf.refine.search import Search
from mc_gguf.refine.state import State, forget_partial, partial_directory
from mc_gguf.upstream import pin

if TYPE_CHECKING:
    from mc_gguf.checkpoint import Checkpoint

__all__ = ["Options", "Refined", "refine_to_file"]

HELD_OUT = 4  # every fourth row
MIN_ROWS = 8
NEAR = 2  # sizes up and down where not all of them can be kept
_MEMORY_BYTES = 4 << 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How long, and on what. `seconds` counts everything but the final check; `threads` 0: all cores.

    `memory_bytes` may be taken by dequantized experts (None: 4 GiB); `bank` keeps quantized ones (None: in
    the state, which goes at the end).
    """

    seconds: float
    text: tuple[Path, ...] = ()
    tokens: int = 32768
    ctx: int = 512
    seed: int = 1
    threads: int = 0
    memory_bytes: int | None = None
    bank: Path | None = None


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
            ("held-out KLD", f"{self.held_out_start:.5f} -> {self.held_out_kld:.5f} ({share:.3f} of it; "
             f"change {change:+.5f} +- {error:.5f})"),
            ("search", f"{self.rounds} rounds, {self.accepted} steps accepted, {self.evaluations} "
             f"measurements, {self.seconds:.0f} s"),
            ("changed", f"{self.changed} matrices have another type"),
            ("bits", f"{self.plan.expert_bpw:.4f} per expert weight"),
        ]  # fmt: skip
        return [f"{name:<16}{text}" for name, text in rows]


def refine_to_file(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    plan: Plan,
    output: Path,
    options: Options,
    resume: bool = True,
    quiet: bool = False,
    quantizer: Quantizer | None = None,
) -> Refined:
    """Search for `options.seconds` and write the best plan to `output`, with `refinement` saying what it won.

    A killed search is continued (unless `resume` is False); Ctrl-C ends it as if its time were over.
    `quantizer` makes what the bank lacks (default: ggml's). Raises ArtifactError when source, plan and
    calibration do not belong together, SourceError for a model other than Mixtral, McError when there is too
    little text.
    """
    if checkpoint.info.architecture != "llama":
        raise SourceError(
            "refine knows the blocks of Mixtral (GGUF architecture 'llama'), not "
            f"{checkpoint.info.architecture!r}; quantize the plan as it is"
        )
    if not resume:
        forget_partial(output)
    if calibration is None or plan.model_fingerprint != checkpoint.info.fingerprint:
        raise ArtifactError("the plan was not made from a calibration of this source; run: mc-gguf plan")
    before, began = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(options.threads or usable_cores())
    try:
        with progress("refine", options.seconds, "s", quiet) as bar:
            work = _Work.prepare(checkpoint, calibration, plan, output, options, quantizer)
            result = work.run(began, bar)
    finally:
        torch.set_num_threads(before)
    forget_partial(output)
    return result


@dataclass(frozen=True, eq=False)
class _Work:
    plan: Plan
    output: Path
    options: Options
    scope: Scope
    start: np.ndarray[Any, np.dtype[np.int64]]
    layers: Layers
    search_rows: np.ndarray[Any, np.dtype[np.int32]]
    held_out_rows: np.ndarray[Any, np.dtype[np.int32]]
    state: State

    @classmethod
    def prepare(
        cls, checkpoint: Checkpoint, calibration: Calibration, plan: Plan, output: Path, options: Options,
        quantizer: Quantizer | None,
    ) -> _Work:  # fmt: skip
        scope, start = scope_of(plan, calibration)
        length = checkpoint.hparams.get("context_length")
        text = load_corpus(checkpoint, options.text, options.tokens, options.ctx, options.seed, length)
        if len(text.rows) < MIN_ROWS:
            raise McError(
                f"{len(text.rows)} rows of text are too few to compare plans on; give more --tokens or --text"
            )
        rows = np.random.default_rng(options.seed).permutation(text.rows)  # the first few are a sample
        held_out = np.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
        directory = partial_directory(output)
        key = bank_key(checkpoint.info.fingerprint, calibration.fingerprint, f"ggml {pin().commit}")
        bank = Bank(options.bank or directory / "bank", key)
        threads = options.threads or usable_cores()
        make = quantizer or GgmlQuantizer(checkpoint, calibration, threads)
        matrices = Matrices(checkpoint, make, bank, options.memory_bytes or _MEMORY_BYTES)
        identity = {
            "model": checkpoint.info.fingerprint, "calibration": calibration.fingerprint,
            "plan": plan.fingerprint, "text": text.to_json(), "seed": options.seed,
        }  # fmt: skip
        state = State.resume(directory / "state.json", identity, start)
        layers = Layers(Decoder(checkpoint), matrices)
        return cls(
            plan, output, options, scope, start, layers, rows[~held_out], rows[held_out], state
        )

    def run(self, began: float, bar: Progress) -> Refined:
        directory, types = partial_directory(self.output), self.scope.problem.types
        evaluator = Evaluator(self.layers, self.search_rows, types)
        search = Search(
            self.scope, evaluator, self.state, directory, self.options.seed, self.options.seconds, began,
            reach=self.reach(),
        )  # fmt: skip
        search_start = evaluator.settle(search.assignment(self.start))
        try:
            search.run(bar)
        except KeyboardInterrupt:
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
                "as it was; give more --tokens or another --text", after.mean(), before.mean(),
            )  # fmt: skip
            found, after, search_kld = self.start, before, search_start
        return self._result(found, search_start, search_kld, before, after)

    def reach(self) -> int:
        """Sizes up and down that are tried: all when all matrices fit into the memory, else the nearest, so
        that less is quantized and dequantized in every round."""
        problem = self.scope.problem
        needed = 4 * problem.n_weight * len(problem.types)
        return len(problem.types) if needed <= self.layers.matrices.limit_bytes else NEAR

    def _result(
        self, found: np.ndarray[Any, np.dtype[np.int64]], search_start: Floats, search_kld: Floats,
        before: Floats, after: Floats,
    ) -> Refined:  # fmt: skip
        change = after - before
        figures = {
            "search_start": float(search_start.mean()), "search_kld": float(search_kld.mean()),
            "held_out_start": float(before.mean()), "held_out_kld": float(after.mean()),
            "held_out_change_se": float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else 0.0,
        }  # fmt: skip
        problem, plan = self.scope.problem, self.plan
        experts = problem.experts(found)
        name = plan.strategy if plan.strategy.endswith("+refine") else f"{plan.strategy}+refine"
        refined = replace(
            plan, strategy=name, experts=experts, expert_bpw=problem.bpw(found),
            expert_bytes=problem.expert_bytes(found), file_bytes=self.scope.file_bytes(found),
            predicted_error=problem.predicted_error(found), optimality_gap=None, bits=None,
            refinement=figures,
        ).save(self.output)  # fmt: skip
        state = self.state
        return Refined(
            refined, **figures, rounds=state.rounds, accepted=state.accepted, evaluations=state.evaluations,
            changed=int((found != self.start).sum()), seconds=state.seconds,
        )  # fmt: skip
