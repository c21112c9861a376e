"""Errors of an expert: exact against brute force, sampled against exact."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.calibrate.expert_errors import MAX_ROWS, Sample, draw, expert_errors, quantization_error
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.source.decoder import Decoder, Expert
from tests.support.small_models import MemoryCheckpoint, tiny_mixtral

pytestmark = pytest.mark.native

Doubles = NDArray[np.float64]
EVERYTHING = 10**9


def random_case(
    n_embd: int, n_ff: int, n_tokens: int
) -> tuple[Expert, Sample, NDArray[np.float32], NDArray[np.float32]]:
    torch.manual_seed(1)
    expert = Expert(
        torch.randn(n_ff, n_embd) / 16, torch.randn(n_ff, n_embd) / 16, torch.randn(n_embd, n_ff) / 16
    )
    x, g = torch.randn(n_tokens, n_embd), torch.rand(n_tokens)
    mid = expert.hidden(x).square().mean(0).numpy()
    return expert, Sample(x, g), x.square().mean(0).numpy(), mid


def output(expert: dict[str, Doubles], x: Doubles, g: Doubles) -> Doubles:
    z = x @ expert["gate"].T
    return np.asarray(((z / (1 + np.exp(-z)) * (x @ expert["up"].T)) @ expert["down"].T) * g[:, None])


def test_all_rows_are_exact_against_brute_force() -> None:
    """float64 numpy, whole block, one matrix replaced."""
    expert, sample, imatrix_in, imatrix_mid = random_case(256, 512, 40)
    types = ("IQ1_S", "Q2_K", "Q4_K")
    errors = expert_errors(
        expert, Sample(sample.x, sample.g * 3**0.5), imatrix_in, imatrix_mid, types, EVERYTHING, threads=2
    ).block
    x, g = sample.x.double().numpy(), sample.g.double().numpy()
    matrices = {p: getattr(expert, p).double().numpy() for p in ("gate", "up", "down")}
    exact = output(matrices, x, g)
    for p, projection in enumerate(("gate", "up", "down")):
        original = getattr(expert, projection).numpy()
        imatrix = imatrix_mid if projection == "down" else imatrix_in
        for t, name in enumerate(types):
            data = quantize_rows(original, name, imatrix, 1)
            replaced = dequantize_rows(data, name, original.shape[1], original.shape[0]).astype(np.float64)
            expected = 3.0 * ((output(matrices | {projection: replaced}, x, g) - exact) ** 2).sum()
            assert errors[p, t] == pytest.approx(expected, rel=1e-4)


def test_relative_errors_weights_and_traces_are_exact_against_brute_force() -> None:
    """Relative: every token's error by its own scale. Trace: sum of squares of the Jacobian's entries."""
    expert, sample, imatrix_in, imatrix_mid = random_case(256, 256, 12)
    scale = torch.rand(12) + 0.1
    found = expert_errors(
        expert, Sample(sample.x, sample.g, scale), imatrix_in, imatrix_mid, ("Q2_K",), EVERYTHING
    )
    x, g = sample.x.double(), sample.g.double()
    matrices = {p: getattr(expert, p).double() for p in ("gate", "up", "down")}

    def of(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scaled outputs [T, n_embd]."""
        m = matrices | changed
        hidden = torch.nn.functional.silu(x @ m["gate"].T) * (x @ m["up"].T)
        return torch.as_tensor((hidden @ m["down"].T) * (g * scale)[:, None])

    for p, projection in enumerate(("gate", "up", "down")):
        original = getattr(expert, projection)
        imatrix = imatrix_mid if projection == "down" else imatrix_in
        delta = quantization_error(original, "Q2_K", imatrix, 1)
        assert found.weight[p, 0] == pytest.approx(float(delta.square().sum()), rel=1e-4)
        change = of({projection: (original + delta).double()}) - of({})
        assert found.relative[p, 0] == pytest.approx(float(change.square().sum()), rel=1e-3)
        # E |J z|^2 over random signs z is the sum of the squared entries of J.
        rng = torch.Generator().manual_seed(0)
        probes = [torch.randint(0, 2, original.shape, generator=rng) * 2.0 - 1 for _ in range(400)]
        step = 1e-6
        squares = [
            ((of({projection: matrices[projection] + step * z.double()}) - of({})) / step).square().sum()
            for z in probes
        ]
        estimate = float(torch.stack(squares).mean()) / original.numel()
        assert found.trace[p] == pytest.approx(estimate, rel=0.05)


@cache
def trained_layer() -> list[tuple[Expert, Sample, NDArray[np.float32], NDArray[np.float32]]]:
    """The experts of layer 0 of the bundled model with 300 tokens each, random ids as text."""
    decoder = Decoder(MemoryCheckpoint(tiny_mixtral()))
    hidden = decoder.embed(np.random.default_rng(0).integers(3, 4096, (16, 128)).astype(np.int32))
    decoder.attention(0, hidden)
    flat, norm = hidden.flatten(0, 1), decoder.ffn_norm(0)
    routing, cases = decoder.route(0, flat), []
    for number in range(8):
        index, slots = (i[:300] for i in torch.nonzero(routing.experts == number, as_tuple=True))
        expert, x = decoder.expert(0, number), decoder.norm(flat[index], norm)
        mid = expert.hidden(x).square().mean(0).numpy()
        cases.append((expert, Sample(x, routing.weights[index, slots]), x.square().mean(0).numpy(), mid))
    return cases


