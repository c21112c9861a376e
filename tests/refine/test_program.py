"""The local search over an expansion against brute force on a few matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mc_gguf.refine.program import Ints, Program

N, T = 5, 3


def value(program: Program, choice: Ints, start: Ints) -> float:
    items = np.arange(len(choice))
    change = (program.draws[:, items, choice] - program.draws[:, items, start]).astype(np.float64)
    own, coupling = np.square(change).sum(), program.coupling
    linear = (program.linear[items, choice] - program.linear[items, start]).sum()
    whole = np.square(change.sum(axis=1)).sum()
    return float(linear + (1 + program.damping - coupling) / 2 * own + coupling / 2 * whole)


def program(seed: int, coupling: float, damping: float) -> Program:
    rng = np.random.default_rng(seed)
    draws = rng.normal(size=(20, N, T)).astype(np.float32) * 0.1
    size = np.cumsum(rng.integers(1, 5, (N, T)), axis=1)
    return Program(rng.normal(size=(N, T)) * 0.3, draws, size, coupling, damping)


@pytest.mark.parametrize(("coupling", "damping"), [(0.0, 0.0), (0.5, 0.5), (1.0, 0.0)])
def test_as_good_as_brute_force_nearly_always(coupling: float, damping: float) -> None:
    optimal = 0
    for seed in range(20):
        one = program(seed, coupling, damping)
        start = np.ones(N, dtype=np.int64)
        capacity = int(one.size[np.arange(N), start].sum())
        found = one.minimise(start, capacity)
        assert int(one.size[np.arange(N), found].sum()) <= capacity
        feasible = [
            np.array(c)
            for c in itertools.product(range(T), repeat=N)
            if one.size[np.arange(N), list(c)].sum() <= capacity
        ]
        best = min(value(one, c, start) for c in feasible)
        assert best - 1e-6 <= value(one, found, start) <= 0
        optimal += value(one, found, start) <= best + 1e-4
    assert optimal >= 12  # it is a local search


def test_start_is_not_changed_and_forbidden_types_are_not_taken() -> None:
    one = program(0, 0.5, 0.0)
    one.linear[:, 0], one.size[:, 2] = np.inf, 0
    start = np.ones(N, dtype=np.int64)
    np.testing.assert_array_equal(one.minimise(start, 10**6), start)
    one.linear[:, 0] = -5.0
    found = one.minimise(start, 10**6)
    np.testing.assert_array_equal(start, np.ones(N))
    assert set(found.tolist()) <= {0, 1}
    assert 0 in found


def test_room_that_is_left_is_used() -> None:
    linear = np.array([[0.0, -1.0], [0.0, -2.0], [0.0, -3.0]])
    one = Program(linear, np.zeros((1, 3, 2), dtype=np.float32), np.array([[1, 2]] * 3), 0.5, 0.0)
    zero = np.zeros(3, dtype=np.int64)
    assert one.minimise(zero, 3).tolist() == [0, 0, 0]
    assert one.minimise(zero, 5).tolist() == [0, 1, 1]
    assert one.minimise(zero, 9).tolist() == [1, 1, 1]
    assert one.minimise(np.array([1, 0, 0]), 4).tolist() == [0, 0, 1]  # a pair of steps
