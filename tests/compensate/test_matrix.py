"""Error compensation of one matrix: the blocks mean what ggml reads in them, and lose less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.common.errors import McError
from mc_gguf.compensate.matrix import (
    CompensationOptions,
    damped,
    quantize_compensated,
    supports,
    upper_factor,
)
from mc_gguf.compensate.products import add_squares, mirror
from mc_gguf.ggml.compensation_library import Metric, scale_rows
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import TYPES

pytestmark = pytest.mark.native
ROUNDED = tuple(name for name, kind in TYPES.items() if kind.block_size > 1)
Matrix = NDArray[np.float32]


def make_inputs(n: int, tokens: int = 1500, seed: int = 0) -> Matrix:
    """Correlated inputs with a few large columns, as behind a norm."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n // 4, n)) * rng.lognormal(size=n)
    noise = rng.standard_normal((tokens, n))
    inputs = rng.standard_normal((tokens, n // 4)) @ mixing / n**0.5 + 0.3 * noise
    return np.asarray(inputs, dtype=np.float32)


def make_weights(rows: int, n: int, seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)


def loss(weights: Matrix, blocks: NDArray[np.uint8], name: str, hessian: Matrix) -> float:
    error = (weights - dequantize_rows(blocks, name, weights.shape[1], len(weights))).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, hessian, error))


def test_every_quantized_type_is_supported() -> None:
    assert {name for name in TYPES if supports(name)} == set(ROUNDED)


@pytest.mark.parametrize("name", ROUNDED)
def test_blocks_survive_unpacking_and_mean_what_ggml_says(name: str) -> None:
    weights = make_weights(9, 256)
    blocks = quantize_rows(weights, name, np.ones(256, dtype=np.float32), 1)
    again, values = blocks.copy(), np.empty_like(weights)
    with Metric(name, np.eye(256, dtype=np.float32)) as metric:
        metric.quantize(weights, again, values, passes=0, threads=1, greedy=False)
        np.testing.assert_array_equal(again, blocks)
        np.testing.assert_allclose(values, dequantize_rows(blocks, name, 256, 9), rtol=1e-6, atol=1e-7)
        metric.quantize(weights, again, values, passes=2, threads=1)
    np.testing.assert_allclose(values, dequantize_rows(again, name, 256, 9), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 0.0])
def test_what_is_no_metric_or_no_factor_is_refused(value: float) -> None:
    form = np.eye(256, dtype=np.float32)
    form[3, 3] = value
    with pytest.raises(McError, match="no metric of 256 columns for Q2_K: the Hessian is not positive"):
        Metric("Q2_K", form)
    if not np.isfinite(value):
        blocks = quantize_rows(make_weights(2, 256), "Q2_K", np.ones(256, dtype=np.float32), 1)
        before = blocks.copy()
        with pytest.raises(McError, match="is not a number"):
            scale_rows(blocks, "Q2_K", 256, np.array([1, value], dtype=np.float32))
        np.testing.assert_array_equal(blocks, before)


@pytest.mark.parametrize("name", ROUNDED)
def test_loses_less_than_ggml(name: str) -> None:
    """On the inputs, and on others of the same kind."""
    x, other = make_inputs(512), make_inputs(512, seed=0)[::-1] + make_inputs(512, seed=5) * 0.1
    hessian, weights = x.T @ x, make_weights(24, 512)
    importance = (x**2).mean(0)
    plain = quantize_rows(weights, name, importance, 1)
    best = quantize_compensated(weights, name, hessian, importance)
    assert best.shape == plain.shape
    assert loss(weights, best, name, hessian) < 0.7 * loss(weights, plain, name, hessian)
    second = other.T @ other
    assert loss(weights, best, name, second) < 0.8 * loss(weights, plain, name, second)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "IQ2_XXS", "IQ3_XXS", "IQ1_M"])
def test_every_step_gains(name: str) -> None:
    x = make_inputs(512)
    hessian, weights, importance = x.T @ x, make_weights(16, 512), (x**2).mean(0)
    h = damped(torch.from_numpy(hessian), 0.01).numpy()
    losses = [
        loss(weights, quantize_compensated(weights, name, hessian, importance, options), name, h)
        for options in (CompensationOptions(0.01, p, s, unbiased=False) for p, s in ((0, 0), (3, 0), (3, 2)))
    ]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", ROUNDED)
