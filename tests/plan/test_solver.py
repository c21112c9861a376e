"""The solver of the multiple-choice knapsack against brute force, and at real sizes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from mc_gguf.common.errors import BudgetError
from mc_gguf.plan import solver
from mc_gguf.plan.solver import Knapsack, fill, lower_bound, solve


def brute_force(items: Knapsack, capacity: int) -> float:
    """Least total error of all combinations that fit."""
    error, size = np.zeros(1), np.zeros(1, dtype=np.int64)
    for e, s in zip(items.error, items.size, strict=True):
        error, size = (error[:, None] + e).ravel(), (size[:, None] + s).ravel()
    return float(error[size <= capacity].min())


def random_items(seed: int, n_item: int, n_option: int, steps: int = 30) -> Knapsack:
    """Errors that mostly fall with size, with dominated, unavailable and equally large options among them."""
    rng = np.random.default_rng(seed)
    size = np.sort(rng.integers(1, steps, (n_item, n_option)), axis=1)
    error = rng.lognormal(0, 2, (n_item, 1)) * np.exp(-size / 10) * rng.lognormal(0, 0.3, size.shape)
    error[rng.random(error.shape) < 0.1] = np.inf
    error[np.arange(n_item), rng.integers(0, n_option, n_item)] = rng.lognormal(0, 1, n_item)
    return Knapsack(error, size)


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 4), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_optimal_by_brute_force(seed: int, n_item: int, n_option: int, tightness: float) -> None:
    items = random_items(seed, n_item, n_option)
    low, high = items.total_size(items.smallest()), items.total_size(items.largest())
    capacity = low + int(tightness * (high - low))
    solution = solve(items, capacity)
    best = brute_force(items, capacity)
    assert items.total_size(solution.choice) <= capacity
    assert solution.error == pytest.approx(items.total_error(solution.choice))
    assert solution.error == pytest.approx(best, rel=1e-8)
    assert solution.bound <= best * (1 + 1e-8)
    assert lower_bound(items, capacity) <= best * (1 + 1e-12)


# Greedy takes the steep step of 6 and has no use for the other 4; two steps of 5 are better.
TRAP = Knapsack(np.array([[10.0, 2.5], [10.0, 4.0], [10.0, 4.5]]), np.array([[0, 6], [0, 5], [0, 5]]))


def test_the_exact_search_improves_on_the_greedy_one() -> None:
    solution = solve(TRAP, 10)
    assert list(solution.choice) == [0, 1, 1]
    assert solution.gap <= 1e-9


def test_no_single_step_is_left_after_fill() -> None:
    items = random_items(1, 30, 5)
    capacity = items.total_size(items.smallest()) + 80
    choice = fill(items, items.smallest(), capacity)
    room = capacity - items.total_size(choice)
    rows = np.arange(len(choice))
    better = items.error < items.error[rows, choice][:, None]
    assert room >= 0
    assert (items.size - items.size[rows, choice][:, None])[better].min() > room


def test_too_small_a_capacity_is_refused() -> None:
    items = random_items(2, 5, 3)
    with pytest.raises(BudgetError, match="less than the smallest options need"):
        solve(items, items.total_size(items.smallest()) - 1)


def test_room_for_everything_needs_no_search() -> None:
    items = random_items(3, 50, 4)
    solution = solve(items, 10**9)
    assert solution.gap == 0
    assert solution.error == pytest.approx(items.error.min(axis=1).sum())


def test_zero_errors_have_no_gap() -> None:
    assert solve(Knapsack(np.zeros((4, 3)), np.tile([1, 2, 3], (4, 1))), 5).gap == 0


def _with_highs(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    real = optimize.milp

    def milp(*arguments: object, **options: object) -> object:
        result = real(*arguments, **options)
        result.update(changes)
        return result

    monkeypatch.setattr(optimize, "milp", milp)


def test_a_stopped_search_reports_the_gap_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_highs(monkeypatch, status=1, x=None, mip_dual_bound=None, message="Time limit reached")
    stopped = solve(TRAP, 10)
    assert stopped.status == "Time limit reached"
    assert list(stopped.choice) == [1, 0, 0]
    assert (22.5 - 18.5) / 22.5 <= stopped.gap < 1


def test_a_failed_search_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_highs(monkeypatch, status=4, message="numerical trouble")
    with pytest.raises(BudgetError, match="HiGHS failed on a feasible budget, status 4: numerical trouble"):
        solve(TRAP, 10)


def _with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    real = optimize.milp

    def milp(*arguments: object, **options: object) -> object:
        os.write(1, b"tmpSolver.run();\n")
        return real(*arguments, **options)

    monkeypatch.setattr(optimize, "milp", milp)


def test_what_highs_prints_does_not_reach_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _with_noise(monkeypatch)
    solve(TRAP, 10)
    os.write(1, b"ours")
    assert capfd.readouterr().out == "ours"


def test_without_a_stdout_it_solves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: int) -> int:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    assert list(solve(TRAP, 10).choice) == [0, 1, 1]


def test_the_same_answer_every_time() -> None:
    items = random_items(7, 60, 5, steps=1000)
    capacity = (items.total_size(items.smallest()) + items.total_size(items.largest())) // 2
    assert np.array_equal(solve(items, capacity).choice, solve(items, capacity).choice)


@pytest.mark.parametrize(
    ("n_item", "n_option", "gap"),
    [(32 * 8 * 3, 11, 1e-8), (256 * 3, 10, 1e-8), (58 * 256 * 3, 10, 1e-4)],
    ids=["mixtral", "one layer of 256", "58 layers of 256"],
)
def test_real_sizes_are_solved_to_their_gap(n_item: int, n_option: int, gap: float) -> None:
    rng = np.random.default_rng(0)
    size = np.tile(np.array([50, 56, 66, 74, 82, 84, 98, 110, 110, 136, 144][:n_option]), (n_item, 1))
    error = rng.lognormal(0, 1.5, (n_item, 1)) * np.exp(-size / 24) * rng.lognormal(0, 0.05, size.shape)
    solution = solve(Knapsack(error, size), 80 * n_item)
    assert solution.gap <= gap
    assert solver.EXACT_GAP <= 1e-8
