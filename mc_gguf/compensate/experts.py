"""Error compensation for a model: the experts' blocks of a plan, put into a Bank, layer by layer.

The inputs of the experts for the calibration's own text lie in a spool (capture/), which calibration left, or
which is made anew by evaluating the text. The Hessians of every expert are those of its own routed inputs
(hessian.py). Every matrix is quantized with and without compensation, and the result with less squared error
on held-out tokens goes into the bank. What the bank has already is not made again, so a killed run continues
where it was.

Memory holds one expert in float32, and the Hessian of down with its factor and copies of both (822 MB each at
n_ff 14336: about 4 GB).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf import __version__
from mc_gguf.artifacts import NO_CALIBRATION, Calibration, ModelInfo, Plan
from mc_gguf.artifacts.matching import check_inputs
from mc_gguf.calibrate.finite import place
from mc_gguf.calibrate.routed import Routing
from mc_gguf.calibrate.verify import verified_function
from mc_gguf.capture.capture import CaptureOptions, LayerRows, capture, rows_at_once, spool_bytes
from mc_gguf.capture.context import Devices
from mc_gguf.capture.copy import MODEL, SPOOL, copy_bytes, runnable
from mc_gguf.capture.expert import Expert, read_expert
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.capture.spool import Spool
from mc_gguf.common.errors import ArtifactError, about
from mc_gguf.common.files import check_space
from mc_gguf.common.machine import memory_bytes
from mc_gguf.common.progress import Progress, progress
from mc_gguf.common.workdir import Workdir
from mc_gguf.compensate.bank import Bank, bank_key, matrix_bytes
from mc_gguf.compensate.hessian import Collector, HessianTokens, Inputs, collect, held_out_tokens
from mc_gguf.compensate.matrix import DEFAULT, CompensationOptions, quantize_compensated, supports
from mc_gguf.compensate.products import fast_products
from mc_gguf.ggml.quantizers import dequantize_rows, init, quantize_rows, warn_if_lost
from mc_gguf.runtime.upstream import patchset_digest
from mc_gguf.source import Checkpoint
from mc_gguf.source.text import Corpus, load_corpus

_REVISION = 4  # of what makes the blocks besides the patch set: a bank of another revision is not used
# In a working directory: the bank, and what the text's evaluation gives to fill it.
BANK, STATES = "bank", "states"

log = logging.getLogger(__name__)

# (layer, expert) -> (projection, type) of the matrices to make.
Wanted = Mapping[tuple[int, int], frozenset[tuple[str, str]]]


@dataclass
class Outcome:
    """What the pass did.

    Attributes:
        compensated: number of matrices that are compensated.
        plain: number of matrices for which ggml's quantizer was better.
        is_complete: whether the pass made all that was missing; False after `keep_going` ended it.
        ratios: squared error on held-out tokens with compensation, divided by that without, for each matrix.
    """

    compensated: int = 0
    plain: int = 0
    is_complete: bool = True
    ratios: list[float] = field(default_factory=list)

    def text(self) -> str:
        """The outcome in one line for the user."""
        count = self.compensated + self.plain
        return (
            f"error compensation: squared error on held-out tokens {np.median(self.ratios):.2f} of ggml's "
            f"quantizers (median of {count} matrices; {self.plain} kept as ggml's quantizers make them)"
        )


def wanted_by(plan: Plan) -> Wanted:
    """The matrices of a plan whose types can be compensated."""
    return {
        (layer, expert): frozenset(
            (p, t) for p in plan.experts if supports(t := plan.type_of(layer, expert, p))
        )
        for layer in plan.layers
        for expert in range(len(plan.experts["down"][0]))
    }


def open_bank(folder: Path, calibration: Calibration, options: CompensationOptions = DEFAULT) -> Bank:
    """The bank of compensated blocks of this calibration, model and set of options, under `folder`."""
    assert calibration.model is not None
    quantizer = f"compensated {__version__} {patchset_digest()} {_REVISION} {options}"
    return Bank(folder, bank_key(calibration.model.fingerprint, calibration.fingerprint, quantizer))


def calibration_text(
    checkpoint: Checkpoint, calibration: Calibration, files: tuple[Path, ...] = ()
) -> Corpus:
    """The token rows that the calibration was made from, out of the bundled text or `files`.

    Raises ArtifactError when the calibration was made from another text.
    """
    recorded = calibration.corpus
    with about("calibration_text"):
        corpus = load_corpus(checkpoint, files, recorded["tokens"], recorded["ctx"], recorded["seed"])
    if corpus.sha256 != recorded["sha256"]:
        names = ", ".join(recorded["sources"])
        raise ArtifactError(
            f"the calibration was made from another text ({names}); error compensation needs the same one: "
            "give that one, or do without error compensation",
            parameter=("calibration_text", "compensate"),
        )
    if corpus.rows.shape != (recorded["rows"], recorded["ctx"]):
        raise ArtifactError("this text gives other token rows than the calibration has; calibrate again")
    return corpus


def compensate(
    checkpoint: Checkpoint,
    calibration: Calibration,
    wanted: Wanted,
    corpus: Corpus,
    bank: Bank,
    threads: int,
    bar: Progress | None = None,
    options: CompensationOptions = DEFAULT,
    states: Path | None = None,
    keep_going: Callable[[int, int], bool] | None = None,
) -> Outcome:
    """Fill `bank` with the wanted matrices: the same bytes for any number of `threads`, however often it was
    interrupted.

    What the runtime makes of the text is kept in the folder `states`, which belongs to one model and
    calibration; without one, it is in a temporary folder. Layers whose experts compute something that is not
    recognised (capture/function.py) are left out: their matrices are quantized without compensation.

    `keep_going` is asked after every expert, with the number of matrices made and of all; when it returns
    False, the pass ends and the outcome is not complete.
    """
    outcome = Outcome()
    missing = missing_from(bank, wanted)
    if not missing:
        return outcome
    init({name for kinds in missing.values() for _, name in kinds})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), fast_products(checkpoint.info.n_embd), ExitStack() as stack:
            folder = states or Path(stack.enter_context(TemporaryDirectory(prefix="mc-gguf-")))
            spool = captured(checkpoint, corpus, folder, threads, bar)
            run = _Pass(checkpoint, calibration, missing, bank, threads, options, outcome, spool, keep_going)
            run.run(corpus.rows, bar)
    finally:
        torch.set_num_threads(before)
    if states and outcome.is_complete:
        shutil.rmtree(states)
    return outcome


def captured(
    checkpoint: Checkpoint, corpus: Corpus, folder: Path, threads: int, bar: Progress | None
) -> Spool:
    """What the runtime makes of the text, from `folder` as far as it is there."""
    spool = Spool(folder / SPOOL)
    if spool.done < corpus.n_tokens:
        none = np.zeros(0, dtype=np.int64)
        with progress("capture", total=corpus.n_tokens, unit="tokens", quiet=bar is None) as own:
            model = runnable(checkpoint, folder / MODEL, own)
            n_seq = rows_at_once(checkpoint.info, corpus.rows, model.stat().st_size, memory_bytes())
            options = CaptureOptions(corpus.rows, none, none, n_seq)
            capture(model, checkpoint.info, options, Devices(threads), spool, own)
    return spool


def compensated_bank(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    plan: Plan,
    work: Workdir,
    files: tuple[Path, ...] = (),
    threads: int = 1,
    quiet: bool = False,
    folder: Path | None = None,
) -> Bank | None:
    """A bank with the compensated blocks that `plan` needs, in `folder` or in `work`, the output's working
    directory. `files`: the calibration's text, unless it was the bundled one.

    None where nothing can be compensated: a plan of 16 bits, or statistics without a text.
    """
    if calibration is None or calibration.fingerprint == NO_CALIBRATION:
        return None
    check_inputs(checkpoint.info, calibration, plan)
    wanted = wanted_by(plan)
    if not any(wanted.values()):
        return None
    if "sha256" not in calibration.corpus:
        log.warning("the calibration does not say what its text was; quantizing without error compensation")
        return None
    corpus = calibration_text(checkpoint, calibration, files)
    bank, states = open_bank(folder or work.path(BANK), calibration), work.path(STATES)
    own_bank = 0 if folder else bank_bytes(checkpoint.info, wanted)
    work.check_space(own_bank + state_bytes(checkpoint, corpus.rows.size) + (plan.file_bytes or 0))
    if folder:
        check_space(folder, bank_bytes(checkpoint.info, missing_from(bank, wanted)), f"the bank {folder}")
    with progress("compensate", unit="matrices", quiet=quiet) as bar:
        outcome = compensate(checkpoint, calibration, wanted, corpus, bank, threads, bar, states=states)
        if outcome.ratios:
            bar.say(outcome.text())
    return bank


def missing_from(bank: Bank, wanted: Wanted) -> Wanted:
    """Those of the wanted matrices that `bank` lacks."""
    missing = {
        (layer, expert): frozenset((p, name) for p, name in kinds if bank.get(layer, p, expert, name) is None)
        for (layer, expert), kinds in wanted.items()
    }
    return {key: kinds for key, kinds in missing.items() if kinds}


def bank_bytes(model: ModelInfo, wanted: Wanted) -> int:
    """What the wanted matrices take on disk in a bank."""
    return sum(
        matrix_bytes(*model.expert_shape(projection, layer), name)
        for (layer, _), kinds in wanted.items()
        for projection, name in kinds
    )


def state_bytes(checkpoint: Checkpoint, n_tokens: int) -> int:
    """About the most that the evaluation of a text keeps on disk."""
    return copy_bytes(checkpoint) + spool_bytes(checkpoint.info, n_tokens, 0, 0)


@dataclass(frozen=True, eq=False)
class _Pass:
    checkpoint: Checkpoint
    calibration: Calibration
    missing: Wanted
    bank: Bank
    threads: int
    options: CompensationOptions
    outcome: Outcome
    spool: Spool
    keep_going: Callable[[int, int], bool] | None

    def run(self, rows: NDArray[np.int32], bar: Progress | None) -> None:
        """Go through the layers with a missing matrix."""
        total, made = sum(len(kinds) for kinds in self.missing.values()), 0
        held_out = held_out_tokens(*rows.shape)
        for layer in sorted({layer for layer, _ in self.missing}):
            found = LayerRows(self.spool, layer, rows.size, 0)
            routing = Routing(found)
            function, _ = verified_function(self.checkpoint, routing)
            for number in sorted(expert for at, expert in self.missing if at == layer):
                kinds = self.missing[layer, number]
                if function is not None:
                    self._expert(layer, number, kinds, function, routing, held_out)
                made += len(kinds)
                if bar:
                    bar.update(made, total, note=f"layer {layer}")
                if self.keep_going and not self.keep_going(made, total):
                    self.outcome.is_complete = False
                    return

    def _expert(
        self,
        layer: int,
        number: int,
        kinds: frozenset[tuple[str, str]],
        function: ExpertFunction,
        routing: Routing,
        held_out: Tensor,
    ) -> None:
        expert = read_expert(self.checkpoint, layer, number, function)
        tokens = HessianTokens.enough(routing, number, max(expert.down.shape), held_out)
        projections = {p for p, _ in kinds}
        collector = Collector(expert, bool(projections - {"down"}), "down" in projections)
        collect(expert, routing, tokens, collector)
        for projection, name in sorted(kinds):
            inputs = collector.inputs(projection == "down")
            with place(layer, f"expert {number}, {projection}"):
                blocks = self._matrix(layer, number, projection, name, expert, inputs)
            stack, weights = f"blk.{layer}.ffn_{projection}_exps.weight", expert.matrices[projection].numpy()
            warn_if_lost(f"{stack}, expert {number}", weights, blocks, name)
            self.bank.put(layer, projection, number, name, blocks)

    def _matrix(
        self, layer: int, number: int, projection: str, name: str, expert: Expert, inputs: Inputs
    ) -> NDArray[np.uint8]:
        """The blocks that are better on held-out inputs; if there are none, the compensated blocks."""
        weights: NDArray[np.float32] = expert.matrices[projection].numpy()
        importance = self.calibration.imatrix(layer, projection, number)
        plain = quantize_rows(weights, name, importance, self.threads)
        options = self.options.for_tokens(inputs.n_tokens, weights.shape[1])
        best = quantize_compensated(weights, name, inputs.hessian, importance, options, self.threads, plain)
        losses = [output_error(weights, blocks, name, inputs.held_out) for blocks in (best, plain)]
        if losses[1] > 0:
            self.outcome.ratios.append(losses[0] / losses[1])
        if losses[1] < losses[0]:
            self.outcome.plain += 1
            return plain
        self.outcome.compensated += 1
        return best


def output_error(
    weights: NDArray[np.float32], blocks: NDArray[np.uint8], type_name: str, inputs: Tensor
) -> float:
    """|(W - Q) x|^2, summed over the inputs x [tokens, n]."""
    rows, cols = weights.shape
    error = torch.from_numpy(dequantize_rows(blocks, type_name, cols, rows)).sub_(torch.from_numpy(weights))
    return float((inputs @ error.T).square().sum(dtype=torch.float64))
