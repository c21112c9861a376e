"""From a checkpoint and token rows to a Calibration: the walk over the layers, resumable.

Each layer is measured by layer.py while the hidden states of the whole text pass through it. Memory holds the
hidden states (16 KB per token at n_embd 4096, twice), one branch, one expert in float32 and its activations:
the same for any number of layers. For disk space see state.py and sensitivity.py.

After each layer the results so far and the hidden states go to a working directory beside the output; a
killed run continues from there and gives the same arrays bit for bit. The directory belongs to one model,
text and set of options. At the end `calibrate` warns about super experts and about experts that few tokens
reached.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import PROJECTIONS, Calibration, Floats, ModelInfo, expert_tensor_name
from mc_gguf.calibrate.attention import attention_types
from mc_gguf.calibrate.expert_errors import nominal_errors
from mc_gguf.calibrate.finite import check_finite, place
from mc_gguf.calibrate.layer import LayerMeasurement
from mc_gguf.calibrate.options import (
    DEFAULT_OPTIONS,
    CalibrationOptions,
    calibration_identity,
    measured_types,
)
from mc_gguf.calibrate.sensitivity import Branches, branch_rows
from mc_gguf.calibrate.state import STATE_VERSION, CalibrationState, state_bytes
from mc_gguf.calibrate.statistics import LayerStatistics, merge_layers, stack_layers
from mc_gguf.calibrate.super_experts import super_experts
from mc_gguf.common.errors import SourceError
from mc_gguf.common.machine import return_large_blocks, usable_cores
from mc_gguf.common.progress import progress
from mc_gguf.common.workdir import Workdir
from mc_gguf.ggml.quantizers import init
from mc_gguf.source.decoder import Decoder
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
) -> Calibration:
    """calibrate_checkpoint() into the file `output`, continuing what a killed run left beside it unless
    `resume` is False.
    """
    types = measured_types(checkpoint.info, options.types)
    identity = calibration_identity(checkpoint.info, text, types, options) | {"state": STATE_VERSION}
    with Workdir(output, identity, resume) as work:
        work.check_space(state_bytes(checkpoint.info, text.rows, options.sensitivity_tokens))
        result = work.path("result.safetensors")
        calibration = calibrate_checkpoint(checkpoint, text, options, work.directory, quiet).save(result)
        work.publish(result)
    return calibration


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
        directory: where the state after each layer is kept; it belongs to these arguments alone (a
            Workdir's). Without one, the run cannot be continued.
        quiet: whether to show no progress.

    Raises SourceError for a model that is not supported or gives values that are not finite, and McError for
    types that do not fit the model.
    """
    info = checkpoint.info
    decoder, types = Decoder(checkpoint), measured_types(info, options.types)
    if info.expert_layers != tuple(range(info.n_layer)):
        raise SourceError("calibration supports models with experts in every layer only")
    return_large_blocks()
    with (
        CalibrationState.resume(directory) as state,
        _threads(options.threads) as threads,
        torch.inference_mode(),
    ):
        init(types)
        if not state.layers:
            _read_all_but_experts(checkpoint)
        hidden, branches = _hidden_states(decoder, text, options, state)
        todo = range(len(state.layers), info.n_layer)
        with progress("calibrate", len(todo) * info.n_expert, "experts", quiet) as bar:
            for layer in todo:
                work = LayerMeasurement(decoder, layer, types, options, threads)
                state.add(work.run(hidden, branches, bar), hidden)
            del hidden
            bar.advance(0, "sensitivity of the layers")
            divergences = branches.divergences()
            for layer, values in enumerate(divergences):
                with place(layer, "sensitivity"):
                    check_finite(values, "divergences")
    corpus = text.to_json() | {"measured": calibration_identity(info, text, types, options)}
    calibration = _assemble(info, corpus, types, state.layers, divergences)
    _warn(calibration)
    return calibration


def _read_all_but_experts(checkpoint: Checkpoint) -> None:
    """Raises SourceError for a damaged tensor outside the experts now: the output matrix, for one, is not
    needed before the end. All experts together are too much to read twice. Tensors of zeros are warned about.
    """
    stacks = {expert_tensor_name(i, p) for i in checkpoint.info.expert_layers for p in PROJECTIONS}
    others = [t.name for t in checkpoint.info.tensors if t.name not in stacks]
    zeros = [n for n in others if not checkpoint.tensor(n).any() and not n.endswith(".bias")]
    if zeros:
        log.warning(
            "%d tensors are nothing but zeros (%s%s): was the download interrupted?",
            len(zeros),
            ", ".join(zeros[:5]),
            " ..." if len(zeros) > 5 else "",
        )


def _hidden_states(
    decoder: Decoder, text: Corpus, options: CalibrationOptions, state: CalibrationState
) -> tuple[Tensor, Branches]:
    """The hidden states where `state` stopped, or the embeddings, and the branches there."""
    few = branch_rows(text.rows, options.sensitivity_tokens)
    branches = Branches(decoder, state.directory, few, len(state.layers))
    if state.hidden is None:
        return decoder.embed(text.rows), branches
    hidden, state.hidden = state.hidden, None  # so that it can be freed
    return hidden, branches


@contextmanager
def _threads(wanted: int) -> Iterator[int]:
    threads, before = wanted or usable_cores(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _assemble(
    info: ModelInfo,
    corpus: dict[str, Any],
    types: tuple[str, ...],
    layers: Sequence[LayerStatistics],
    divergences: Floats,
) -> Calibration:
    """The Calibration of all layers. `divergences` [L, 2]: mean KL divergence, in nats per token, when each
    layer drops experts and when its experts are rounded.
    """
    statistics = merge_layers(layers)
    rounding_error = stack_layers(layers)[LayerStatistics.rounding_error.name]
    statistics["routing_sensitivity"] = divergences[:, 0]
    statistics["kld_per_error"] = divergences[:, 1] / np.maximum(rounding_error, np.finfo(np.float64).tiny)
    statistics["nominal_error"] = nominal_errors(statistics["sq_error"], types)
    return Calibration(
        info, info.expert_layers, types, corpus, statistics, attention_types=attention_types(info)
    )


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
