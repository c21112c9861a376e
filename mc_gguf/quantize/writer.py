"""Carry a plan out: every tensor of the source is quantized and written, one expert at a time, into one GGUF.

The bytes depend on the source, the plan and the calibration alone: not on the number of threads, nor on how
often the run was killed and started again. Memory holds one tensor (the token embedding is the largest) or
one expert's matrix, and the next one, which is read ahead.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf import container
from mc_gguf.artifacts import NO_CALIBRATION, Calibration, ModelInfo, Plan
from mc_gguf.artifacts.matching import check_inputs
from mc_gguf.common.errors import ArtifactError, McError, SourceError
from mc_gguf.common.progress import Progress
from mc_gguf.common.workdir import Workdir
from mc_gguf.compensate.bank import Bank
from mc_gguf.container import OutputTensor
from mc_gguf.ggml.quantizers import init, quantize_rows, warn_if_lost
from mc_gguf.ggml.types import TYPES
from mc_gguf.quantize.pieces import Pieces
from mc_gguf.routing.metadata import routing_metadata_from
from mc_gguf.source import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """A part of the output that is made at once: a whole tensor, or one expert's slice of it."""

    tensor: OutputTensor
    offset: int
    n_bytes: int
    expert: int | None = None


def model_workdir(
    model: ModelInfo, calibration: Calibration | None, output: Path, resume: bool = True
) -> Workdir:
    """The working directory of a GGUF, which outlives a change of the plan: its `bank` of compensated
    matrices serves every plan from the same calibration.
    """
    made_from = calibration.fingerprint if calibration else NO_CALIBRATION
    return Workdir(output, {"model": model.fingerprint, "calibration": made_from}, resume)


def write_model(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    plan: Plan,
    output: Path,
    threads: int,
    progress: Progress | None = None,
    resume: bool = True,
    bank: Bank | None = None,
) -> container.MixedGguf:
    """Write `output` (docs/reference/format.md) and return it, opened and validated. Matrices that `bank` has
    are taken from there instead of being quantized.

    `calibration` gives the importance matrices and the routing metadata; without one (published statistics)
    only types that need no importance matrix are possible, and the file carries no routing. With `resume`, a
    run that was killed is continued if everything is as it was then.

    Raises ArtifactError when source, plan and calibration do not belong together, McError when a type does
    not fit, the disk is full, or another process is writing the same output.
    """
    with model_workdir(checkpoint.info, calibration, output, resume) as work:
        return write_model_in(work, checkpoint, calibration, plan, threads, progress, bank)


def write_model_in(
    work: Workdir,
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    plan: Plan,
    threads: int,
    progress: Progress | None = None,
    bank: Bank | None = None,
) -> container.MixedGguf:
    """write_model() in a working directory that is open already (see model_workdir), and gone afterwards."""
    if calibration is not None and calibration.fingerprint == NO_CALIBRATION:
        calibration = None
    check_inputs(checkpoint.info, calibration, plan)
    routing = None if calibration is None else routing_metadata_from(calibration)
    tensors = container.layout(checkpoint.info, plan.experts, plan.fixed, routing)
    _check_imatrix(calibration, plan, tensors)
    made_from = calibration.fingerprint if calibration else plan.calibration_fingerprint
    header = container.encode_header(checkpoint, tensors, plan.fingerprint, made_from, routing)
    pieces = list(_pieces(tensors))
    n_bytes = container.total_bytes(tensors)
    if plan.file_bytes not in (None, n_bytes):
        log.warning(
            "the file will have %d bytes, not %d as planned: name or card of the source have changed",
            n_bytes,
            plan.file_bytes,
        )
    identity = {
        "plan": plan.fingerprint,
        "header": hashlib.sha256(header).hexdigest(),
        "compensation": bank.key if bank else None,
    }
    folder = work.part("pieces", identity)
    work.check_space(n_bytes, folder)
    total = sum(_weights(piece) for piece in pieces) / 1e6
    with Pieces(folder, header, n_bytes, [(piece.offset, piece.n_bytes) for piece in pieces]) as file:
        done = sum(_weights(piece) for piece in pieces[: file.done]) / 1e6
        init({t.type.name for t in tensors if t.type.name in TYPES})
        todo = pieces[file.done :]
        for piece, loaded in zip(todo, _loaded(checkpoint, todo, bank), strict=True):
            file.write(_make(loaded, calibration, plan, piece, threads).tobytes())
            done += _weights(piece) / 1e6
            if progress:
                progress.update(round(done, 1), round(total, 1), note=piece.tensor.name)
        file.verify()
    container.validate(file.path)
    work.publish(file.path)
    return container.validate(work.output)


