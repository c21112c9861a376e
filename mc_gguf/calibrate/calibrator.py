"""From a checkpoint and token rows to a Calibration: capture, the layers one by one, the prices; resumable.

1. The runtime evaluates the text, and what it computes goes to a spool (capture/).
2. Every layer is measured from the spool: one expert at a time is in memory (layer.py), then the other
   matrices (matrices.py).
3. The runtime evaluates some of the text again, with one layer or matrix changed in each sequence: that
   gives the price of its errors (capture/price.py).

Memory holds what the runtime needs, or one expert in float32 and its activations: the same for any number of
layers. What is kept on the disk between these steps, state.py says. At the end `calibrate` warns about super
experts and about experts that few tokens reached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration, Floats, ModelInfo
from mc_gguf.calibrate.expert_errors import nominal_errors
from mc_gguf.calibrate.finite import check_finite
from mc_gguf.calibrate.layer import LayerMeasurement
from mc_gguf.calibrate.matrices import Matrix, matrix_types, measured_matrices
from mc_gguf.calibrate.options import (
    DEFAULT_OPTIONS,
    CalibrationOptions,
    calibration_identity,
    measured_types,
)
from mc_gguf.calibrate.state import STATE_VERSION, CalibrationState
from mc_gguf.calibrate.statistics import LayerStatistics, merge_layers, stack_layers
from mc_gguf.calibrate.super_experts import super_experts
from mc_gguf.capture.capture import (
    CaptureOptions,
    LayerRows,
    capture,
    rows_at_once,
    sampled_tokens,
    spool_bytes,
)
from mc_gguf.capture.context import Devices
from mc_gguf.capture.copy import MODEL, SPOOL, copy_bytes, runnable
from mc_gguf.capture.price import Change, divergences, relative_changes
from mc_gguf.capture.spool import Spool
from mc_gguf.common.errors import SourceError
from mc_gguf.common.machine import memory_bytes, return_large_blocks, usable_cores
from mc_gguf.common.progress import Progress, progress
from mc_gguf.common.workdir import Workdir
from mc_gguf.ggml.quantizers import init
from mc_gguf.source.text import Corpus

if TYPE_CHECKING:
    from mc_gguf.source import Checkpoint

FEW_TOKENS = 64

log = logging.getLogger(__name__)


def calibrate_to_file(
    checkpoint: Checkpoint,
    text: Corpus,
    output: Path,
    options: CalibrationOptions = DEFAULT_OPTIONS,
    resume: bool = True,
    quiet: bool = False,
    hand_over: Callable[[Calibration, Path], None] | None = None,
) -> Calibration:
    """calibrate_checkpoint() into the file `output`, continuing what a killed run left beside it unless
    `resume` is False.

    `hand_over` is called with the calibration and the folder in which MODEL and SPOOL are, before they are
    removed.
    """
    types = measured_types(checkpoint.info, options.types)
    identity = calibration_identity(checkpoint.info, text, types, options) | {"state": STATE_VERSION}
    with Workdir(output, identity, resume) as work:
        work.check_space(state_bytes(checkpoint, text.rows, options))
        result = work.path("result.safetensors")
        calibration = calibrate_checkpoint(checkpoint, text, options, work.directory, quiet).save(result)
        if hand_over is not None:
            hand_over(calibration, work.directory)
        work.publish(result)
    return calibration


def state_bytes(checkpoint: Checkpoint, rows: NDArray[np.int32], options: CalibrationOptions) -> int:
    """About the most bytes that a calibration on `rows` [n_rows, ctx] keeps on disk."""
    info, samples = checkpoint.info, _samples(rows, options)
    changes = 2 * 4 * len(samples[0]) * info.expert_width * len(info.expert_layers)
    return copy_bytes(checkpoint) + spool_bytes(info, rows.size, len(samples[0]), len(samples[1])) + changes


def calibrate_checkpoint(
    checkpoint: Checkpoint,
    text: Corpus,
    options: CalibrationOptions = DEFAULT_OPTIONS,
    directory: Path | None = None,
    quiet: bool = False,
) -> Calibration:
    """Statistics of every expert of a model on a text.

    Args:
        checkpoint: the model.
        text: the token rows.
        options: what is measured and how exactly.
        directory: where the state is kept; it belongs to these arguments alone (a Workdir's). Without one,
            the run cannot be continued.
        quiet: whether to show no progress.

    Raises SourceError for a model that the runtime cannot load or that gives values that are not finite, and
    McError for types that do not fit the model.
    """
    return_large_blocks()
    with (
        CalibrationState(directory) as state,
        _threads(options.threads) as threads,
        torch.no_grad(),
        progress("calibrate", unit="tokens", quiet=quiet) as bar,
    ):
        return _Run(checkpoint, text, options, state, threads, bar).run()


def _samples(
    rows: NDArray[np.int32], options: CalibrationOptions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sampled tokens of experts, and of other matrices: the first tokens of the same rows."""
    n_rows, ctx = rows.shape
    length = min(ctx, options.sensitivity_tokens)
    samples = sampled_tokens(n_rows, ctx, options.sensitivity_tokens, length)
    per_row = max(1, min(length, options.matrix_tokens // (len(samples) // length)))
    return samples, samples.reshape(-1, length)[:, :per_row].reshape(-1)


@dataclass(eq=False)
class _Run:
    """One calibration; run() goes through the steps."""

    checkpoint: Checkpoint
    text: Corpus
    options: CalibrationOptions
    state: CalibrationState
    threads: int
    bar: Progress

    def run(self) -> Calibration:
        info = self.checkpoint.info
        types = measured_types(info, self.options.types)
        init(types)
        samples, matrix_samples = _samples(self.text.rows, self.options)
        spool = Spool(self.state.directory / SPOOL)
        _check_tokens(info, self.text.rows)
        self._announce(samples, matrix_samples)
        if spool.done < self.text.rows.size and not self.state.layers:
            _read_all_but_experts(self.checkpoint)
        model = runnable(self.checkpoint, self.state.directory / MODEL, self.bar)
        devices = Devices(self.threads, self.options.gpu_layers, self.options.cpu_moe)
        n_seq = rows_at_once(info, self.text.rows, model.stat().st_size, memory_bytes())
        captured = CaptureOptions(self.text.rows, samples, matrix_samples, n_seq)
        capture(model, info, captured, devices, spool, self.bar)
        for layer in info.expert_layers[len(self.state.layers) :]:
            rows = LayerRows(spool, layer, self.text.rows.size, len(samples))
            work = LayerMeasurement(self.checkpoint, rows, types, samples, self.options, self.threads)
            result = work.run(self.bar)
            self.state.add(result.statistics, result.disturbances)
        names = measured_matrices(info, spool)
        matrices = {name: Matrix(self.checkpoint, spool, name, len(matrix_samples)) for name in names}
        measured = self.state.remembered("matrices", list(names), partial(self._measure_matrices, matrices))
        found = self._divergences(model, devices, samples)
        changes = self._matrix_changes(model, devices, matrix_samples, matrices)
        calibration = self._assemble(types, names, measured, found, changes)
        self.bar.update(self.bar.total)
        _warn(calibration)
        return calibration

    def _announce(self, samples: NDArray[np.int64], matrix_samples: NDArray[np.int64]) -> None:
        """The whole work, in tokens: those of the text, of the changes, and 64 for every expert."""
        info = self.checkpoint.info
        n_matrix = sum(len(t.shape) == 2 and t.name.startswith("blk.") for t in info.tensors)
        changes = 2 * len(info.expert_layers) * len(samples) + n_matrix * len(matrix_samples)
        experts = (len(info.expert_layers) - len(self.state.layers)) * info.n_expert
        self.bar.update(0, self.text.rows.size + changes + experts)

    def _measure_matrices(self, matrices: dict[str, Matrix], names: list[str]) -> dict[str, Any]:
        types = matrix_types(self.checkpoint.info)
        found = {}
        for number, name in enumerate(names):
            self.bar.advance(0, name)
            with place_of(name):
                seed = (self.options.seed, number, 2)
                m = matrices[name].measure(types, self.options.max_rows, seed, self.threads)
            errors = [e if np.isfinite(e) else None for e in m.errors.tolist()]
            found[name] = [errors, m.imatrix.tolist(), m.rounding_error]
        return found

    def _divergences(self, model: Path, devices: Devices, samples: NDArray[np.int64]) -> dict[str, float]:
        """Mean KL divergences, in nats per token, by "drop N" and "round N"."""
        changes: dict[str, Change] = {}
        for i, layer in enumerate(self.checkpoint.info.expert_layers):
            for kind, part in (("drop", 0), ("round", 1)):
                changes[f"{kind} {layer}"] = Change(f"blk.{layer}", partial(self._change, i, part))
        rows = _rows_of(self.text.rows, samples)

        def make(keys: list[str]) -> dict[str, float]:
            values = divergences(model, rows, [changes[key] for key in keys], devices, self.bar)
            return dict(zip(keys, values.tolist(), strict=True))

        found = self.state.remembered("divergences", list(changes), make)
        for key, value in found.items():
            with place_of(key):
                check_finite(value, "divergences")
        return found

    def _matrix_changes(
        self, model: Path, devices: Devices, samples: NDArray[np.int64], matrices: dict[str, Matrix]
    ) -> dict[str, float]:
        """By matrix: relative squared change of the hidden states when it is rounded; nan: not known."""
        rows = _rows_of(self.text.rows, samples)

        def make(keys: list[str]) -> dict[str, float | None]:
            changes = [Change(key, matrices[key].change) for key in keys]
            values = relative_changes(model, rows, changes, devices, self.bar)
            return {key: None if np.isnan(x) else float(x) for key, x in zip(keys, values, strict=True)}

        found = self.state.remembered("matrix-changes", list(matrices), make)
        return {name: np.nan if value is None else value for name, value in found.items()}

    def _change(self, number: int, part: int) -> torch.Tensor:
        return self.state.change(number)[part]

    def _assemble(
        self,
        types: tuple[str, ...],
        names: Sequence[str],
        measured: dict[str, Any],
        found: dict[str, float],
        changes: dict[str, float],
    ) -> Calibration:
        info, tiny = self.checkpoint.info, np.finfo(np.float64).tiny
        statistics = merge_layers(self.state.layers)
        rounding_error = stack_layers(self.state.layers)[LayerStatistics.rounding_error.name]
        dropped, rounded = (
            np.array([found[f"{kind} {layer}"] for layer in info.expert_layers]) for kind in ("drop", "round")
        )
        statistics["routing_sensitivity"] = dropped
        statistics["kld_per_error"] = rounded / np.maximum(rounding_error, tiny)
        statistics["nominal_error"] = nominal_errors(statistics["sq_error"], types)
        if names:
            errors = [[np.inf if e is None else e for e in measured[name][0]] for name in names]
            statistics["matrix_error"] = np.array(errors, dtype=np.float64)
            rounding = np.array([measured[name][2] for name in names])
            statistics["matrix_price"] = self._matrix_prices(
                names, statistics["kld_per_error"], changes, rounding
            )
            statistics["matrix_in"] = np.concatenate([np.float32(measured[n][1]) for n in names])
        corpus = self.text.to_json() | {
            "measured": calibration_identity(info, self.text, types, self.options)
        }
        return Calibration(
            info,
            info.expert_layers,
            types,
            corpus,
            statistics,
            matrices=tuple(names),
            matrix_types=matrix_types(info) if names else (),
        )

    def _matrix_prices(
        self, names: Sequence[str], layer_prices: Floats, changes: dict[str, float], rounding: Floats
    ) -> Floats:
        """Nats per token for a unit of squared error of each matrix's products.

        An error in the hidden states costs the same wherever it comes from: the price of the layer, or of the
        nearest with experts, turns the change of the hidden states that rounding makes into nats. Where the
        graph does not name the hidden states, the median of the other matrices' costs is taken.
        """
        layers = np.array(self.checkpoint.info.expert_layers)
        nearest = [int(np.abs(layers - int(name.split(".")[1])).argmin()) for name in names]
        costs = np.array([changes[n] * layer_prices[i] for n, i in zip(names, nearest, strict=True)])
        known = np.isfinite(costs)
        median = float(np.median(costs[known])) if known.any() else float(np.median(layer_prices)) * 0.01
        return np.asarray(np.where(known, costs, median) / np.maximum(rounding, np.finfo(np.float64).tiny))


@contextmanager
def place_of(name: str) -> Iterator[None]:
    """As finite.place, for what is no layer."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        from mc_gguf.common.errors import McError

        if not isinstance(error, McError):
            raise
        raise SourceError(f"{name}: {error}", parameter=error.parameters) from error


def _rows_of(rows: NDArray[np.int32], samples: NDArray[np.int64]) -> NDArray[np.int32]:
    """The sampled tokens as rows [n, length]."""
    starts = np.flatnonzero(samples % rows.shape[1] == 0)
    return np.ascontiguousarray(rows.reshape(-1)[samples].reshape(len(starts), -1))


def _check_tokens(info: ModelInfo, rows: NDArray[np.int32]) -> None:
    n_vocab = next((t.shape[-1] for t in info.tensors if t.name == "token_embd.weight"), 0)
    if rows.min() < 0 or rows.max() >= n_vocab:
        raise SourceError(f"a token id is outside the model's vocabulary of {n_vocab}")


def _read_all_but_experts(checkpoint: Checkpoint) -> None:
    """Raises SourceError for a damaged tensor outside the experts now: the output matrix, for one, is not
    needed before the end. All experts together are too much to read twice. Tensors of zeros are warned about.
    """
    stacks = {t.name for t in checkpoint.info.stacks.values()}
    others = [t.name for t in checkpoint.info.tensors if t.name not in stacks]
    zeros = [n for n in others if not checkpoint.tensor(n).any() and not n.endswith(".bias")]
    if zeros:
        log.warning(
            "%d tensors are nothing but zeros (%s%s): was the download interrupted?",
            len(zeros),
            ", ".join(zeros[:5]),
            " ..." if len(zeros) > 5 else "",
        )


@contextmanager
def _threads(wanted: int) -> Iterator[int]:
    threads, before = wanted or usable_cores(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _warn(calibration: Calibration) -> None:
    for found in super_experts(calibration):
        log.warning("super expert: %s", found)
    silent = (calibration.frequency > 0) & (calibration.output_sq == 0)
    if silent.any():
        log.warning(
            "%d of %d experts give zeros for every token that they saw: their weights or their inputs are "
            "zero (layer/expert %s)",
            silent.sum(),
            silent.size,
            _names(calibration, silent),
        )
    rare = calibration.frequency < FEW_TOKENS
    if not rare.any():
        return
    log.warning(
        "%d of %d experts saw fewer than %d tokens, %d of them none (layer/expert %s): "
        "their types are a guess; calibrate with more text",
        rare.sum(),
        rare.size,
        FEW_TOKENS,
        (calibration.frequency == 0).sum(),
        _names(calibration, rare),
    )


def _names(calibration: Calibration, which: NDArray[np.bool_]) -> str:
    """Some of the experts that `which` [L, E] marks, as layer/expert."""
    names = [f"{calibration.layers[i]}/{e}" for i, e in zip(*np.nonzero(which), strict=True)]
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
