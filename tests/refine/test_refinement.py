"""A whole search on a small random model: better, within the budget, the same after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mc_gguf.artifacts import Plan
from mc_gguf.common.errors import ArtifactError, McError, SourceError
from mc_gguf.common.progress import Progress, progress
from mc_gguf.plan import Budget
from mc_gguf.plan import plan as make_plan
from mc_gguf.refine.budget import scope_of
from mc_gguf.refine.options import RefinementOptions
from mc_gguf.refine.passes import Evaluator
from mc_gguf.refine.refinement import refine_to_file
from mc_gguf.refine.search import Search
from mc_gguf.refine.state import SearchState
from tests.support.refine_models import TYPES, layers, rows, small

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]


def start_plan(bpw: float = 5.2, strategy: str = "random") -> Plan:
    calibration = replace(small()[2], fingerprint="c" * 64)
    return make_plan(calibration, Budget(bpw=bpw), strategy=strategy)


class Ticks:
    """A clock that advances by one second per round, and what to do then."""

    def __init__(self, at_end: Callable[[], None] = lambda: None) -> None:
        self.now, self.at_end = 0.0, at_end

    def tick(self) -> None:
        self.now += 1
        self.at_end()


def search(folder: Path, seconds: float, bar: Progress, ticks: Ticks | None = None) -> Search:
    scope, columns = scope_of(start_plan(), replace(small()[2], fingerprint="c" * 64))
    (folder / "bank").mkdir(parents=True, exist_ok=True)
    state = SearchState.resume(folder / "state.json", columns)
    state.expansion_rows = 8
    ticks = ticks or Ticks()
    evaluator = Evaluator(layers(folder / "bank"), rows(16), TYPES)
    one = Search(
        scope, evaluator, state, folder, 1, seconds, 0.0, clock=lambda: ticks.now, on_round=ticks.tick
    )
    one.run(bar)
    return one


def test_a_search_improves_within_the_budget(tmp_path: Path) -> None:
    with progress("refine", quiet=True) as bar:
        one = search(tmp_path, 2, bar)
    scope, columns = scope_of(start_plan(), replace(small()[2], fingerprint="c" * 64))
    assert scope.fits(one.state.columns)
    assert one.state.accepted >= 1
    again = Evaluator(layers(tmp_path / "bank"), rows(16), TYPES).settle(one.assignment(one.state.columns))
    np.testing.assert_array_equal(again, one.here)
    fresh = Evaluator(layers(tmp_path / "bank"), rows(32, seed=5), TYPES)
    before = fresh.settle(one.assignment(columns))
    after = fresh.settle(one.assignment(one.state.columns))
    assert after.mean() < 0.9 * before.mean()


def test_a_killed_search_continues_bit_for_bit(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    with progress("refine", quiet=True) as bar:
        whole = search(tmp_path / "whole", 3, bar)
        with pytest.raises(Killed):
            search(tmp_path / "killed", 3, bar, Ticks(kill))
        state = json.loads((tmp_path / "killed" / "state.json").read_text())
        assert state["rounds"] == 1
        # The clock of the killed one stood still: its first round took no time.
        resumed = search(tmp_path / "killed", 2, bar)
    np.testing.assert_array_equal(resumed.state.columns, whole.state.columns)
    np.testing.assert_array_equal(resumed.memory.draws, whole.memory.draws)
    np.testing.assert_array_equal(resumed.here, whole.here)
    assert resumed.state.rounds == whole.state.rounds == 3
    assert [p.name for p in (tmp_path / "killed").glob("memory-*")] == ["memory-3.npz"]


def test_a_damaged_state_or_one_of_another_shape_is_not_taken(tmp_path: Path) -> None:
    path, start = tmp_path / "state.json", np.zeros((2, 5, 3), dtype=np.int64)
    SearchState(start + 1, rounds=7).save(path)
    assert SearchState.resume(path, start).rounds == 7
    assert SearchState.resume(path, start[:1]).rounds == 0
    path.write_text(path.read_text()[:-9])
    assert SearchState.resume(path, start).rounds == 0


def test_scope_is_the_plans_own(tmp_path: Path) -> None:
    calibration = replace(small()[2], fingerprint="c" * 64)
    plan = start_plan()
    scope, columns = scope_of(plan, calibration)
    assert scope.problem.experts(columns) == plan.experts
    assert scope.limit >= scope.measure(columns) == plan.expert_bytes
    assert scope.capacity(columns) == scope.limit
    with pytest.raises(ArtifactError, match="another calibration"):
        scope_of(replace(plan, calibration_fingerprint="x"), calibration)
    with pytest.raises(ArtifactError, match="larger than its own budget"):
        scope_of(replace(plan, budget={"bpw": 4.6}), calibration)
    experts = {**plan.experts, "up": (("Q6_K",) * 5, plan.experts["up"][1])}
    with pytest.raises(ArtifactError, match="Q6_K, which its calibration did not measure"):
        scope_of(replace(plan, experts=experts), calibration)
    with pytest.raises(McError, match="nothing to refine"):
        scope_of(make_plan(calibration, Budget(bpw=16)), calibration)


def test_a_size_budget_counts_headers(tmp_path: Path) -> None:
    calibration = replace(small()[2], fingerprint="c" * 64)
    size = _scope_size(calibration, start_plan(strategy="layer"))
    plan = replace(start_plan(strategy="layer"), budget={"size_bytes": float(size)})
    scope, columns = scope_of(plan, calibration)
    assert scope.measure(columns) == scope.limit == size
    assert scope.capacity(columns) == scope.problem.expert_bytes(columns)


def _scope_size(calibration: Any, plan: Plan) -> int:
    scope, columns = scope_of(plan, calibration)
    return scope.file_bytes(columns)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    plan, calibration = start_plan(), replace(small()[2], fingerprint="c" * 64)
    info = replace(small()[1].info, architecture="gpt-oss", fingerprint=plan.model_fingerprint)
    source: Any = SimpleNamespace(info=info, hparams=small()[1].hparams)
    with pytest.raises(SourceError, match="gpt-oss"):
        refine_to_file(source, calibration, plan, tmp_path / "plan.json", RefinementOptions(1.0), quiet=True)
    assert not list(tmp_path.iterdir())
