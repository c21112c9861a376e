"""Divergences and their expansion against transformers' Mixtral with the same quantized experts inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mc_gguf.artifacts import PROJECTIONS, Floats
from mc_gguf.refine import expansion as expansion_module
from mc_gguf.refine.expansion import Ints, expand
from mc_gguf.refine.memory import Memory, wanted_types
from mc_gguf.refine.passes import Assignment, Evaluator
from tests.support.refine_models import (
    TYPES,
    divergence,
    layers,
    matrices,
    random_types,
    rows,
    slice_of,
    small,
    twin,
)

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]
ALL = np.ones((2, 5, 3, len(TYPES)), dtype=bool)


def test_divergence_is_that_of_transformers(tmp_path: Path) -> None:
    assignment = random_types(1)
    found = Evaluator(layers(tmp_path), rows(4), TYPES).settle(assignment)
    with torch.no_grad():
        expected = divergence(small()[0], twin(assignment), rows(4)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert found.min() > 1e-4


def test_the_source_itself_does_not_diverge(tmp_path: Path) -> None:
    plain = Assignment(TYPES, np.full((2, 5, 3), -1))
    assert Evaluator(layers(tmp_path), rows(2), TYPES).settle(plain).max() < 1e-6


def test_a_sweep_measures_what_settling_would(tmp_path: Path) -> None:
    evaluator = Evaluator(layers(tmp_path), rows(3), TYPES)
    evaluator.settle(random_types(1))
    late = random_types(1)
    late.columns[1, 2, 1] ^= 1
    candidates = [random_types(2), late, random_types(1), random_types(3)]
    swept = evaluator.sweep(candidates)
    few = evaluator.sweep(candidates, np.array([2, 0]))
    np.testing.assert_allclose(few, swept[:, [2, 0]], rtol=1e-9)
    for candidate, found in zip(candidates, swept, strict=True):
        np.testing.assert_allclose(evaluator.settle(candidate), found, rtol=1e-9)


def test_memory_limit_changes_nothing(tmp_path: Path) -> None:
    small_limit = layers(tmp_path, limit_bytes=30_000)
    expected = Evaluator(layers(tmp_path / "other"), rows(2), TYPES).settle(random_types(4))
    np.testing.assert_array_equal(Evaluator(small_limit, rows(2), TYPES).settle(random_types(4)), expected)
    assert sum(m.nbytes for m in small_limit.matrices._kept.values()) <= 30_000


def test_matrices_are_quantized_once_and_a_damaged_block_again(tmp_path: Path) -> None:
    one = matrices(tmp_path)
    first = one.get(0, "up", 1, "Q5_0")
    made: list[object] = []

    def count(*place: object) -> object:
        made.append(place)
        return one.quantizer(*place)  # type: ignore[arg-type]

    again = matrices(tmp_path)
    again.quantizer = count  # type: ignore[assignment]
    assert torch.equal(again.get(0, "up", 1, "Q5_0"), first)
    assert made == []
    path = next(p for p in tmp_path.rglob("*.blocks"))
    path.write_bytes(path.read_bytes()[:-1])
    fresh = matrices(tmp_path)
    fresh.quantizer = count  # type: ignore[assignment]
    assert torch.equal(fresh.get(0, "up", 1, "Q5_0"), first)
    assert len(made) == 1


def test_gradient_is_that_of_autograd(tmp_path: Path) -> None:
    incumbent, tokens = random_types(1), rows(9)
    evaluator = Evaluator(layers(tmp_path), tokens, TYPES)
    evaluator.settle(incumbent)
    picked = np.array([0, 2, 3, 4, 5, 6, 7, 8])[::-1].copy()
    found = expand(evaluator, picked, ALL, 1, 0).gradient.reshape(2, 5, 3, len(TYPES))
    model, reference = twin(incumbent), small()[0]
    divergence(reference, model, tokens[picked]).mean().backward()
    get = evaluator.layers.matrices.get
    for layer, number, p in np.ndindex(2, 5, 3):
        gradient = slice_of(model, layer, number, p, grad=True)
        source = get(layer, PROJECTIONS[p], number, None)
        expected = [
            float((gradient * (get(layer, PROJECTIONS[p], number, name) - source)).sum()) for name in TYPES
        ]
        scale = abs(found).max()
        np.testing.assert_allclose(found[layer, number, p], expected, rtol=2e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("segment", [128, 12])
def test_draws_predict_the_divergence_of_small_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment: int
) -> None:
    monkeypatch.setattr(expansion_module, "SEGMENT", segment)
    evaluator = Evaluator(layers(tmp_path), rows(32), TYPES)
    fine = Assignment(TYPES, np.full((2, 5, 3), TYPES.index("Q8_0")))
    start = evaluator.settle(fine).mean()
    expansion = expand(evaluator, np.arange(32), ALL, 8, 0)
    assert len(expansion.draws) == 32 * 8 * -(-32 // segment)
    memory = Memory(30, len(TYPES))
    memory.add(expansion)
    items, target = np.arange(30), random_types(5, n_type=3).columns.reshape(-1)
    change = memory.scaled()[:, items, target] - memory.scaled()[:, items, fine.columns.reshape(-1)]
    linear = (memory.gradient[items, target] - memory.gradient[items, fine.columns.reshape(-1)]).sum()
    predicted = linear + 0.5 * np.square(change.sum(axis=1)).sum()
    actual = evaluator.sweep([random_types(5, n_type=3)])[0].mean() - start
    assert predicted == pytest.approx(actual, rel=0.25)


def test_what_is_not_wanted_is_infinite(tmp_path: Path) -> None:
    evaluator = Evaluator(layers(tmp_path), rows(2), TYPES)
    evaluator.settle(random_types(1))
    size = np.array([[18, 18, 22, 34]] * 3)
    wanted = wanted_types(size, random_types(1).columns, 1)
    assert wanted[random_types(1).columns == 0].tolist()[0] == [True, True, True, False]
    found = expand(evaluator, np.arange(2), wanted, 1, 0)
    np.testing.assert_array_equal(np.isfinite(found.gradient), wanted.reshape(30, -1))


def test_memory_carries_the_gradient_over(tmp_path: Path) -> None:
    """For a divergence that is quadratic, the gradient after a step is exactly the carried one."""
    rng = np.random.default_rng(0)
    draws, memory = rng.normal(size=(7, 6, 3)).astype(np.float32), Memory(6, 3)
    memory.draws, memory.weight = draws, 1.0

    def gradient(choice: Ints) -> Floats:
        total = memory.scaled()[:, np.arange(6), choice].sum(axis=1)
        return np.asarray(np.tensordot(total, memory.scaled(), axes=1))

    old, new = np.zeros(6, dtype=np.int64), np.array([0, 1, 2, 0, 1, 2], dtype=np.int64)
    memory.gradient, memory.choice = gradient(old), old
    memory.move(new)
    np.testing.assert_allclose(memory.gradient, gradient(new), rtol=1e-4, atol=1e-5)
    memory.save(tmp_path / "m.npz")
    loaded = Memory.load(tmp_path / "m.npz", (6, 3))
    np.testing.assert_array_equal(loaded.gradient, memory.gradient)
    np.testing.assert_array_equal(loaded.choice, new)
    assert len(Memory.load(tmp_path / "m.npz", (5, 3)).draws) == 0
