"""`mc-gguf quantize` from files on disk to a file on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mc_gguf.cli import main
from mc_gguf.container import validate
from mc_gguf.source import Checkpoint, open_checkpoint
from tests.support.gguf_models import make_calibration, make_plan, uniform


@pytest.fixture(scope="module")
def source(tiny_gguf: Path) -> Checkpoint:
    return open_checkpoint(tiny_gguf)


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["quantize", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_calibration_is_found_beside_the_plan(source: Checkpoint, tiny_gguf: Path, tmp_path: Path) -> None:
    make_calibration(source.info, tmp_path / "another.safetensors", unused=[(0, 0)])
    calibration = make_calibration(source.info, tmp_path / "calib.safetensors")
    plan = make_plan(
        source.info, uniform(source.info, "IQ4_XS"), tmp_path / "plan.json", calibration.fingerprint
    )
    output = tmp_path / "out" / "m.gguf"
    code, stdout, stderr = run(tiny_gguf, tmp_path / "plan.json", "-o", output, "--threads", 2)
    assert code == 0
    assert "4.2500 bits per expert weight" in stdout
    assert "quantize" in stderr
    assert "100 %" in stderr
    model = validate(output)
    assert (model.plan_fingerprint, model.calibration_fingerprint) == (
        plan.fingerprint,
        calibration.fingerprint,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "plan.json").rename(elsewhere / "plan.json")
    arguments = (tiny_gguf, elsewhere / "plan.json", "-o", tmp_path / "n.gguf", "--threads", 2)
    code, _, stderr = run(*arguments)
    assert code == 1
    assert "Error: --calibration: no *.safetensors in" in stderr
    code, _, _ = run(*arguments, "--calibration", tmp_path / "calib.safetensors")
    assert code == 0
    assert (tmp_path / "n.gguf").read_bytes() == output.read_bytes()


def test_errors_are_one_line(source: Checkpoint, tiny_gguf: Path, tmp_path: Path) -> None:
    make_plan(source.info, uniform(source.info, "Q2_K"), tmp_path / "plan.json", model_fingerprint="0" * 64)
    make_calibration(source.info, tmp_path / "calib.safetensors")
    output = tmp_path / "m.gguf"
    for arguments, message in (
        (
            (tmp_path / "no.gguf", tmp_path / "plan.json", "--calibration", tmp_path / "calib.safetensors"),
            "not exist",
        ),
        ((tiny_gguf, tmp_path / "no.json"), "cannot read"),
        ((tiny_gguf, tmp_path / "plan.json"), "Error: --calibration: no *.safetensors"),
        (
            (tiny_gguf, tmp_path / "plan.json", "--calibration", tmp_path / "calib.safetensors"),
            "another model",
        ),
    ):
        code, stdout, stderr = run(*arguments, "-o", output)
        assert code == 1
        assert message in stderr
        assert [line for line in stderr.splitlines() if "rror" in line] == stderr.splitlines()[-1:]
        assert stdout == ""
    assert not output.exists()
