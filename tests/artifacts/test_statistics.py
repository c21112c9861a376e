"""The table of statistics: shapes are checked, and what was not measured is absent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mc_gguf.artifacts import Calibration, Statistic, Statistics
from mc_gguf.common.errors import ArtifactError
from tests.support.synthetic_calibration import MERGED, calibration, model_info, with_others
from tools.reference import calibration as calibration_reference

MOVE = re.compile(r"blk\.(\d+)\.")


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
        ("sq_error", np.ones((6, 4, 3, 14)), r"sq_error has the shape \(6, 4, 3, 14\); .*expert 8, "),
        ("weight_error", np.ones((6, 8, 2, 14)), r"weight_error .*projection 3, type 14\]"),
        ("frequency", np.ones(6), r"frequency has the shape \(6,\); its axes are \[layer 6, expert 8\]"),
        ("imatrix_mid", np.ones((6, 8, 256)), "imatrix_mid has the dtype float64, not float32"),
        ("ratio_quantiles", np.ones((6, 2, 101)), r"ratio_quantiles .*\[layer 6, rank 1, quantile "),
        ("routing_curve", np.ones((6, 99)), r"routing_curve has the shape \(6, 99\); .*quantile 101\]"),
        ("nominal_error", np.ones((6, 8, 4)), r"nominal_error .*bits 3\]"),
        ("matrix_error", np.ones((24, 2)), r"matrix_error .*\[matrix 0, matrix_type 0\]"),
        ("matrix_price", np.full(0, np.nan)[:, None], r"matrix_price has the shape \(0, 1\)"),
        ("frequency", np.full((6, 8), np.inf), "frequency has values that are no finite numbers"),
        ("sq_error", np.full((6, 8, 3, 14), np.nan), "sq_error has values that are no finite numbers"),
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
    assert absent == {"kld_per_error", "imatrix_in", "matrix_error", "matrix_price", "matrix_in"}
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
    source = calibration(n_ff=512)
    assert source.model is not None
    moved = [
        replace(t, name=MOVE.sub(lambda m: f"blk.{int(m[1]) + 3}.", t.name)) for t in source.model.tensors
    ]
    model = replace(source.model, n_layer=9, tensors=tuple(moved))
    source = replace(source, model=model, layers=model.expert_layers)
    arrays = source.imatrix_in, source.imatrix_mid
    for number, array in enumerate(arrays):
        array[...] = np.arange(array.size).reshape(array.shape) + number / 2
    for projection, table in (("gate", arrays[0]), ("up", arrays[0]), ("down", arrays[1])):
        np.testing.assert_array_equal(source.imatrix(7, projection, 2), table[4, 2])
    for layer in (0, 9):
        with pytest.raises(ArtifactError, match=f"the calibration has no layer {layer}"):
            source.imatrix(layer, "up", 0)


def test_importance_matrices_are_as_wide_as_the_rows_of_their_layer() -> None:
    source = calibration(3, n_ff=(256, 768, 512), projections=MERGED)
    source.imatrix_mid[...] = np.arange(768)
    for layer, width in enumerate((256, 768, 512)):
        np.testing.assert_array_equal(source.imatrix(layer, "down", 1), np.arange(width))
        np.testing.assert_array_equal(source.imatrix(layer, "gate_up", 1), source.imatrix_in[layer, 1])


def test_importance_matrices_of_other_matrices_are_found_by_name() -> None:
    """One after the other in one array, each as wide as its matrix."""
    source = with_others(calibration(2, n_embd=512), ["Q4_K"])
    assert source.model is not None
    widths = {name: 256 if name == "blk.0.attn_output.weight" else 512 for name in source.matrices}
    tensors = [replace(t, shape=(widths.get(t.name, t.shape[0]), *t.shape[1:])) for t in source.model.tensors]
    array = np.arange(sum(widths.values()), dtype=np.float32)
    statistics = {**source.statistics, "matrix_in": array}
    changed = replace(source, model=replace(source.model, tensors=tuple(tensors)), statistics=statistics)
    found = [changed.matrix_imatrix(name) for name in changed.matrices]
    assert [None if row is None else len(row) for row in found] == list(widths.values())
    np.testing.assert_array_equal(np.concatenate([row for row in found if row is not None]), array)
    assert changed.matrix_imatrix("blk.0.ffn_gate_inp.weight") is None
    assert changed.with_statistics(matrix_in=None).matrix_imatrix(changed.matrices[0]) is None


def test_other_matrices_survive_the_file(tmp_path: Path) -> None:
    before = with_others(calibration(2, n_embd=288, types=("Q8_0",)), ["Q4_K", "Q8_0"])
    assert np.isinf(before.matrix_error).any()
    before.save(tmp_path / "c")
    after = Calibration.load(tmp_path / "c")
    assert (after.matrices, after.matrix_types) == (before.matrices, before.matrix_types)
    for name in ("matrix_error", "matrix_price", "matrix_in"):
        np.testing.assert_array_equal(after.statistics[name], before.statistics[name])


def test_a_matrix_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with_others(calibration(1), ["Q4_K"]).save(path)
    header, arrays = stored(path)
    for old, new, message in (
        ("blk.0.attn_q.weight", "blk.7.attn_q.weight", "has a matrix blk.7.attn_q.weight, which its model"),
        ('"blk.0.attn_q.weight", ', "5, ", "matrices has what is no name"),
    ):
        front, back = header["mc_gguf"].split('"matrices": ')
        save_file(arrays, path, metadata={"mc_gguf": f'{front}"matrices": {back.replace(old, new, 1)}'})
        with pytest.raises(ArtifactError, match=message):
            Calibration.load(path)


def test_the_documented_table_is_the_code_s(repo_root: Path) -> None:
    page = repo_root / "docs" / "reference" / "calibration.md"
    assert page.read_text() == calibration_reference.text(), "run: make docs"
    assert all(f"| `{line.name}` |" in page.read_text() for line in Calibration.table())


def test_the_documented_keys_are_the_file_s(tmp_path: Path) -> None:
    calibration(n_layer=1).save(tmp_path / "c")
    keys = json.loads(stored(tmp_path / "c")[0]["mc_gguf"])
    assert all(f"| `{key}` |" in calibration_reference.HEAD for key in keys)
