"""Divergence and gradient on every architecture, against autograd through transformers' whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import PROJECTIONS
from mc_gguf.compensate.bank import Bank
from mc_gguf.ggml.quantizers import quantize_rows
from mc_gguf.refine.expansion import expand
from mc_gguf.refine.matrices import Matrices
from mc_gguf.refine.passes import Assignment, Evaluator, Layers
from mc_gguf.source import Checkpoint, open_checkpoint
from mc_gguf.source.architecture import ARCHITECTURES
from mc_gguf.source.decoder import Decoder
from tests.support.moe_directories import CONFIGS, random_moe, save_moe
from tests.support.refine_models import divergence, slice_of

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]
TYPES = ("Q4_0", "Q8_0")
N_EXPERT = 6
SHAPE = (2, N_EXPERT, len(PROJECTIONS))


@pytest.fixture(params=list(CONFIGS))
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Checkpoint]:
    """transformers' model with 6 experts, 3 of them used, and the checkpoint of its directory."""
    name = request.param
    count = "num_local_experts" if name == "Mixtral" else "num_experts"
    model = random_moe(name, num_experts_per_tok=3, **{count: N_EXPERT})
    return name, model, open_checkpoint(save_moe(model, tmp_path / "hf"))


def layers(checkpoint: Checkpoint, folder: Path) -> Layers:
    def make(layer: int, projection: str, expert: int, name: str) -> NDArray[np.uint8]:
        weights = checkpoint.expert(layer, projection, expert)
        return quantize_rows(weights, name, np.ones(weights.shape[1], dtype=np.float32), 1)

    return Layers(Decoder(checkpoint), Matrices(checkpoint, make, Bank(folder, "test"), 1 << 30))


def test_divergence_and_gradient_are_those_of_transformers(
    models: tuple[str, Any, Checkpoint], tmp_path: Path
) -> None:
    name, model, checkpoint = models
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 4096, (3, 24), dtype=np.int32)
    incumbent = Assignment(TYPES, rng.integers(0, 2, SHAPE))
    evaluator = Evaluator(layers(checkpoint, tmp_path / "bank"), tokens, TYPES)
    found = evaluator.settle(incumbent)
    get = evaluator.layers.matrices.get
    twin = random_moe(name, **{k: getattr(model.config, k) for k in _sizes(name)})
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, number, p in np.ndindex(SHAPE):
            kind = incumbent.name(layer, number, p)
            slice_of(twin, layer, number, p).copy_(get(layer, PROJECTIONS[p], number, kind))
    expected = divergence(model, twin, tokens)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=2e-3, atol=1e-6)

    expected.mean().backward()
    wanted = np.ones((*SHAPE, len(TYPES)), dtype=bool)
    gradient = expand(evaluator, np.arange(3), wanted, 1, 0).gradient.reshape(wanted.shape)
    products = np.zeros_like(gradient)
    for layer, number, p in np.ndindex(SHAPE):
        source = get(layer, PROJECTIONS[p], number, None)
        slope = slice_of(twin, layer, number, p, grad=True)
        products[layer, number, p] = [
            float((slope * (get(layer, PROJECTIONS[p], number, kind) - source)).sum()) for kind in TYPES
        ]
    np.testing.assert_allclose(gradient, products, rtol=5e-3, atol=5e-4 * abs(products).max())


def _sizes(name: str) -> tuple[str, ...]:
    return ("num_experts_per_tok", "num_local_experts" if name == "Mixtral" else "num_experts")


def test_all_architectures_are_covered(models: tuple[str, Any, Checkpoint]) -> None:
    assert models[2].info.architecture in ARCHITECTURES
    assert len(CONFIGS) == len(ARCHITECTURES)