def test_outputs_are_as_large_as_they_were(name: str) -> None:
    x = make_inputs(512)
    hessian, weights, importance = x.T @ x, make_weights(16, 512), (x**2).mean(0)
    exact = x @ weights.T
    gains = []
    for unbiased in (False, True):
        blocks = quantize_compensated(
            weights, name, hessian, importance, CompensationOptions(damping=1e-6, unbiased=unbiased)
        )
        outputs = x @ dequantize_rows(blocks, name, 512, 16).T
        gains.append((outputs * exact).sum(0) / (exact**2).sum(0))
    np.testing.assert_allclose(gains[1], 1, atol=1e-3)
    if TYPES[name].bpw < 4:
        assert gains[0].mean() < 0.999


@pytest.mark.parametrize("name", ["Q2_K", "IQ2_XS"])
def test_bytes_do_not_depend_on_threads(name: str) -> None:
    x = make_inputs(512)
    hessian, weights, importance = x.T @ x, make_weights(100, 512), (x**2).mean(0)
    one, two = (
        quantize_compensated(weights, name, hessian, importance, threads=threads) for threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


def test_gptq_without_scales_to_choose_equals_the_textbook() -> None:
    """Q8_0 with its scales kept: the greedy pass is GPTQ's loop over columns, written in numpy."""
    x = make_inputs(32, tokens=200)
    h = damped(torch.from_numpy(x.T @ x), 0.01)
    weights = make_weights(4, 32)
    blocks, values = quantize_rows(weights, "Q8_0", None, 1), np.empty_like(weights)
    with Metric("Q8_0", h.numpy()) as metric:
        metric.quantize(weights, blocks, values, passes=0, threads=1)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    upper = np.linalg.inv(upper_factor(h.double()).triu().numpy())
    left, expected = weights.astype(np.float64), np.empty((4, 32))
    for j in range(32):
        expected[:, j] = scale[:, 0] * np.clip(np.round(left[:, j] / scale[:, 0]), -128, 127)
        error = (left[:, j] - expected[:, j]) / upper[j, j]
        left -= np.outer(error, upper[j])
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_factor_in_panels_equals_the_whole() -> None:
    h = damped(torch.from_numpy(make_inputs(1200).T @ make_inputs(1200)), 0.1)
    r = upper_factor(h.clone()).triu()
    assert float((r @ r.T - h).abs().max()) < 1e-4 * float(h.abs().max())


def test_squares_add_up_and_are_symmetric() -> None:
    x = torch.from_numpy(make_inputs(2100, tokens=50))
    total = torch.zeros(2100, 2100)
    add_squares(total, x)
    mirror(total)
    assert torch.equal(total, total.T)
    assert torch.allclose(total, x.T @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n", [32, 64, 96, 256, 640])
def test_squares_do_not_depend_on_threads(n: int) -> None:
    x = torch.randn(2048, n, generator=torch.Generator().manual_seed(0))
    before, totals = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        totals.append(torch.zeros(n, n))
        add_squares(totals[-1], x)
        mirror(totals[-1])
    torch.set_num_threads(before)
    assert all(torch.equal(total, totals[0]) for total in totals)
    torch.testing.assert_close(totals[0], x.T @ x, rtol=1e-4, atol=1e-2)


def test_narrow_rows_and_hessians_without_inputs() -> None:
    """32 columns short of a super-block; inputs whose squares underflow make a zero Hessian."""
    weights = make_weights(5, 288)
    blocks = quantize_compensated(weights, "IQ4_NL", np.zeros((288, 288), dtype=np.float32), None)
    plain = quantize_rows(weights, "IQ4_NL", None, 1)
    eye = np.eye(288, dtype=np.float32)
    assert loss(weights, blocks, "IQ4_NL", eye) <= loss(weights, plain, "IQ4_NL", eye)


def test_rows_of_zeros_stay_zero() -> None:
    for name in ROUNDED:
        weights = np.zeros((2, 256), dtype=np.float32)
        weights[1] = make_weights(1, 256)
        blocks = quantize_compensated(weights, name, np.eye(256, dtype=np.float32), np.ones(256, np.float32))
        values = dequantize_rows(blocks, name, 256, 2)
        assert np.isfinite(values).all()
        assert np.abs(values[0]).max() < 1e-6, name


def test_errors_say_what_to_do() -> None:
    weights, eye = make_weights(2, 256), np.eye(256, dtype=np.float32)
    with pytest.raises(McError, match="do without it"):
        quantize_compensated(weights, "F16", eye, None)
    with pytest.raises(McError, match="positive definite"):
        quantize_compensated(weights, "Q2_K", -eye, None, CompensationOptions(damping=-2.0))
    with pytest.raises(McError, match="Hessian is"):
        quantize_compensated(weights, "Q2_K", eye[:32, :32], None)
    with pytest.raises(McError, match="not finite"):
        quantize_compensated(weights, "Q2_K", eye * np.nan, None)
