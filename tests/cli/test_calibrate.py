"""`mc-gguf calibrate` on the bundled model: files in and out, defaults, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result

from mc_gguf.artifacts import Calibration
from tests.support.command_line import invoke

pytestmark = pytest.mark.native


def run(*arguments: object) -> Result:
    return invoke("calibrate", *arguments)


def test_calibrates_the_bundled_model(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "calib.safetensors"
    result = run(
        tiny_model,
        "-o",
        output,
        "--tokens",
        600,
        "--ctx",
        64,
        "--types",
        "q3_k,Q4_K",
        "--rows",
        32,
        "--threads",
        2,
        "--seed",
        3,
        "--quiet",
    )
    assert result.exit_code == 0, result.output
    assert f"{output}: 6 layers, 8 experts, 2 types, 576 tokens" in result.stdout
    assert "calibrate:" not in result.stderr
    calibration = Calibration.load(output)
    assert calibration.types == ("Q3_K", "Q4_K")
    assert calibration.frequency.sum(axis=1).tolist() == [2 * 576] * 6
    assert (calibration.corpus["ctx"], calibration.corpus["seed"]) == (64, 3)
    assert (calibration.sq_error[..., 0].sum(axis=2) > calibration.sq_error[..., 1].sum(axis=2)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["calib.safetensors"]


def test_the_result_as_json(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--tokens", 128, "--ctx", 64, "--types", "Q8_0", "--json")
    result = run(tiny_model, "-o", tmp_path / "c", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["output"], found["n_layer"], found["tokens"]) == (str(tmp_path / "c"), 6, 128)
    assert (found["types"], found["super_experts"]) == (["Q8_0"], [])


def test_own_text_and_progress(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    result = run(
        tiny_model,
        "-o",
        tmp_path / "c",
        "--text",
        text,
        "--text",
        text,
        "--tokens",
        128,
        "--ctx",
        64,
        "--types",
        "Q8_0",
    )
    assert result.exit_code == 0, result.output
    assert "calibrate: 100 %" in result.stderr
    assert Calibration.load(tmp_path / "c").corpus["sources"] == ["own.txt", "own.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "Q9_K"], "unknown ggml type 'Q9_K'"),
        (["--text", "missing.txt"], "Error: --text: cannot read the text missing.txt"),
        (["--tokens", 100, "--ctx", 200], "Error: --tokens, --ctx: cannot cut 100 tokens into rows of 200"),
    ],
)
def test_errors_are_one_line(tiny_model: Path, tmp_path: Path, arguments: list[object], message: str) -> None:
    result = run(tiny_model, "-o", tmp_path / "c", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_source_is_an_error(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing", "-o", tmp_path / "c")
    assert result.exit_code == 1
    assert "does not exist" in result.stderr