def _check_imatrix(calibration: Calibration | None, plan: Plan, tensors: tuple[OutputTensor, ...]) -> None:
    """Raises an error where a type needs an importance matrix that there is not; warns about experts that no
    text reached.
    """
    for t in tensors:
        if t.experts is None and t.type.needs_imatrix and _imatrix_of(calibration, t) is None:
            raise McError(
                f"{t.name} cannot be {t.type.name}, which needs an importance matrix, and calibration "
                "measured none for it; choose another type"
            )
        if t.experts is not None and t.type.needs_imatrix and calibration is None:
            raise ArtifactError(
                f"{t.name} is to be {t.type.name}, which needs a calibration's importance matrices; give one",
                parameter="calibration",
            )
    if calibration is None:
        return
    reached = calibration.frequency > 0
    has_input, has_middle = calibration.imatrix_in.any(axis=-1), calibration.imatrix_mid.any(axis=-1)
    _warn_about(calibration, ~reached, "no token of the calibration's text reached them")
    _warn_about(calibration, reached & ~has_input, "their inputs are zero")
    _warn_about(calibration, reached & has_input & ~has_middle, "their gate or their up weights are zero")


def _warn_about(calibration: Calibration, which: NDArray[np.bool_], reason: str) -> None:
    """Says why the experts that `which` [L, E] marks have no importance matrix."""
    names = [f"layer {calibration.layers[i]} expert {e}" for i, e in np.argwhere(which)]
    if names:
        log.warning(
            "%d experts are quantized without an importance matrix, because %s: %s",
            len(names),
            reason,
            ", ".join(names[:20]) + (" ..." if len(names) > 20 else ""),
        )


def _pieces(tensors: tuple[OutputTensor, ...]) -> Iterator[_Piece]:
    for t in tensors:
        if t.experts is None:
            yield _Piece(t, t.offset, t.n_bytes)
            continue
        size = t.n_bytes // len(t.experts)
        for position, expert in enumerate(t.experts):
            yield _Piece(t, t.offset + position * size, size, expert)


def _weights(piece: _Piece) -> int:
    return piece.n_bytes // piece.tensor.type.block_bytes * piece.tensor.type.block_size


def _loaded(checkpoint: Checkpoint, pieces: Sequence[_Piece], bank: Bank | None) -> Iterator[NDArray[Any]]:
    """What each piece is made from; the next one is read while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        loads = (reader.submit(_load, checkpoint, piece, bank) for piece in pieces)
        ahead = next(loads, None)
        while ahead is not None:
            loaded = ahead.result()
            ahead = next(loads, None)
            yield loaded
            del loaded  # before the next one is waited for


def _load(checkpoint: Checkpoint, piece: _Piece, bank: Bank | None) -> NDArray[Any]:
    """The float32 weights (rows, cols) to quantize, or the final bytes (uint8)."""
    t = piece.tensor
    if t.map is not None:
        return np.asarray(t.map, dtype="<i4").reshape(-1).view(np.uint8)
    if t.type.name == t.source.type:
        return checkpoint.raw(t.source.name, piece.expert)
    if piece.expert is None:
        return checkpoint.tensor(t.source.name).reshape(-1, t.shape[0])
    layer, projection = _place(t.source.name)
    stored = bank.get(layer, projection, piece.expert, t.type.name) if bank else None
    return checkpoint.expert(layer, projection, piece.expert) if stored is None else stored


def _make(
    loaded: NDArray[Any], calibration: Calibration | None, plan: Plan, piece: _Piece, threads: int
) -> NDArray[np.uint8]:
    """The bytes of one piece."""
    if loaded.dtype == np.uint8:
        return loaded
    t = piece.tensor
    imatrix = _imatrix_of(calibration, t)
    if piece.expert is not None and calibration is not None:
        layer, projection = _place(t.source.name)
        is_measured = layer in calibration.layers
        imatrix = calibration.imatrix(layer, projection, piece.expert) if is_measured else None
    which = t.source.name if piece.expert is None else f"{t.source.name}, expert {piece.expert}"
    try:
        blocks = quantize_rows(loaded, t.type.name, imatrix, threads)
    except McError as error:
        raise SourceError(f"{which}: {error}") from error
    warn_if_lost(which, loaded, blocks, t.type.name)
    return blocks


def _place(name: str) -> tuple[int, str]:
    """(layer, projection) of the expert stack `name`."""
    _, layer, rest = name.split(".", 2)
    return int(layer), rest.removeprefix("ffn_").removesuffix("_exps.weight")


def _imatrix_of(calibration: Calibration | None, tensor: OutputTensor) -> NDArray[np.float32] | None:
    """The importance matrix of a matrix that is no expert."""
    return None if calibration is None else calibration.matrix_imatrix(tensor.source.name)
