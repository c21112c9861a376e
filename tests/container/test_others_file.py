"""A file whose other matrices were decided in the experts' budget, from the model to the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mc_gguf import Llama
from mc_gguf.artifacts import Calibration, Plan
from mc_gguf.cli import main
from mc_gguf.container import MixedGguf
from mc_gguf.ggml.quantizers import quantize_rows
from mc_gguf.refine.budget import scope_of
from mc_gguf.source import open_checkpoint

pytestmark = pytest.mark.native
SIZE = 5_300_000
QUICK = ("--tokens", "512", "--ctx", "128", "--rows", "16", "--types", "IQ1_S,IQ2_XXS,Q3_K", "--quiet")


def test_convert_writes_the_types_that_the_plan_chose(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    arguments = ["convert", tiny_model, "-o", path, "--size", SIZE, *QUICK]  # --others auto by default
    result = CliRunner().invoke(main, [*map(str, arguments), "--no-compensate"])
    assert result.exit_code == 0, result.output
    assert "other matrices" in result.output
    plan = Plan.load(tmp_path / "model.plan.json")
    assert plan.file_bytes == path.stat().st_size <= SIZE
    assert len(set(plan.fixed.others.values())) > 1
    header = MixedGguf.open(path).header.tensors
    calibration = Calibration.load(tmp_path / "model.calib.safetensors")
    scope, columns = scope_of(plan, calibration)  # refinement stays within the same file
    assert scope.file_bytes(columns) == plan.file_bytes
    checkpoint, data = open_checkpoint(tiny_model), path.read_bytes()
    parts = [f"attn_{part}.weight" for part in ("q", "k", "v", "output")]
    assert set(plan.fixed.others) == {f"blk.{layer}.{part}" for layer in plan.layers for part in parts}
    assert set(calibration.matrices) == set(plan.fixed.others)
    for name, kind in plan.fixed.others.items():
        tensor = header[name]
        assert tensor.type.name == kind
        imatrix = calibration.matrix_imatrix(name)
        assert imatrix is not None
        assert imatrix.shape == tensor.shape[:1]
        assert imatrix.min() > 0
        expected = quantize_rows(checkpoint.tensor(name), kind, imatrix, 1)
        assert data[tensor.offset : tensor.offset + tensor.n_bytes] == expected.tobytes()
    inspected = CliRunner().invoke(main, ["inspect", str(path)])
    assert inspected.exit_code == 0
    llama: Any = Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    assert llama("The", max_tokens=4)["choices"][0]["text"]
