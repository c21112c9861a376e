"""The table of statistics: shapes are checked, and what was not measured is absent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mc_gguf.artifacts import Calibration, Statistic, Statistics
from mc_gguf.common.errors import ArtifactError
from tests.support.synthetic_calibration import calibration, model_info, with_attention
from tools.reference import calibration as calibration_reference


def stored(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Header and arrays of a file."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


def test_a_line_of_the_table_is_reached_through_the_class() -> None:
    line = Calibration.sq_error
    assert isinstance(line, Statistic)
    assert (line.name, line.axes) == ("sq_error", ("layer", "expert", "projection", "type"))
    assert line in Calibration.table()
    assert Calibration.table() == Statistics.table()


def test_an_array_that_was_not_measured_says_so() -> None:
    without = calibration().with_statistics(kld_per_error=None)
    assert not without.has("kld_per_error")
    assert not without.has("frequency", "kld_per_error")
    assert without.has("frequency", "sq_error")
    with pytest.raises(ArtifactError, match=r"kld_per_error is needed, .* mc-gguf calibrate"):
        _ = without.kld_per_error
    with pytest.raises(KeyError, match="kld"):
        without.has("kld")


def test_a_blank_calibration_has_no_statistics_at_all() -> None:
    blank = Calibration.blank(model_info())
    assert not blank.statistics
    assert (blank.n_expert, blank.layers) == (8, tuple(range(6)))
    assert blank.imatrix(0, "up", 0) is None


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("sq_error", np.ones((6, 4, 3, 11)), r"sq_error has the shape \(6, 4, 3, 11\); .*expert 8, "),
        ("frequency", np.ones(6), r"frequency has the shape \(6,\); its axes are \[layer 6, expert 8\]"),
        ("imatrix_mid", np.ones((6, 8, 256)), "imatrix_mid has the dtype float64, not float32"),
        ("ratio_quantiles", np.ones((6, 2, 101)), r"ratio_quantiles .*\[layer 6, rank 1, quantile "),
        ("routing_curve", np.ones((6, 99)), r"routing_curve has the shape \(6, 99\); .*quantile 101\]"),
        ("nominal_error", np.ones((6, 8, 4)), r"nominal_error .*bits 3\]"),
        ("attention_error", np.ones((6, 4, 2)), r"attention_error .*attention_type 0\]"),
        ("surprise", np.ones(6), "surprise is not a statistic of a calibration; known: frequency, "),
    ],
)
def test_an_array_that_does_not_fit_is_named(name: str, array: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        calibration().with_statistics(**{name: array})


def test_a_file_with_an_array_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    calibration().save(path)
    header, arrays = stored(path)
    save_file({**arrays, "down_max": np.ones((6, 9))}, path, metadata=header)
    with pytest.raises(ArtifactError, match=r"c\.safetensors: down_max has the shape \(6, 9\)"):
        Calibration.load(path)


def test_what_was_not_measured_is_stored_with_the_shape_0(tmp_path: Path) -> None:
    before = calibration().with_statistics(kld_per_error=None, imatrix_in=None)
    before.save(tmp_path / "c")
    _, arrays = stored(tmp_path / "c")
    assert set(arrays) == {line.name for line in Calibration.table()}
    absent = {name for name, array in arrays.items() if array.shape == (0,)}
    assert absent == {"kld_per_error", "imatrix_in", "attention_error", "attention_in", "attention_mid"}
    assert all(arrays[line.name].dtype == line.dtype for line in Calibration.table())
    assert set(Calibration.load(tmp_path / "c").statistics) == set(before.statistics)


def test_an_array_without_ranks_counts_as_measured(tmp_path: Path) -> None:
    """With one expert per token there is no second rank, and the array has no elements."""
    model = replace(model_info(), n_expert_used=1)
    source = calibration()
    ratios = {"ratio_quantiles": np.zeros((6, 0, 101))}
    replace(source, model=model, statistics={**source.statistics, **ratios}).save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c").ratio_quantiles.shape == (6, 0, 101)


def test_unknown_arrays_of_a_file_are_ignored_and_missing_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    calibration().save(path)
    header, arrays = stored(path)
    save_file({**arrays, "later": np.ones(3)}, path, metadata=header)
    assert "later" not in Calibration.load(path).statistics
    del arrays["output_sq"]
    save_file(arrays, path, metadata=header)
    with pytest.raises(ArtifactError, match=r"not a calibration file.*output_sq"):
        Calibration.load(path)


def test_importance_matrices_are_found_by_the_model_s_layer_number() -> None:
    """The layers with experts are 3 to 8 here."""
    source = with_attention(calibration(n_ff=512), ["Q4_K"])
    source = replace(source, layers=tuple(range(3, 9)))
    arrays = source.imatrix_in, source.imatrix_mid, source.attention_in, source.attention_mid
    for number, array in enumerate(arrays):
        array[...] = np.arange(array.size).reshape(array.shape) + number / 2
    for projection, table in (("gate", arrays[0]), ("up", arrays[0]), ("down", arrays[1])):
        np.testing.assert_array_equal(source.imatrix(7, projection, 2), table[4, 2])
    for part, table in (("q", arrays[2]), ("k", arrays[2]), ("v", arrays[2]), ("output", arrays[3])):
        np.testing.assert_array_equal(source.attention_imatrix(3, part), table[0])
    with pytest.raises(ArtifactError, match="the calibration has no layer 0"):
        source.imatrix(0, "up", 0)
    with pytest.raises(ArtifactError, match="the calibration has no layer 9"):
        source.attention_imatrix(9, "q")


def test_the_documented_table_is_the_code_s(repo_root: Path) -> None:
    page = repo_root / "docs" / "reference" / "calibration.md"
    assert page.read_text() == calibration_reference.text(), "run: make docs"
    assert all(f"| `{line.name}` |" in page.read_text() for line in Calibration.table())


def test_the_documented_keys_are_the_file_s(tmp_path: Path) -> None:
    calibration(n_layer=1).save(tmp_path / "c")
    keys = json.loads(stored(tmp_path / "c")[0]["mc_gguf"])
    assert all(f"| `{key}` |" in calibration_reference.HEAD for key in keys)
