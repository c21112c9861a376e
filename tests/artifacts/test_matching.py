"""Which calibration a plan needs, found among other safetensors without reading those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mc_gguf.artifacts import NO_CALIBRATION, matching
from mc_gguf.artifacts.matching import calibrated_model, check_inputs, find_calibration
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import sha256_of
from tests.support.gguf_models import ONES, RandomCheckpoint, make_calibration, make_plan, uniform

pytestmark = pytest.mark.native


def test_only_calibrations_of_the_model_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = RandomCheckpoint(1, 3).info, RandomCheckpoint(1, 4).info
    wanted = make_calibration(mine, tmp_path / "wanted.safetensors")
    make_calibration(mine, tmp_path / "again.safetensors", unused=[(0, 1)])
    make_calibration(other, tmp_path / "of-another-model.safetensors")
    save_file({"weight": np.zeros((8, 8), dtype=np.float32)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"x": np.zeros(1)}, tmp_path / "odd.safetensors", metadata={"mc_gguf": "[]"})
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "folder.safetensors").mkdir()
    hashed: list[str] = []

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(matching, "sha256_of", watched)
    plan = make_plan(mine, uniform(mine, "Q4_0"), tmp_path / "p.json", wanted.fingerprint)
    found = find_calibration(plan, tmp_path)
    assert found is not None
    assert found.fingerprint == wanted.fingerprint
    assert hashed == ["again.safetensors", "wanted.safetensors"]


def test_a_given_calibration_is_taken_and_checked_later(tmp_path: Path) -> None:
    mine, other = RandomCheckpoint(1, 3).info, RandomCheckpoint(1, 4).info
    make_calibration(other, tmp_path / "other.safetensors")
    plan = make_plan(mine, uniform(mine, "Q4_0"), tmp_path / "p.json", ONES)
    given = find_calibration(plan, tmp_path, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="the calibration was made with another model"):
        check_inputs(mine, given, plan)
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors in .* is the plan's calibration"):
        find_calibration(plan, tmp_path)


def test_plans_that_need_none(tmp_path: Path) -> None:
    info = RandomCheckpoint(1, 3).info
    make_calibration(info, tmp_path / "c.safetensors")
    types = uniform(info, "Q4_0")
    assert find_calibration(make_plan(info, types, tmp_path / "p.json", NO_CALIBRATION), tmp_path) is None
    published = make_plan(info, types, tmp_path / "p.json", model_fingerprint="")
    assert find_calibration(published, tmp_path) is None


def test_the_model_of_a_file(tmp_path: Path) -> None:
    info = RandomCheckpoint(1, 3).info
    make_calibration(info, tmp_path / "c.safetensors")
    assert calibrated_model(tmp_path / "c.safetensors") == info.fingerprint
    assert calibrated_model(tmp_path / "missing.safetensors") is None
