"""The files that pass between the steps: what is saved is loaded, and damage is refused."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from mc_gguf.artifacts import (
    ALL_PROJECTIONS,
    PROJECTIONS,
    Calibration,
    FixedTypes,
    ModelInfo,
    Plan,
    TensorSpec,
    expert_tensor_name,
    whole_set,
)
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.common.files import sha256_of
from tests.support import ROOT
from tests.support.synthetic_calibration import MERGED, NO_GATE, calibration, model_info

PUBLISHED = ROOT / "tests" / "data" / "mixtral-8x7b" / "calibration.json"


OTHERS = {"blk.1.attn_v.weight": "Q8_0", "blk.0.ffn_up.weight": "Q4_K"}
TABLE = (("IQ1_S", "Q4_K"), ("Q4_K", "IQ1_S"))


def small_plan(**changes: Any) -> Plan:
    plan = Plan(
        strategy="pmq",
        budget={"bpw": 2.5},
        layers=(1, 3),
        experts=dict.fromkeys(PROJECTIONS, TABLE),
        fixed=FixedTypes(),
        types=("IQ1_S", "Q4_K"),
        model_fingerprint="m" * 64,
        calibration_fingerprint="c" * 64,
        expert_bpw=2.5,
        expert_bytes=1000,
        file_bytes=2000,
        predicted_error=0.125,
        optimality_gap=0.0,
        tool="t",
    )
    return replace(plan, **changes)


# --- ModelInfo


def test_a_model_survives_json() -> None:
    model = model_info()
    assert ModelInfo.from_json(json.loads(json.dumps(model.to_json()))) == model


def test_expert_layers_are_those_with_expert_stacks() -> None:
    model = model_info(n_layer=3)
    dense = replace(model, tensors=tuple(t for t in model.tensors if "blk.1.ffn_" not in t.name))
    assert dense.expert_layers == (0, 2)
    assert list(dense.stacks) == [(layer, p) for layer in (0, 2) for p in PROJECTIONS]
    assert replace(model, n_layer=2).expert_layers == (0, 1)  # what comes after predicts further tokens


@pytest.mark.parametrize(
    ("projections", "shapes"),
    [
        (PROJECTIONS, [(512, 256), (512, 256), (256, 512)]),
        (MERGED, [(1024, 256), (256, 512)]),
        (NO_GATE, [(512, 256), (256, 512)]),
    ],
)
def test_expert_shapes(projections: tuple[str, ...], shapes: list[tuple[int, int]]) -> None:
    model = model_info(n_embd=256, n_ff=512, projections=projections)
    assert model.projections == projections
    assert [model.expert_shape(p) for p in projections] == shapes
    assert model.expert_width == 256
    by_name = {t.name: t for t in model.tensors}
    for p in projections:
        rows, cols = model.expert_shape(p)
        assert by_name[expert_tensor_name(0, p)].shape == (cols, rows, 8)
        assert model.stacks[5, p] is by_name[expert_tensor_name(5, p)]


def test_layers_may_differ_in_the_width_of_their_experts() -> None:
    model = model_info(3, n_ff=(256, 768, 512))
    assert model.n_ff == 768
    assert [model.expert_shape("down", layer) for layer in range(3)] == [(256, n) for n in (256, 768, 512)]
    assert model.expert_shape("up") == model.expert_shape("up", 0) == (256, 256)


@pytest.mark.parametrize(
    ("found", "whole"),
    [
        (("gate",), PROJECTIONS),
        (("gate", "down"), PROJECTIONS),
        (("down", "up"), NO_GATE),
        (("gate_up",), MERGED),
        (("gate_up", "up"), ()),
        (ALL_PROJECTIONS, ()),
    ],
)
def test_which_matrices_go_together(found: tuple[str, ...], whole: tuple[str, ...]) -> None:
    assert whole_set(found) == whole


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (64, 64), True),
        ("blk.0.attn_kv_a_mqa.weight", (64, 64), True),
        ("blk.0.ffn_down_shexp.weight", (64, 64), True),
        ("blk.0.ssm_in.weight", (64, 64), True),
        ("token_embd.weight", (64, 64), True),
        ("blk.0.attn_k_b.weight", (64, 64, 4), True),
        ("blk.0.attn_norm.weight", (64,), False),
        ("blk.0.attn_q_norm.weight", (64, 4), False),
        ("blk.0.attn_q.bias", (64, 4), False),
        ("blk.0.ffn_gate_inp.weight", (64, 8), False),
        ("blk.0.ssm_conv1d.weight", (4, 64), False),
        ("blk.0.ssm_a", (64, 4), False),
    ],
)
def test_what_is_a_matrix(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert TensorSpec(name, shape, "BF16").is_matrix == expected


# --- Calibration


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    before = calibration(n_layer=2)
    saved = before.save(tmp_path / "c")
    after = Calibration.load(tmp_path / "c")
    assert saved.fingerprint == after.fingerprint == sha256_of(tmp_path / "c")
    for name in (f.name for f in fields(Calibration) if f.name not in ("fingerprint", "statistics")):
        assert getattr(before, name) == getattr(after, name)
    assert set(before.statistics) == set(after.statistics)
    for name, array in before.statistics.items():
        assert array.dtype == after.statistics[name].dtype
        assert np.array_equal(array, after.statistics[name])


def test_the_same_calibration_is_the_same_file(tmp_path: Path) -> None:
    calibration(n_layer=2).save(tmp_path / "one")
    calibration(n_layer=2).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_calibration_without_a_model_survives(tmp_path: Path) -> None:
    replace(calibration(n_layer=1), model=None).save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c").model is None


def test_the_published_statistics_are_read() -> None:
    source = Calibration.load(PUBLISHED)
    raw = json.loads(PUBLISHED.read_text())
    assert (source.model, source.n_expert, source.layers) == (None, 8, tuple(range(32)))
    assert source.nominal_error.shape == (32, 8, 3)
    assert source.nominal_error[1, 3, 1] == raw["quant_loss"][1][3]["2"]
    assert source.frequency[4, 7] == raw["frequency"][4][7]
    assert source.routing_weight[31, 0] == raw["routing_weight"][31][0]
    assert source.fingerprint == sha256_of(PUBLISHED)


def _bad_published(change: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(PUBLISHED.read_text())
    if change == "missing key":
        del data["routing_weight"]
    elif change == "missing bits":
        del data["quant_loss"][3][2]["3"]
    elif change == "ragged":
        data["frequency"][0].pop()
    elif change == "text":
        data["frequency"][0][0] = "many"
    elif change == "other layers":
        data["quant_loss"].pop()
    elif change == "flat":
        data["frequency"] = data["frequency"][0]
    return data


@pytest.mark.parametrize("change", ["missing key", "missing bits", "ragged", "text", "other layers", "flat"])
def test_damaged_statistics_are_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(_bad_published(change)))
    with pytest.raises(ArtifactError, match=r"c\.json"):
        Calibration.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"not a file of ours", b"\x08\0\0\0\0\0\0\0{}      ", b'{"a": 1}']
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "format field is None"),
        ("[]", "holds no JSON object"),
        ("{", "not a calibration file"),
        ('{"format": "mc_gguf.calibration", "version": 3}', "reads version 4: make the file again"),
        ('{"format": "other", "version": 1}', "format field is 'other'"),
        (
            '{"format": "mc_gguf.calibration", "version": 99}',
            "format version 99; this mc_gguf reads version 4",
        ),
    ],
)
def test_other_safetensors_files_are_refused(tmp_path: Path, header: str | None, message: str) -> None:
    path = tmp_path / "c"
    path.write_bytes(save({"x": np.zeros(3)}, metadata={"mc_gguf": header} if header else None))
    with pytest.raises(ArtifactError, match=message):
        Calibration.load(path)


def test_a_calibration_without_its_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    calibration(n_layer=1).save(path)
    with safe_open(path, framework="numpy") as reader:
        arrays = {name: reader.get_tensor(name) for name in reader.keys()}
    path.write_bytes(save(arrays, metadata={"mc_gguf": '{"format": "mc_gguf.calibration", "version": 4}'}))
    with pytest.raises(ArtifactError, match=r"not a calibration file.*'model'"):
        Calibration.load(path)


def test_a_calibration_without_an_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(
        save({"x": np.zeros(3)}, metadata={"mc_gguf": '{"format": "mc_gguf.calibration", "version": 4}'})
    )
    with pytest.raises(ArtifactError, match="frequency"):
        Calibration.load(path)


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_a_truncated_calibration_is_refused(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("truncated") / "c"
    calibration(n_layer=1, n_expert=2).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ArtifactError):
        Calibration.load(path)


# --- Plan


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bits": ((1, 3), (2, 2))},
        {"file_bytes": None, "expert_bytes": None, "predicted_error": None},
        {"fixed": FixedTypes(others=OTHERS)},
        *({"experts": dict.fromkeys(projections, TABLE)} for projections in (MERGED, NO_GATE)),
    ],
)
def test_a_plan_survives_its_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = small_plan(**changes)
    saved = plan.save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")
    assert loaded == saved
    assert replace(loaded, fingerprint="") == plan
    assert loaded.fingerprint == sha256_of(tmp_path / "p")
    assert loaded.to_text() == plan.to_text()


def test_the_seam_downstream() -> None:
    plan = small_plan()
    assert [plan.type_of(3, e, "up") for e in (0, 1)] == ["Q4_K", "IQ1_S"]
    assert plan.type_of(1, 0, "down") == "IQ1_S"
    for place in ((2, 0, "up"), (1, 2, "up"), (1, -1, "up"), (1, 0, "gate_up")):
        with pytest.raises(McError, match="the plan has no expert"):
            plan.type_of(*place)


def test_the_text_of_a_plan_is_fixed() -> None:
    """Golden: what is diffed and hashed must not change by accident."""
    fixed = FixedTypes(others=OTHERS)
    assert small_plan(bits=((1, 3), (3, 1)), fixed=fixed).to_text() == GOLDEN


def test_the_lines_of_a_plan_are_sorted() -> None:
    keys = [line.split('"')[1] for line in small_plan().to_text().splitlines() if line.startswith('  "')]
    assert keys == sorted(keys)


def _damage(text: str, kind: str) -> str:
    data = json.loads(text)
    if kind == "truncated":
        return text[: len(text) // 2]
    if kind == "list":
        return "[1]"
    if kind == "version":
        data["version"] = 1
    elif kind == "format":
        data["format"] = "other"
    elif kind == "missing":
        del data["experts_up"]
    elif kind == "no experts":
        data = {key: value for key, value in data.items() if not key.startswith("experts_")}
    elif kind == "both":
        data["experts_gate_up"] = data["experts_up"]
    elif kind == "unknown":
        data["extra"] = 1
    elif kind == "fixed":
        data["fixed"]["extra"] = 1
    elif kind == "short row":
        data["experts_up"][0].pop()
    elif kind == "number":
        data["experts_up"][0][0] = 7
    elif kind == "rows":
        data["experts_up"].pop()
    return json.dumps(data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not a valid plan"),
        ("list", "holds no JSON object"),
        ("version", "format version 1; this mc_gguf reads version 2"),
        ("format", "format field is 'other'"),
        ("missing", "lacks experts_up; make it again"),
        ("no experts", "lacks experts_up, experts_down; make it again"),
        ("both", "no expert has gate, up, gate_up, down together; make it again"),
        ("unknown", "extra"),
        ("fixed", "extra"),
        ("short row", "needs 2 type names"),
        ("number", "needs 2 type names"),
        ("rows", "one row of experts for each of its 2 layers"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "p"
    path.write_text(_damage(small_plan().to_text(), kind))
    with pytest.raises(ArtifactError, match=message):
        Plan.load(path)


ODD_VALUES: dict[str, list[Any]] = {
    "budget": ["x", {"bpw": "x"}],
    "calibration_fingerprint": [None, 5],
    "file_bytes": ["x", 1.5],
    "fixed": [None, {"attn": 5}, {"attn": None}, {"others": []}],
    "others": [5, [["blk.0.attn_q.weight"]], [["blk.0.attn_q.weight", 5]], [[5, "Q4_K"]]],
    "layers": [None, ["x"], [-1, 0]],
    "types": [5, [["Q2_K"]]],
    "seed": ["x", None],
    "expert_bpw": [None, "x"],
}


@pytest.mark.parametrize("key", ODD_VALUES)
def test_odd_values_in_a_plan_are_refused(tmp_path: Path, key: str) -> None:
    path, data = tmp_path / "p", json.loads(small_plan().to_text())
    for value in ODD_VALUES[key]:
        changed = {**data[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(data | {key: changed}))
        with pytest.raises(ArtifactError, match="p is not a valid plan"):
            Plan.load(path)


def test_a_deep_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"a":' * 100_000)
    with pytest.raises(ArtifactError, match="p is not a valid plan"):
        Plan.load(tmp_path / "p")


def test_a_pipe_is_no_plan(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    for load in (Plan.load, Calibration.load):
        with pytest.raises(ArtifactError, match="p is no regular file"):
            load(tmp_path / "p")


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        Plan.load(tmp_path / "p")


def test_a_plan_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="is a file of another kind, not a plan"):
        Plan.load(tmp_path / "p")


GOLDEN = """{
  "bits": [
    [1, 3],
    [3, 1]
  ],
  "budget": {"bpw": 2.5},
  "calibration_fingerprint": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
  "expert_bpw": 2.5,
  "expert_bytes": 1000,
  "experts_down": [
    ["IQ1_S", "Q4_K"],
    ["Q4_K", "IQ1_S"]
  ],
  "experts_gate": [
    ["IQ1_S", "Q4_K"],
    ["Q4_K", "IQ1_S"]
  ],
  "experts_up": [
    ["IQ1_S", "Q4_K"],
    ["Q4_K", "IQ1_S"]
  ],
  "file_bytes": 2000,
  "fixed": {"attn": "Q6_K", "attn_kv": "Q8_0", "output": "Q6_K", "token_embd": "Q6_K"},
  "format": "mc_gguf.plan",
  "layer_ratio": null,
  "layers": [1, 3],
  "model_fingerprint": "mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm",
  "objective": "block",
  "optimality_gap": 0.0,
  "others": [
    ["blk.1.attn_v.weight", "Q8_0"],
    ["blk.0.ffn_up.weight", "Q4_K"]
  ],
  "predicted_error": 0.125,
  "predicted_kld": null,
  "refinement": null,
  "seed": 0,
  "strategy": "pmq",
  "tool": "t",
  "types": ["IQ1_S", "Q4_K"],
  "version": 2
}
"""
