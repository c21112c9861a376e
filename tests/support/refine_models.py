"""A small random Mixtral with a calibration, and its twin in transformers, for the tests of refinement."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import PROJECTIONS, Calibration
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.compensate.bank import Bank
from mc_gguf.ggml.quantizers import dequantize_rows
from mc_gguf.refine.matrices import GgmlQuantizer, Matrices
from mc_gguf.refine.passes import Assignment, Layers
from mc_gguf.source.decoder import Decoder
from mc_gguf.source.text import Corpus
from tests.support.small_models import MemoryCheckpoint, random_mixtral

TYPES = ("Q4_0", "IQ4_NL", "Q5_0", "Q8_0")


@cache
def small() -> tuple[Any, MemoryCheckpoint, Calibration]:
    """transformers' model, the checkpoint over it, and its calibration with TYPES."""
    torch.manual_seed(0)
    model = random_mixtral()
    checkpoint = MemoryCheckpoint(model)
    calibration = calibrate_checkpoint(
        checkpoint,
        Corpus(rows(24, seed=9), ("random",), "0" * 64, 768, 0),
        CalibrationOptions(types=TYPES, threads=1),
        quiet=True,
    )
    return model, checkpoint, calibration


def rows(n: int, ctx: int = 32, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 96, (n, ctx), dtype=np.int32)


def matrices(folder: Path, limit_bytes: int = 1 << 30) -> Matrices:
    _, checkpoint, calibration = small()
    return Matrices(checkpoint, GgmlQuantizer(checkpoint, calibration), Bank(folder, "test"), limit_bytes)


def layers(folder: Path, limit_bytes: int = 1 << 30) -> Layers:
    return Layers(Decoder(small()[1]), matrices(folder, limit_bytes))


def random_types(seed: int, n_type: int = len(TYPES)) -> Assignment:
    """Random types."""
    columns = np.random.default_rng(seed).integers(0, n_type, (2, 5, len(PROJECTIONS)))
    return Assignment(TYPES, columns)


def twin(assignment: Assignment) -> Any:
    """transformers' model with its experts as the types make them."""
    model, checkpoint, calibration = small()
    copy = random_mixtral()
    copy.load_state_dict(model.state_dict())
    make = GgmlQuantizer(checkpoint, calibration)
    with torch.no_grad():
        for (layer, number, p), column in np.ndenumerate(assignment.columns):
            projection, name = PROJECTIONS[p], assignment.types[column]
            n_row, n_col = checkpoint.info.expert_shape(projection)
            blocks = make(layer, projection, number, name)
            made = torch.from_numpy(dequantize_rows(blocks, name, n_col, n_row))
            slice_of(copy, layer, number, p).copy_(made)
    return copy


def slice_of(model: Any, layer: int, number: int, p: int, grad: bool = False) -> Any:
    """One expert's matrix (or its gradient) inside transformers' model."""
    experts = model.model.layers[layer].mlp.experts
    stack = experts.down_proj if p == 2 else experts.gate_up_proj
    matrix = (stack.grad if grad else stack)[number]
    half = matrix.shape[0] // 2
    return matrix if p == 2 else matrix[:half] if p == 0 else matrix[half:]


def divergence(expected: Any, found: Any, tokens: NDArray[np.int32]) -> Any:
    """KL(expected || found) of every row [n], with gradients."""
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        reference = torch.log_softmax(expected(ids).logits, dim=-1)
    logs = torch.log_softmax(found(ids).logits, dim=-1)
    return (reference.exp() * (reference - logs)).sum(-1).mean(1)
