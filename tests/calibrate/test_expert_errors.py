"""Errors of an expert: exact against brute force, sampled against exact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.calibrate.expert_errors import (
    MAX_ROWS,
    ExpertErrors,
    Sample,
    _ExpertInputs,
    _Inner,
    draw,
    expert_errors,
    imatrix_errors,
    quantization_error,
)
from mc_gguf.capture.expert import Expert
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.source.decoder import Decoder
from tests.support.small_models import MemoryCheckpoint, tiny_mixtral

pytestmark = pytest.mark.native

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Case = tuple[Expert, Sample, Floats, Floats]
EVERYTHING = 10**9

GATE, UP, WHOLE = ["product", "gate"], ["product", "up"], ["product", "gate_up"]
BIAS, SCALE = "blk.0.ffn_gate_exps.bias", "blk.0.ffn_down_exps.scale"
# By kind of expert: its inner matrices, with their rows per hidden unit, and its function.
KINDS: dict[str, tuple[dict[str, int], ExpertFunction]] = {
    "gated": ({"gate": 1, "up": 1}, ExpertFunction(["GLU.SWIGLU", GATE, UP])),
    "merged": ({"gate_up": 2}, ExpertFunction(["GLU.SWIGLU", ["half", 0, WHOLE], ["half", 1, WHOLE]])),
    "no gate": ({"up": 1}, ExpertFunction(["SQR", ["UNARY.RELU", UP]])),
    "biased": (
        {"gate": 1, "up": 1},
        ExpertFunction(["GLU.SWIGLU_OAI", ["bias", GATE, BIAS], UP, 1.702, 2.0], down_scale=SCALE),
    ),
}


def random_case(n_embd: int, n_ff: int, n_tokens: int, kind: str = "gated", seed: int = 1) -> Case:
    """Expert, tokens and importance matrices. Some hidden units, and some tokens, are larger than others."""
    torch.manual_seed(seed)
    rows, function = KINDS[kind]
    matrices = {p: torch.randn(n * n_ff, n_embd) / 16 for p, n in rows.items()}
    matrices["down"] = torch.randn(n_embd, n_ff) / 16
    matrices = {p: m * (1 + torch.rand(len(m), 1)) for p, m in matrices.items()}
    vectors = {BIAS: torch.randn(n_ff) / 4, SCALE: torch.tensor(1.5)} if kind == "biased" else {}
    expert = Expert(matrices, function, vectors)
    x, g = torch.randn(n_tokens, n_embd), torch.rand(n_tokens)
    mid = expert.hidden(x).square().mean(0).numpy()
    return expert, Sample(x, g), x.square().mean(0).numpy(), mid


def doubles(expert: Expert) -> dict[str, Doubles]:
    return {p: m.double().numpy() for p, m in expert.matrices.items()}


def output(kind: str, m: Mapping[str, Doubles], expert: Expert, x: Doubles, g: Doubles) -> Doubles:
    """What the expert adds to the hidden states, in float64."""
    if kind == "no gate":
        hidden = np.maximum(x @ m["up"].T, 0) ** 2
    elif kind == "biased":
        z = np.minimum(x @ m["gate"].T + expert.vectors[BIAS].double().numpy(), 2)
        hidden = z / (1 + np.exp(-1.702 * z)) * (np.clip(x @ m["up"].T, -2, 2) + 1) * 1.5
    else:
        gate, up = np.split(m["gate_up"], 2) if kind == "merged" else (m["gate"], m["up"])
        z = x @ gate.T
        hidden = z / (1 + np.exp(-z)) * (x @ up.T)
    return np.asarray(hidden @ m["down"].T * g[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_are_exact_against_brute_force(kind: str) -> None:
    """float64 numpy, whole block, one matrix replaced."""
    expert, sample, imatrix_in, imatrix_mid = random_case(256, 512, 40, kind)
    types = ("Q2_K", "Q4_0", "Q8_0")
    scale = torch.rand(40) + 0.1
    found = expert_errors(
        expert,
        Sample(sample.x, sample.g * 3**0.5, scale),
        imatrix_in,
        imatrix_mid,
        types,
        EVERYTHING,
        threads=2,
    )
    x, g = sample.x.double().numpy(), sample.g.double().numpy()
    exact = output(kind, doubles(expert), expert, x, g)
    for p, (projection, matrix) in enumerate(expert.matrices.items()):
        imatrix = imatrix_mid if projection == "down" else imatrix_in
        for t, name in enumerate(types):
            data = quantize_rows(matrix.numpy(), name, imatrix, 1)
            replaced = dequantize_rows(data, name, matrix.shape[1], len(matrix)).astype(np.float64)
            changed = output(kind, doubles(expert) | {projection: replaced}, expert, x, g)
            each = 3.0 * ((changed - exact) ** 2).sum(1)
            assert found.block[p, t] == pytest.approx(each.sum(), rel=2e-4)
            relative = (each * scale.double().numpy() ** 2).sum()
            assert found.relative[p, t] == pytest.approx(relative, rel=2e-4)
            weight = ((replaced - matrix.double().numpy()) ** 2).sum()
            assert found.weight[p, t] == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_traces_are_exact_against_brute_force(kind: str) -> None:
    """The sum of the squared entries of the Jacobian: E |J z|^2 over random signs z."""
    expert, sample, imatrix_in, imatrix_mid = random_case(32, 64, 6, kind)
    scale = torch.rand(6) + 0.1
    found = expert_errors(expert, Sample(sample.x, sample.g, scale), imatrix_in, imatrix_mid, ("Q8_0",))
    x, g = sample.x.double().numpy(), (sample.g * scale).double().numpy()
    exact, rng, step = doubles(expert), np.random.default_rng(0), 1e-6
    before = output(kind, exact, expert, x, g)
    for p, (projection, matrix) in enumerate(exact.items()):
        squares = []
        for _ in range(1500):
            moved = {projection: matrix + step * rng.choice([-1.0, 1.0], matrix.shape)}
            change = output(kind, exact | moved, expert, x, g) - before
            squares.append(((change / step) ** 2).sum())
        assert found.trace[p] == pytest.approx(np.mean(squares) / matrix.size, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_rows_are_unbiased(kind: str) -> None:
    """The mean of many draws is the error of all rows: of down and of weights within its own uncertainty, of
    the inner matrices within 6 %, because what is not common to the sampled rows is taken as independent.
    """
    case = random_case(256, 512, 60, kind)
    case = (case[0], Sample(case[1].x, case[1].g, torch.rand(60) + 0.1), *case[2:])
    exact = expert_errors(*case, ("Q2_K",), EVERYTHING)
    draws = [expert_errors(*case, ("Q2_K",), 64, (seed,)) for seed in range(60)]
    for name in ("block", "relative", "weight"):
        expected = getattr(exact, name)[:, 0]
        found = np.array([getattr(one, name)[:, 0] for one in draws]) / expected
        uncertainty = found.std(axis=0, ddof=1) / len(draws) ** 0.5
        inner = 0.0 if name == "weight" else 0.06
        allowed = 3.5 * uncertainty + [*[inner] * (len(expected) - 1), 0.0]
        assert (np.abs(found.mean(axis=0) - 1) < allowed).all(), name
        assert (found.std(axis=0) < 0.15).all(), name
    assert (np.array([one.trace for one in draws]) == exact.trace).all()


@pytest.mark.parametrize("kind", ["gated", "merged"])
def test_errors_of_importance_matrices_are_those_of_their_formula(kind: str) -> None:
    expert, _, imatrix_in, imatrix_mid = random_case(256, 512, 40, kind)

    def errors(max_rows: int, seed: int = 0) -> ExpertErrors:
        types = ("Q2_K", "Q8_0")
        return imatrix_errors(expert.matrices, 50.0, 3.0, imatrix_in, imatrix_mid, types, max_rows, (seed,))

    found = errors(EVERYTHING)
    for p, (projection, matrix) in enumerate(expert.matrices.items()):
        imatrix = imatrix_mid if projection == "down" else imatrix_in
        for t, name in enumerate(("Q2_K", "Q8_0")):
            delta = quantization_error(matrix, name, imatrix, 1).double().numpy()
            share = (delta**2 @ imatrix).sum() / (matrix.double().numpy() ** 2 @ imatrix).sum()
            assert found.block[p, t] == pytest.approx(share * 50, rel=1e-4)
            assert found.relative[p, t] == pytest.approx(share * 3, rel=1e-4)
            assert found.weight[p, t] == pytest.approx((delta**2).sum(), rel=1e-4)
    draws = [errors(64, seed).block for seed in range(40)]
    np.testing.assert_allclose(np.mean(draws, axis=0), found.block, rtol=0.02)


def test_errors_of_importance_matrices_are_near_the_measured_ones() -> None:
    """Inputs are independent here, as the formula supposes; silu and the product are not linear."""
    expert, sample, imatrix_in, imatrix_mid = random_case(256, 512, 200)
    norms = output("gated", doubles(expert), expert, sample.x.double().numpy(), sample.g.double().numpy())
    measured = expert_errors(expert, sample, imatrix_in, imatrix_mid, ("Q2_K",), EVERYTHING)
    total = float((norms**2).sum())
    found = imatrix_errors(expert.matrices, total, 1.0, imatrix_in, imatrix_mid, ("Q2_K",), EVERYTHING)
    np.testing.assert_allclose(found.block, measured.block, rtol=0.35)


@cache
def trained_layer() -> list[Case]:
    """The experts of layer 0 of the bundled model with 300 tokens each, random ids as text."""
    decoder = Decoder(MemoryCheckpoint(tiny_mixtral()))
    hidden = decoder.embed(np.random.default_rng(0).integers(3, 4096, (16, 128)).astype(np.int32))
    decoder.attention(0, hidden)
    flat, norm = hidden.flatten(0, 1), decoder.ffn_norm(0)
    routing, cases = decoder.route(0, flat), list[Case]()
    for number in range(8):
        index, slots = (i[:300] for i in torch.nonzero(routing.experts == number, as_tuple=True))
        own, x = decoder.expert(0, number), decoder.norm(flat[index], norm)
        matrices = {"gate": own.gate, "up": own.up, "down": own.down}
        mid = own.hidden(x).square().mean(0).numpy()
        sample = Sample(x, routing.weights[index, slots])
        cases.append((Expert(matrices, KINDS["gated"][1], {}), sample, x.square().mean(0).numpy(), mid))
    return cases


def test_sampled_rows_rank_experts_alike() -> None:
    types = ("Q2_K", "Q4_0")
    exact = np.array([expert_errors(*case, types, EVERYTHING, threads=2).block for case in trained_layer()])
    sampled = np.array(
        [
            [expert_errors(*case, types, 64, (s,), threads=2).block for s in range(4)]
            for case in trained_layer()
        ]
    )
    ratio = sampled / exact[:, None]
    assert ratio.mean(axis=(0, 1)) == pytest.approx(np.ones((3, 2)), abs=0.05)
    assert ratio.std() < 0.12

    def ranks(errors: Doubles) -> Doubles:
        """Of the experts, by their Q2_K error."""
        return np.argsort(np.argsort(errors.sum(axis=1)[:, 0])).astype(np.float64)

    for seed in range(4):
        assert np.corrcoef(ranks(sampled[:, seed]), ranks(exact))[0, 1] > 0.9


@pytest.mark.parametrize("projection", ["gate", "up", "gate_up"])
def test_scaling_up_the_sampled_rows_alone_would_be_biased(projection: str) -> None:
    """Why errors have a common part: a projection that only shrinks moves all hidden units together."""
    expert, sample, _, _ = trained_layer()[0]
    if projection == "gate_up":
        whole = torch.cat([expert.matrices["gate"], expert.matrices["up"]])
        expert = Expert({"gate_up": whole, "down": expert.down}, KINDS["merged"][1], {})
    tokens = _ExpertInputs.of(expert, sample.x, sample.g, torch.ones(len(sample.x)))
    change, matrix = _Inner(expert, tokens, projection), expert.matrices[projection]
    every = draw(np.ones(256), EVERYTHING, np.random.default_rng(0))
    exact, _ = change.squared_errors(every, -0.01 * matrix)
    units = draw(np.ones(256), 64, np.random.default_rng(0))
    delta = -0.01 * matrix[expert.rows_of(projection, units.index)]
    assert change.squared_errors(units, delta) == pytest.approx((exact, exact), rel=0.01)
    dh = change._change(units.index, sample.x @ delta.T)
    naive = float((dh @ expert.down[:, units.index].T).square().sum()) * 4
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
    for errors in (
        expert_errors(*case, ("Q2_K", "Q8_0")).block,
        imatrix_errors(case[0].matrices, 1.0, 1.0, *case[2:], ("Q2_K", "Q8_0")).block,
    ):
        assert np.isinf(errors[:2, 0]).all()
        assert np.isfinite(errors[2]).all()
        assert np.isfinite(errors[:, 1]).all()


def test_an_expert_without_importance_is_quantized_as_if_all_were_one() -> None:
    weights = torch.randn(4, 256)
    zeros, ones = (quantization_error(weights, "Q2_K", np.full(256, v, np.float32), 1) for v in (0, 1))
    assert torch.equal(zeros, ones)
    expert, sample, imatrix_in, imatrix_mid = random_case(256, 256, 8)
    found = [
        expert_errors(expert, sample, imatrix_in * 0 + v, imatrix_mid * 0 + v, ("Q2_K",)).block
        for v in (0, 1)
    ]
    np.testing.assert_array_equal(found[0], found[1])


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
