"""Errors and prices of the matrices that are no experts, against transformers' attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration, TensorSpec
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.matrices import matrix_types, measured_matrices
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.source.text import Corpus
from tests.support.block_reference import block_references, round_rows
from tests.support.small_models import MemoryCheckpoint, random_mixtral
from tests.support.synthetic_calibration import model_info

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]

ROWS = np.random.default_rng(7).integers(0, 96, (6, 32)).astype(np.int32)
# 64 sampled tokens are two rows of text; of the first 16 tokens of each the inputs of matrices are kept.
OPTIONS = CalibrationOptions(
    types=("Q8_0",), max_rows=999, sensitivity_tokens=64, matrix_tokens=32, threads=1
)
SAMPLES = np.ascontiguousarray(ROWS[[0, 5], :16])
MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}


@cache
def model() -> Any:
    return random_mixtral()


@cache
def calibration() -> Calibration:
    text = Corpus(ROWS, ("random",), "0" * 64, ROWS.size, 0)
    return calibrate_checkpoint(MemoryCheckpoint(model(), "F32"), text, OPTIONS, quiet=True)


def linear(of: Any, layer: int, part: str) -> Any:
    return getattr(of.model.layers[layer].self_attn, MODULES[part])


@torch.no_grad()
def inputs(layer: int, part: str, rows: NDArray[np.int32]) -> torch.Tensor:
    """[tokens, columns] what transformers multiplies with the matrix."""
    seen = list[torch.Tensor]()
    handle = linear(model(), layer, part).register_forward_pre_hook(
        lambda _, x: seen.append(x[0].flatten(0, 1))
    )
    model()(torch.from_numpy(rows).long())
    handle.remove()
    return seen[0]


CASES = [(layer, part) for layer in (0, 1) for part in MODULES]


@pytest.mark.parametrize(("layer", "part"), CASES)
def test_errors_are_those_of_the_products(layer: int, part: str) -> None:
    """Rows of Q and K are permuted in a GGUF, which changes nothing: each is rounded by itself."""
    found, name = calibration(), f"blk.{layer}.attn_{part}.weight"
    at = found.matrices.index(name)
    imatrix = found.matrix_imatrix(name)
    assert imatrix is not None
    expected = inputs(layer, part, ROWS).square().mean(0).numpy()
    np.testing.assert_allclose(imatrix, expected, rtol=2e-2)
    weights, x = linear(model(), layer, part).weight.data, inputs(layer, part, SAMPLES)
    for t, kind in enumerate(found.matrix_types):
        data = quantize_rows(weights.numpy(), kind, imatrix, 1)
        delta = torch.from_numpy(dequantize_rows(data, kind, weights.shape[1], len(weights))) - weights
        error = float((x @ delta.T).square().sum(1).mean())
        assert found.matrix_error[at, t] == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize(("layer", "part"), CASES)
def test_prices_are_changes_of_the_hidden_states_at_the_price_of_the_layer(layer: int, part: str) -> None:
    found, name = calibration(), f"blk.{layer}.attn_{part}.weight"
    changed = copy.deepcopy(model())
    weights = linear(changed, layer, part).weight
    before = weights.data.clone()
    weights.data = round_rows(before)
    states = [block_references(one, SAMPLES)[layer].before for one in (model(), changed)]
    change = float(((states[1] - states[0]).square().sum(1) / states[0].square().sum(1)).mean())
    delta = weights.data - before
    error = float((inputs(layer, part, SAMPLES) @ delta.T).square().sum(1).mean())
    price = found.matrix_price[found.matrices.index(name)]
    assert price == pytest.approx(change * found.kld_per_error[layer] / error, rel=0.03)


def test_what_is_measured() -> None:
    """Matrices in blocks that are multiplied with every token; the router and vectors are left alone."""
    expected = tuple(f"blk.{layer}.attn_{part}.weight" for layer, part in CASES)
    assert calibration().matrices == expected
    assert calibration().matrix_types == ("IQ4_NL", "Q8_0")
    assert calibration().matrix_imatrix("output.weight") is None


def test_sampled_rows_scale_to_all_of_them() -> None:
    text = Corpus(ROWS, ("random",), "0" * 64, ROWS.size, 0)
    options = CalibrationOptions(
        types=("Q8_0",), max_rows=16, sensitivity_tokens=64, matrix_tokens=32, threads=1
    )
    found = calibrate_checkpoint(MemoryCheckpoint(model(), "F32"), text, options, quiet=True)
    exact = calibration()
    assert (found.matrix_error != exact.matrix_error).all()
    assert found.matrix_error.sum(axis=0) == pytest.approx(exact.matrix_error.sum(axis=0), rel=0.15)


def test_only_what_every_token_reached_is_measured() -> None:
    info = model_info(n_layer=1)
    names = [t.name for t in info.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    inputs_of: dict[str, str] = {name: "input.0" for name in names if "attn" in name}

    spool: Any = SimpleNamespace(facts={"matrices": inputs_of, "sampled": {"input.0": 256}})
    found = measured_matrices(info, spool)
    assert found == tuple(name for name in names if "attn" in name)
    spool.facts["sampled"] = {"input.0": 128}  # of another width
    assert measured_matrices(info, spool) == ()
    spool.facts = {}
    assert measured_matrices(info, spool) == ()


def test_the_types_are_those_that_fit_some_matrix() -> None:
    assert "Q4_K" in matrix_types(model_info(n_layer=1))
    info = model_info(n_layer=1)
    narrow = tuple(TensorSpec(t.name, (32, *t.shape[1:]), t.type) for t in info.tensors)
    assert matrix_types(replace(info, tensors=narrow)) == ("IQ4_NL", "Q8_0")
