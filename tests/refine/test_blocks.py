"""A search on compensated blocks: the types near the plan's, made once, and taken by quantize."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mc_gguf.artifacts import PROJECTIONS, Calibration, Plan
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import workdir_path
from mc_gguf.compensate.experts import calibration_text, compensate, open_bank, wanted_by
from mc_gguf.plan import Budget
from mc_gguf.plan import plan as make_plan
from mc_gguf.refine import blocks
from mc_gguf.refine.blocks import Forecast, can_compensate, compensated_blocks
from mc_gguf.refine.budget import scope_of
from mc_gguf.refine.matrices import GgmlQuantizer
from mc_gguf.refine.options import RefinementOptions
from mc_gguf.refine.refinement import refine_to_file, refined_before
from mc_gguf.refine.search import Search
from mc_gguf.source.text import load_corpus
from tests.support.refine_models import TYPES, small

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture(autouse=True)
def _few_near_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """One size up and down, so that there are types which are not near."""
    monkeypatch.setattr(blocks, "NEAR", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = np.random.default_rng(0).integers(97, 123, 6000, dtype=np.uint8)
    path.write_bytes(letters.tobytes())
    return path


@pytest.fixture(scope="module")
def calibration(text: Path) -> Calibration:
    checkpoint = small()[1]
    corpus = load_corpus(checkpoint, (text,), 1536, 32)
    found = calibrate_checkpoint(checkpoint, corpus, CalibrationOptions(types=TYPES, threads=1), quiet=True)
    return replace(found, fingerprint="d" * 64)


@pytest.fixture
def plan(calibration: Calibration) -> Plan:
    made = make_plan(calibration, Budget(bpw=5.2), strategy="random")
    return replace(made, model_fingerprint=small()[1].info.fingerprint, fingerprint="e" * 64)


def options(text: Path, **changes: object) -> RefinementOptions:
    return replace(
        RefinementOptions(3.0, (text,), 1024, 32, threads=1, calibration_text=(text,)),
        **changes,  # type: ignore[arg-type]
    )


def test_near_types_are_made_once_and_quantize_takes_them(
    text: Path, calibration: Calibration, plan: Plan, tmp_path: Path
) -> None:
    checkpoint, output = small()[1], tmp_path / "refined.plan.json"
    asked = options(text, bank=tmp_path / "bank", seconds=8.0)
    result = refine_to_file(checkpoint, calibration, plan, output, asked, quiet=True)
    assert result.rounds >= 1
    assert result.held_out_kld <= result.held_out_start
    bank = open_bank(tmp_path / "bank", calibration)
    scope, start = scope_of(plan, calibration)
    rank = {"Q4_0": 0, "IQ4_NL": 0, "Q5_0": 1, "Q8_0": 2}
    for (layer, expert, p), column in np.ndenumerate(start):
        own = scope.problem.types[column]
        made = {t for t in TYPES if bank.get(layer, PROJECTIONS[p], expert, t) is not None}
        assert made == {t for t in TYPES if abs(rank[t] - rank[own]) <= 1}
        assert result.plan.type_of(layer, expert, PROJECTIONS[p]) in made
    corpus = calibration_text(checkpoint, calibration, (text,))
    again = compensate(checkpoint, calibration, wanted_by(result.plan), corpus, bank, 1)
    assert again.compensated == again.plain == 0
    assert refined_before(checkpoint, calibration, plan, output, asked) == Plan.load(output)
    for other in (replace(asked, seconds=9.0), replace(asked, compensate=False), replace(asked, seed=7)):
        assert refined_before(checkpoint, calibration, plan, output, other) is None
    assert refined_before(checkpoint, calibration, plan, tmp_path / "none.json", asked) is None


def test_ggmls_blocks_where_compensation_takes_too_long(
    text: Path, calibration: Calibration, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = refine_to_file(
        small()[1], calibration, plan, tmp_path / "r.json", options(text, seconds=0.01), quiet=True
    )
    assert "the search measures ggml's blocks" in caplog.text
    assert result.rounds == 0
    plain = refine_to_file(
        small()[1],
        calibration,
        plan,
        tmp_path / "p.json",
        options(text, seconds=0.01, compensate=False),
        quiet=True,
    )
    assert plain.held_out_start == result.held_out_start


def test_blocks_are_those_of_quantize_and_not_ggmls(
    text: Path, calibration: Calibration, plan: Plan, tmp_path: Path
) -> None:
    checkpoint = small()[1]
    scope, start = scope_of(plan, calibration)
    folders = tmp_path / "bank", tmp_path / "states"
    made = compensated_blocks(checkpoint, calibration, scope.problem, start, (text,), *folders, 1, 1e9, True)
    assert made is not None
    assert made.compensated
    name = scope.problem.types[start[1, 2, 0]]
    blocks = made.bank.get(1, "gate", 2, name)
    assert blocks is not None
    assert (blocks != GgmlQuantizer(checkpoint, calibration)(1, "gate", 2, name)).any()
    with pytest.raises(ArtifactError, match="missing or damaged"):
        made.quantizer(1, "gate", 2, name)


def test_a_search_of_another_seed_takes_the_blocks_that_are_there(
    text: Path,
    calibration: Calibration,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Interrupted twice after the first round: its bank outlives the change, its rounds do not."""

    def stop(self: Search) -> None:
        save(self)
        raise RuntimeError("killed")

    save, output = Search._save, tmp_path / "r.json"
    monkeypatch.setattr(Search, "_save", stop)
    blocks = workdir_path(output) / "bank"
    times = []
    for seed in (1, 1, 2):
        with pytest.raises(RuntimeError, match="killed"):
            refine_to_file(small()[1], calibration, plan, output, options(text, seconds=1e9, seed=seed))
        state = json.loads((workdir_path(output) / "search" / "state.json").read_text())
        times.append((state["rounds"], sorted(p.stat().st_mtime_ns for p in blocks.rglob("*.blocks"))))
    assert [rounds for rounds, _ in times] == [1, 2, 1]
    assert times[0][1] == times[1][1] == times[2][1] != []
    assert "made with another seed, text); starting anew" in caplog.text


def test_text_of_the_calibration_is_needed(
    text: Path, calibration: Calibration, plan: Plan, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x" * 5000)
    with pytest.raises(ArtifactError, match="made from another text") as caught:
        refine_to_file(
            small()[1],
            calibration,
            plan,
            tmp_path / "r.json",
            options(text, calibration_text=(other,)),
            quiet=True,
        )
    assert caught.value.parameters == ("calibration_text", "compensate")
    assert not can_compensate(replace(calibration, corpus={}))


@pytest.mark.parametrize(
    ("prelude", "each", "n", "limit", "is_refused"),
    [
        (10.0, 3.0, 1024, 3782.0, False),  # attention before the first of many experts
        (200.0, 1.0, 10, 600.0, False),  # layers in which nothing is missing
        (10.0, 5.0, 1024, 3782.0, True),
        (700.0, 0.0, 4, 600.0, True),
    ],
)
def test_the_time_for_blocks_is_foreseen(
    prelude: float, each: float, n: int, limit: float, is_refused: bool
) -> None:
    now = 0.0
    forecast = Forecast(limit, lambda: now)
    now, done = prelude, 0
    while done < n:
        now, done = now + each, done + 1
        if not forecast.is_within_limit(done, n):
            break
    assert (done < n) == is_refused
    if is_refused:
        assert done <= 2  # at the second matrix
        assert forecast.expected_s > limit