def test_sampled_rows_are_unbiased_and_rank_experts_alike() -> None:
    types = ("IQ1_S", "Q2_K", "Q4_K")
    exact = np.array([expert_errors(*case, types, EVERYTHING, threads=2).block for case in trained_layer()])
    sampled = np.array(
        [
            [expert_errors(*case, types, 64, (s,), threads=2).block for s in range(4)]
            for case in trained_layer()
        ]
    )
    ratio = sampled / exact[:, None]
    assert ratio.mean(axis=(0, 1)) == pytest.approx(np.ones((3, 3)), abs=0.05)
    assert ratio.std() < 0.12

    def ranks(errors: Doubles) -> Doubles:
        """Of the experts, by their IQ1_S error."""
        return np.argsort(np.argsort(errors.sum(axis=1)[:, 0])).astype(np.float64)

    for seed in range(4):
        assert np.corrcoef(ranks(sampled[:, seed]), ranks(exact))[0, 1] > 0.9


def test_scaling_up_the_sampled_rows_alone_would_be_biased() -> None:
    """Why squared_error has a common part: a projection that only shrinks moves all hidden units together."""
    from mc_gguf.calibrate.expert_errors import _ExpertInputs, _Up

    expert, sample, _, _ = trained_layer()[0]
    one = torch.ones(len(sample.x), 1)
    tokens = _ExpertInputs(sample.x, sample.g[:, None], sample.x @ expert.gate.T, sample.x @ expert.up.T, one)
    change = _Up(expert, tokens)
    whole = draw(np.ones(256), EVERYTHING, np.random.default_rng(0))
    exact, _ = change.squared_errors(whole, -0.2 * expert.up)
    rows = draw(np.ones(256), 64, np.random.default_rng(0))
    delta = -0.2 * expert.up[rows.index]
    assert change.squared_errors(rows, delta) == pytest.approx((exact, exact), rel=1e-3)
    dh = change.change(rows.index, sample.x @ delta.T)
    naive = float((dh @ expert.down[:, rows.index].T).square().sum()) * 4
    assert abs(naive / exact - 1) > 0.1


def test_the_result_does_not_depend_on_threads_but_on_the_seed() -> None:
    case = random_case(256, 512, 20)
    one, two, other = (
        expert_errors(*case, ("Q2_K",), 32, (seed,), threads).block
        for seed, threads in ((1, 1), (1, 2), (2, 2))
    )
    assert (one == two).all()
    assert (one != other).any()


def test_types_that_do_not_fit_are_infinite() -> None:
    case = random_case(64, 256, 8)
    errors = expert_errors(*case, ("Q2_K", "Q8_0")).block
    assert np.isinf(errors[:2, 0]).all()
    assert np.isfinite(errors[2]).all()
    assert np.isfinite(errors[:, 1]).all()


def test_an_expert_without_importance_is_quantized_as_if_all_were_one() -> None:
    weights = torch.randn(4, 256)
    zeros, ones = (quantization_error(weights, "IQ2_XXS", np.full(256, v, np.float32), 1) for v in (0, 1))
    assert torch.equal(zeros, ones)


@pytest.mark.parametrize("power", [0, 1, 4])
def test_row_weights_are_inverse_probabilities(power: int) -> None:
    """The weighted sum of any row quantity is right on average, and near right each time for the importance
    itself.
    """
    rng = np.random.default_rng(0)
    importance, other = rng.random(1000) ** power, rng.random(1000)
    draws = [draw(importance, 100, np.random.default_rng(seed)) for seed in range(300)]
    assert all(90 <= len(rows.index) <= 101 and not rows.complete for rows in draws)
    means = [float((torch.from_numpy(other)[rows.index] * rows.weight).sum()) for rows in draws]
    assert np.mean(means) == pytest.approx(other.sum(), rel=0.03)
    own = [float((torch.from_numpy(importance)[rows.index] * rows.weight).sum()) for rows in draws]
    assert np.array(own) == pytest.approx(importance.sum(), rel=0.15)


def test_rows_of_no_importance_are_drawn_uniformly() -> None:
    rows = draw(np.zeros(400), 40, np.random.default_rng(0))
    assert len(rows.index) == 40
    assert rows.weight.numpy() == pytest.approx(np.full(40, 10.0))


def test_small_matrices_are_taken_whole() -> None:
    rows = draw(np.random.default_rng(0).random(MAX_ROWS), MAX_ROWS, np.random.default_rng(0))
    assert rows.complete
    assert rows.index.tolist() == list(range(MAX_ROWS))
