"""`mc-gguf refine` on the bundled model, from a plan on disk to a better one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mc_gguf.artifacts import Plan
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.cli import main
from mc_gguf.plan import Budget
from mc_gguf.plan import plan as make_plan
from mc_gguf.refine.search import Search
from mc_gguf.source import open_checkpoint
from mc_gguf.source.text import load_corpus

pytestmark = pytest.mark.native
TYPES = ("Q2_K", "Q3_K", "Q4_K")  # quick to quantize


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With calib.safetensors and a plan that puts the types to the wrong experts."""
    folder = tmp_path_factory.mktemp("refine")
    checkpoint = open_checkpoint(tiny_model)
    text = load_corpus(checkpoint, tokens=2048, ctx=128)
    calibration = calibrate_checkpoint(
        checkpoint, text, CalibrationOptions(types=TYPES, max_rows=32, max_tokens=128, threads=1), quiet=True
    )
    saved = calibration.save(folder / "calib.safetensors")
    make_plan(saved, Budget(bpw=3.3), strategy="inverted").save(folder / "plan.json")
    return folder


def run(source: Path, folder: Path, output: Path, *more: object) -> Result:
    arguments = (
        source,
        folder / "plan.json",
        "-o",
        output,
        "--tokens",
        1024,
        "--ctx",
        128,
        "--threads",
        1,
        *more,
    )
    return CliRunner().invoke(main, ["refine", *map(str, arguments)])


def test_no_time_for_a_round_is_said(
    tiny_model: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(tiny_model, folder, tmp_path / "r.json", "--time", "0.1s")
    assert result.exit_code == 0, result.output
    assert "no round was finished" in caplog.text
    assert "refine" in result.stderr
    assert "0 matrices have another type" in result.stdout
    plan = Plan.load(tmp_path / "r.json")
    assert plan.experts == Plan.load(folder / "plan.json").experts


def test_an_interrupt_writes_what_was_found(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Search._save

    def interrupt(self: Search) -> None:
        saved(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_save", interrupt)
    output = tmp_path / "new" / "refined.plan.json"
    result = run(tiny_model, folder, output, "--time", "1h", "--json", "--bank", tmp_path / "bank")
    assert result.exit_code == 0, result.output
    assert "stopped; checking the best plan so far" in result.stderr
    found, start, plan = json.loads(result.stdout), Plan.load(folder / "plan.json"), Plan.load(output)
    assert found["rounds"] == found["accepted"] == 1
    assert found["changed"] > 0
    assert found["held_out_kld"] < found["held_out_start"]
    assert plan.strategy == "inverted+refine"
    assert (plan.budget, plan.fixed, plan.types) == (start.budget, start.fixed, start.types)
    assert plan.expert_bytes is not None
    assert 8 * plan.expert_bytes <= 3.3 * 6 * 8 * 3 * 256 * 256
    assert plan.refinement is not None
    assert plan.refinement["held_out_kld"] == found["held_out_kld"]
    assert [p.name for p in output.parent.iterdir()] == ["refined.plan.json"]  # no state is left
    assert list((tmp_path / "bank").rglob("*.blocks"))


def test_what_does_not_belong_together_is_refused(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    plan = Plan.load(folder / "plan.json")
    other = tmp_path / "other"
    other.mkdir()
    replace(plan, model_fingerprint="x").save(other / "plan.json")
    options = ("--calibration", folder / "calib.safetensors")
    result = run(tiny_model, other, tmp_path / "r.json", *options)
    assert result.exit_code == 1
    assert "was not made from a calibration of this source" in result.stderr
    for option, value, message in (
        ("--time", "soon", "Error: --time: 'soon' is not a duration"),
        ("--memory", "much", "Error: --memory: 'much' is not a size"),
        ("--tokens", "256", "too few to compare"),
    ):
        result = run(tiny_model, folder, tmp_path / "r.json", option, value)
        assert result.exit_code == 1
        assert message in result.stderr
    assert not (tmp_path / "r.json").exists()
