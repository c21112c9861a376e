"""The mixed-expert GGUF: exact sizes, gguf-py as second reader, and every broken rule rejected by name."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mc_gguf import container
from mc_gguf.artifacts import PROJECTIONS, FixedTypes, TensorSpec
from mc_gguf.common.errors import FormatError, McError
from mc_gguf.container.table import render_description
from mc_gguf.ggml.gguf_file import FLOAT32, STRING, UINT32, Value
from mc_gguf.ggml.types import CANDIDATES, MAX_GROUPS, TYPES
from mc_gguf.runtime.packages import load_gguf
from tests.support.gguf_models import (
    ONES,
    TWOS,
    Part,
    RandomCheckpoint,
    renamed,
    take_apart,
    uniform,
    write_parts,
    write_random,
)
from tests.support.synthetic_calibration import MERGED, NO_GATE

pytestmark = pytest.mark.native

SMALL_TYPES = ("F32", "F16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "BF16")
T = "blk.0.ffn_gate_exps.weight"
EXPERTS = {
    "gate": [["Q8_0", "Q4_0", "Q8_0", "F16"], ["Q8_0"] * 4],
    "up": [["Q4_0"] * 4, ["BF16", "Q4_0", "Q4_0", "Q4_0"]],
    "down": [["Q5_0", "Q4_0", "Q4_0", "Q5_0"], ["Q4_0"] * 4],
}
KV = dict[str, Value]
PROPERTY = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, four experts; gate of layer 0 has three groups."""
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    write_random(path, RandomCheckpoint(), EXPERTS)
    return path


def test_layout_of_a_mixed_tensor(good: Path) -> None:
    header = container.validate(good).header
    names = [name for name in header.tensors if name.startswith(T)]
    assert names == [f"{T}.map", f"{T}.0", f"{T}.1", f"{T}.2"]
    shapes = [header.tensors[name].shape for name in names]
    assert shapes == [(2, 4), (32, 64, 1), (32, 64, 1), (32, 64, 2)]
    assert [header.tensors[name].type.name for name in names] == ["I32", "F16", "Q4_0", "Q8_0"]
    entry = header.tensors[f"{T}.map"]
    data = good.read_bytes()[entry.offset : entry.offset + entry.n_bytes]
    assert struct.unpack("<8i", data) == (2, 0, 1, 0, 2, 1, 0, 0)
    assert header.tensors["blk.0.ffn_up_exps.weight"].shape == (32, 64, 4)  # one type: as stock


def test_own_keys(good: Path) -> None:
    model = container.validate(good)
    assert model.header.get("mc_gguf.version") == 1
    assert (model.plan_fingerprint, model.calibration_fingerprint) == (ONES, TWOS)
    assert model.header.get("general.quantization_version") == 2
    assert model.header.get("general.file_type") == 2  # most weights are Q4_0
    assert model.is_ours
    assert model.is_mixed


def test_gguf_py_reads_the_same(good: Path) -> None:
    reader = load_gguf().GGUFReader(good)
    header = container.validate(good).header
    assert [t.name for t in reader.tensors] == list(header.tensors)
    for t in reader.tensors:
        entry = header.tensors[t.name]
        assert (entry.shape, entry.type.id) == (tuple(t.shape), int(t.tensor_type))
        assert (entry.offset, entry.n_bytes) == (t.data_offset, t.n_bytes)
    for key, value in header.kv.items():
        assert reader.get_field(key).contents() == value.value


def test_slices_are_where_the_map_says(good: Path) -> None:
    model = container.validate(good)
    tensors = {t.name: t for t in container.layout(RandomCheckpoint().info, EXPERTS, FixedTypes())}
    data = good.read_bytes()
    for t in tensors.values():
        layer = int(t.name.split(".")[1]) if t.experts is not None else 0
        for position, expert in enumerate(t.experts or ()):
            projection = next(p for p in PROJECTIONS if f"ffn_{p}_exps" in t.name)
            size = t.n_bytes // len(t.experts or ())
            expected = data[t.offset + position * size : t.offset + (position + 1) * size]
            assert model.data(layer, projection, expert).tobytes() == expected
            assert model.type_of(layer, projection, expert).name == EXPERTS[projection][layer][expert]
    assert model.tensor_data("output_norm.weight").nbytes == 32 * 4


@given(st.data())
@PROPERTY
def test_file_bytes_is_the_size_of_the_file(tmp_path: Path, data: st.DataObject) -> None:
    n_layer, n_expert = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    checkpoint = RandomCheckpoint(n_layer, n_expert, n_ff=data.draw(st.sampled_from([32, 96])))
    row = st.lists(st.sampled_from(SMALL_TYPES), min_size=n_expert, max_size=n_expert)
    experts = {p: data.draw(st.lists(row, min_size=n_layer, max_size=n_layer)) for p in PROJECTIONS}
    path = tmp_path / "model.gguf"
    write_random(path, checkpoint, experts)
    model = container.validate(path)
    assert path.stat().st_size == container.file_bytes(checkpoint.info, experts, FixedTypes())
    for layer in range(n_layer):
        for projection in PROJECTIONS:
            types = [model.type_of(layer, projection, e).name for e in range(n_expert)]
            assert types == experts[projection][layer]


def test_all_candidates_in_one_tensor(tmp_path: Path) -> None:
    """As many as a file can hold; a plan leaves out what is more (mc_gguf/plan/problem.py)."""
    for n, names in enumerate((CANDIDATES[:MAX_GROUPS], (*CANDIDATES[-11:], "F16", "BF16"))):
        checkpoint = RandomCheckpoint(1, 13, n_embd=256, n_ff=256)
        experts = {p: [list(names)] for p in PROJECTIONS}
        write_random(tmp_path / f"{n}.gguf", checkpoint, experts)
        model = container.validate(tmp_path / f"{n}.gguf")
        weights = [TYPES[name].bpw for name in experts["gate"][0]]
        assert model.expert_bpw == pytest.approx(sum(weights) / 13)


def test_too_many_groups() -> None:
    checkpoint = RandomCheckpoint(1, 14, n_embd=256, n_ff=256)
    experts = {p: [list(CANDIDATES)] for p in PROJECTIONS}
    with pytest.raises(McError, match=r"blk\.0\.ffn_gate_exps\.weight would need 14 groups; 13"):
        container.file_bytes(checkpoint.info, experts, FixedTypes())


def test_wrong_number_of_types() -> None:
    info = RandomCheckpoint(1, 3).info
    with pytest.raises(McError, match="2 types for up in layer 0, the model has 3"):
        container.file_bytes(info, {**uniform(info, "F16"), "up": [["F16"] * 2]}, FixedTypes())


@pytest.mark.parametrize(
    ("name", "shape", "source", "expected"),
    [
        ("blk.0.attn_k.weight", (256, 64), "BF16", "Q8_0"),
        ("blk.0.attn_v.weight", (256, 64), "BF16", "Q8_0"),
        ("blk.0.attn_q.weight", (256, 64), "BF16", "Q6_K"),
        ("blk.0.attn_output.weight", (256, 64), "BF16", "Q6_K"),
        ("blk.0.ffn_down_shexp.weight", (256, 64), "BF16", "Q6_K"),
        ("token_embd.weight", (256, 64), "BF16", "Q5_K"),
        ("output.weight", (256, 64), "BF16", "Q4_K"),
        ("output.weight", (160, 64), "BF16", "Q8_0"),
        ("output.weight", (48, 64), "BF16", "F16"),
        ("blk.0.ffn_gate_inp.weight", (256, 8), "BF16", "F32"),
        ("blk.0.attn_norm.weight", (256,), "F32", "F32"),
        ("blk.0.attn_q.bias", (256,), "F32", "F32"),
        ("blk.0.ssm_conv1d.weight", (256, 4), "F32", "F32"),
        ("blk.0.ssm_conv1d.weight", (256, 4), "BF16", "F32"),
        ("blk.0.ssm_in.weight", (256, 64), "BF16", "Q6_K"),
        ("blk.0.attn_kv_a_mqa.weight", (256, 64), "BF16", "Q6_K"),
        # A source that is quantized already gets no more bits than it has.
        ("blk.0.attn_q.weight", (256, 64), "Q4_1", "Q4_1"),
        ("blk.0.attn_k.weight", (256, 64), "Q4_K", "Q4_K"),
        ("blk.0.attn_k.weight", (256, 64), "MXFP4", "MXFP4"),
        ("blk.0.attn_q.weight", (256, 64), "Q8_0", "Q6_K"),
        ("blk.0.attn_q.weight", (256, 64), "Q6_K", "Q6_K"),
        ("blk.0.ffn_gate_inp.weight", (256, 8), "Q8_0", "F32"),
        # What is no weight stays as it is.
        ("blk.0.ffn_gate_tid2eid", (8, 64), "I32", "I32"),
        ("blk.0.some_index.weight", (8, 64), "I64", "I64"),
        # A plan's own choice overrides everything.
        ("blk.3.attn_k.weight", (256, 64), "BF16", "Q3_K"),
        ("blk.3.ffn_norm.weight", (256,), "F32", "BF16"),
        ("blk.3.attn_q.weight", (256, 64), "Q4_1", "Q4_1"),
    ],
)
def test_fixed_types(name: str, shape: tuple[int, ...], source: str, expected: str) -> None:
    others = {"blk.3.attn_k.weight": "Q3_K", "blk.3.ffn_norm.weight": "BF16", "blk.3.attn_q.weight": "Q4_1"}
    fixed = FixedTypes(token_embd="Q5_K", output="Q4_K", others=others)
    assert container.fixed_type(TensorSpec(name, shape, source), fixed).name == expected


def test_a_type_that_is_none_is_named() -> None:
    info = RandomCheckpoint().info
    for kind, message in (
        ("Q77", "unknown ggml type 'Q77'"),
        ("Q4_K", "Q4_K needs rows that are a multiple"),
    ):
        fixed = FixedTypes(others={"blk.0.attn_q.weight": kind})
        with pytest.raises(McError, match=message):
            container.file_bytes(info, EXPERTS, fixed)


def test_an_f32_source_is_quantized_all_the_same(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(kind="F32")
    types = {t.name: t.type.name for t in container.layout(checkpoint.info, EXPERTS, FixedTypes())}
    assert types["blk.0.attn_q.weight"] == "Q8_0"  # rows of 32: no k-quant
    assert types["blk.0.attn_norm.weight"] == "F32"


# --- experts with other matrices


def other(projections: tuple[str, ...]) -> tuple[RandomCheckpoint, dict[str, list[list[str]]]]:
    checkpoint = RandomCheckpoint(projections=projections)
    first = {p: [["Q8_0", "Q4_0", "Q8_0", "F16"], ["Q4_0"] * 4] for p in projections[:1]}
    return checkpoint, first | {"down": [["Q5_0", "Q4_0", "Q4_0", "Q5_0"], ["Q8_0"] * 4]}


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
def test_experts_with_other_matrices(tmp_path: Path, projections: tuple[str, ...]) -> None:
    checkpoint, experts = other(projections)
    path = tmp_path / "m.gguf"
    write_random(path, checkpoint, experts)
    model = container.validate(path)
    assert path.stat().st_size == container.file_bytes(checkpoint.info, experts, FixedTypes())
    assert list(model.slices) == [(layer, p) for layer in (0, 1) for p in projections]
    data = path.read_bytes()
    for t in container.layout(checkpoint.info, experts, FixedTypes()):
        for position, expert in enumerate(t.experts or ()):
            layer = int(t.name.split(".")[1])
            projection = next(p for p in projections if f"ffn_{p}_exps" in t.name)
            size = t.n_bytes // len(t.experts or ())
            expected = data[t.offset + position * size : t.offset + (position + 1) * size]
            assert model.data(layer, projection, expert).tobytes() == expected
            assert model.type_of(layer, projection, expert).name == experts[projection][layer][expert]
            assert model.slices[layer, projection][expert].shape == t.source.shape[:2]
    first = f"blk.0.ffn_{projections[0]}_exps.weight"
    assert model.header.tensors[f"{first}.2"].shape == (32, 128 if projections == MERGED else 64, 2)
    n_row = 128 if projections == MERGED else 64
    weights = [32 * n_row * TYPES[name].bpw for row in experts[projections[0]] for name in row]
    weights += [32 * 64 * TYPES[name].bpw for row in experts["down"] for name in row]
    assert model.expert_bpw == pytest.approx(sum(weights) / (8 * 32 * (n_row + 64)))


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
def test_other_matrices_are_shown_under_their_names(tmp_path: Path, projections: tuple[str, ...]) -> None:
    checkpoint, experts = other(projections)
    write_random(tmp_path / "m.gguf", checkpoint, experts)
    described = container.describe_model(container.validate(tmp_path / "m.gguf"))
    assert described["layers"][0]["experts"][0] == {projections[0]: "Q8_0", "down": "Q5_0"}
    lines = render_description(described).splitlines()
    assert "    0  Q8_0/Q5_0  Q4_0       Q8_0/Q4_0  F16/Q5_0" in lines
    table = next(i for i, line in enumerate(lines) if line.startswith("type"))
    assert lines[table].split() == ["type", *projections, "tensors", "size"]
    totals = {line.split()[0]: line for line in lines[table + 1 :]}
    assert totals["Q8_0"].split()[1:3] == ["2", "4"]
    assert totals["Q4_0"].split()[1:3] == ["5", "2"]
    assert totals["F16"].split()[1] == "1"
    write_random(tmp_path / "u.gguf", checkpoint, uniform(checkpoint.info, "Q4_0"))
    shown = render_description(container.describe_model(container.validate(tmp_path / "u.gguf")))
    assert f"layer  experts ({'/'.join(projections)})" in shown


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
def test_a_plan_for_other_matrices_is_refused(projections: tuple[str, ...]) -> None:
    checkpoint, experts = other(projections)
    with pytest.raises(McError, match=rf"0 types for {projections[0]} in layer 0, the model has 4"):
        container.file_bytes(checkpoint.info, {"down": experts["down"]}, FixedTypes())
    with pytest.raises(McError, match="the plan gives 0 types for gate in layer 0"):
        container.file_bytes(RandomCheckpoint().info, experts, FixedTypes())


def test_header_refuses_a_fingerprint_that_is_none() -> None:
    checkpoint = RandomCheckpoint()
    tensors = container.layout(checkpoint.info, EXPERTS, FixedTypes())
    with pytest.raises(FormatError, match=r"mc_gguf\.calibration: ''"):
        container.encode_header(checkpoint, tensors, ONES, "")


# --- broken rules
# ---------------------------------------------------------------------------------------------------


def _index(parts: Sequence[Part], name: str) -> int:
    return next(i for i, p in enumerate(parts) if p.name == name)


def _map(parts: list[Part], change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    i = _index(parts, f"{T}.map")
    table = np.frombuffer(parts[i].data, dtype="<i4").reshape(4, 2).copy()
    change(table)
    parts[i] = replace(parts[i], data=table.tobytes())


def _place(expert: int, column: int, value: int) -> Callable[[KV, list[Part]], None]:
    return lambda kv, parts: _map(parts, lambda table: table.__setitem__((expert, column), value))


def _swap_places(kv: KV, parts: list[Part]) -> None:
    _map(parts, lambda table: table.__setitem__(([0, 2],), table[[2, 0]]))


def _same_place(kv: KV, parts: list[Part]) -> None:
    _map(parts, lambda table: table.__setitem__(2, table[0]))


def _drop(name: str) -> Callable[[KV, list[Part]], None]:
    def change(kv: KV, parts: list[Part]) -> None:
        del parts[_index(parts, name)]

    return change


def _key(name: str, value: Value | None) -> Callable[[KV, list[Part]], None]:
    def change(kv: KV, parts: list[Part]) -> None:
        del kv[name]
        kv.update({} if value is None else {name: value})

    return change


def _rename(name: str, new: str) -> Callable[[KV, list[Part]], None]:
    def change(kv: KV, parts: list[Part]) -> None:
        i = _index(parts, name)
        parts[i] = renamed(parts[i], new)

    return change


def _replace(name: str, **changes: Any) -> Callable[[KV, list[Part]], None]:
    def change(kv: KV, parts: list[Part]) -> None:
        i = _index(parts, name)
        parts[i] = replace(parts[i], **changes)

    return change


def _whole_too(kv: KV, parts: list[Part]) -> None:
    parts.append(Part(T, (32, 64, 4), 2, bytes(64 * 18 * 4)))


def _swap_groups(kv: KV, parts: list[Part]) -> None:
    i, j = _index(parts, f"{T}.0"), _index(parts, f"{T}.1")
    parts[i], parts[j] = renamed(parts[j], f"{T}.0"), renamed(parts[i], f"{T}.1")


def _apart(kv: KV, parts: list[Part]) -> None:
    parts.append(parts.pop(_index(parts, f"{T}.1")))


def _one_group(kv: KV, parts: list[Part]) -> None:
    name = "blk.0.ffn_up_exps.weight"
    i = _index(parts, name)
    table = np.array([[0, e] for e in range(4)], dtype="<i4")
    parts[i : i + 1] = [Part(f"{name}.map", (2, 4), 26, table.tobytes()), renamed(parts[i], f"{name}.0")]


BROKEN: dict[str, tuple[Callable[[KV, list[Part]], None], str]] = {
    "map missing": (_drop(f"{T}.map"), rf"tensor {T}\.map: is missing"),
    "group missing": (_drop(f"{T}.1"), rf"tensor {T}\.2: is not one of the groups"),
    "last group missing": (_drop(f"{T}.2"), rf"tensor {T}\.0: the groups hold 2 experts, the model has 4"),
    "whole and in groups": (_whole_too, rf"tensor {T}: is there whole and in groups"),
    "group out of range": (_place(1, 0, 3), rf"tensor {T}\.map: expert 1 is in group 3 of 3"),
    "group negative": (_place(1, 0, -1), rf"tensor {T}\.map: expert 1 is in group -1"),
    "position out of range": (_place(2, 1, 2), rf"tensor {T}\.map: expert 2 is at 2 of 2 in group 2"),
    "position negative": (_place(2, 1, -1), rf"tensor {T}\.map: expert 2 is at -1"),
    "experts swapped": (_swap_places, rf"tensor {T}\.map: expert 0 is at 1 in group 2"),
    "place taken twice": (_same_place, rf"tensor {T}\.map: expert 2 is at 0 in group 2"),
    "map of another type": (_replace(f"{T}.map", type_id=0), rf"tensor {T}\.map: is F32 \[2, 4\], not I32"),
    "map of another shape": (
        _replace(f"{T}.map", shape=(4, 2)),
        rf"tensor {T}\.map: is I32 \[4, 2\], not I32",
    ),
    "types descending": (_swap_groups, rf"tensor {T}\.1: type F16 after Q4_0: ids must ascend"),
    "type twice": (
        _replace(f"{T}.1", type_id=1, data=bytes(64 * 64)),
        rf"tensor {T}\.1: type F16 after F16: ids must ascend",
    ),
    "type not for experts": (
        _replace(f"{T}.0", type_id=26, data=bytes(64 * 128)),
        rf"tensor {T}\.0: type I32 is not allowed",
    ),
    "group of another shape": (_replace(f"{T}.1", shape=(64, 32, 1)), rf"tensor {T}\.1: shape \[64, 32, 1\]"),
    "group without experts' axis": (_replace(f"{T}.1", shape=(32, 64)), rf"tensor {T}\.1: shape \[32, 64\]"),
    "unknown part": (_rename(f"{T}.1", f"{T}.x"), rf"tensor {T}\.x: is not one of the groups"),
    "number with a zero": (_rename(f"{T}.1", f"{T}.01"), rf"tensor {T}\.01: is not one of the groups"),
    "groups apart": (_apart, rf"tensor {T}\.map: is not followed at once by its groups"),
    "one group": (_one_group, r"tensor blk\.0\.ffn_up_exps\.weight\.map: 1 groups; 2 to 13"),
    "version missing": (_key("mc_gguf.version", None), r"key mc_gguf\.version: is missing"),
    "version unknown": (
        _key("mc_gguf.version", Value(UINT32, 2)),
        r"key mc_gguf\.version: version 2 is not known",
    ),
    "version of another type": (
        _key("mc_gguf.version", Value(STRING, "1")),
        r"key mc_gguf\.version: has value type 8",
    ),
    "bits missing": (_key("mc_gguf.expert_bpw", None), r"key mc_gguf\.expert_bpw: is missing"),
    "bits wrong": (_key("mc_gguf.expert_bpw", Value(FLOAT32, 2.0)), r"key mc_gguf\.expert_bpw: says 2\.0"),
    "plan missing": (_key("mc_gguf.plan", None), r"key mc_gguf\.plan: is missing"),
    "plan no hash": (
        _key("mc_gguf.plan", Value(STRING, "plan.json")),
        r"key mc_gguf\.plan: 'plan\.json' is not",
    ),
    "calibration no hash": (
        _key("mc_gguf.calibration", Value(STRING, ONES[1:])),
        r"key mc_gguf\.calibration: '",
    ),
    "expert count missing": (_key("llama.expert_count", None), r"key llama\.expert_count: is None"),
    "expert count other": (_key("llama.expert_count", Value(UINT32, 5)), r"tensor blk\.0\.ffn_.*: .*5"),
    "projection missing": (
        _drop("blk.1.ffn_down_exps.weight"),
        r"tensor blk\.1\.ffn_down_exps\.weight: is missing; the others",
    ),
    "gate of one layer missing": (
        _drop("blk.1.ffn_gate_exps.weight"),
        r"tensor blk\.1\.ffn_gate_exps\.weight: is missing; the others",
    ),
    "projection of another shape": (
        _replace("blk.1.ffn_gate_exps.weight", shape=(64, 32, 4)),
        r"tensor blk\.1\.ffn_up_exps\.weight: experts \(32, 64\) do not fit gate's \(64, 32\)",
    ),
    "down not turned": (
        _replace("blk.1.ffn_down_exps.weight", shape=(32, 64, 4)),
        r"tensor blk\.1\.ffn_down_exps\.weight: experts \(32, 64\) do not fit",
    ),
}


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """No plan decides them: their experts have the type of all other matrices."""
    checkpoint = RandomCheckpoint(3)
    checkpoint.info = replace(checkpoint.info, n_layer=2)
    write_random(tmp_path / "m.gguf", checkpoint, EXPERTS)
    model = container.validate(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").stat().st_size == container.file_bytes(
        checkpoint.info, EXPERTS, FixedTypes()
    )
    for projection in PROJECTIONS:
        assert [model.type_of(2, projection, e).name for e in range(4)] == ["Q8_0"] * 4
        assert [model.type_of(1, projection, e).name for e in range(4)] == EXPERTS[projection][1]


def _added(name: str, shape: tuple[int, ...]) -> Callable[[KV, list[Part]], None]:
    def change(kv: KV, parts: list[Part]) -> None:
        parts.append(Part(name, shape, 1, bytes(2 * int(np.prod(shape)))))

    return change


MERGED_1, UP_1, DOWN_1 = (f"blk.1.ffn_{p}_exps.weight" for p in ("gate_up", "up", "down"))


GATE_UP, UP, DOWN = (f"blk.1.ffn_{p}_exps.weight" for p in ("gate_up", "up", "down"))
BROKEN_OTHERS: dict[str, tuple[tuple[str, ...], Callable[[KV, list[Part]], None], str]] = {
    "merged missing": (
        MERGED,
        _drop(GATE_UP),
        r"tensor blk\.1\.ffn_gate_up_exps\.weight: is missing; the others",
    ),
    "down of merged missing": (MERGED, _drop(DOWN), r"tensor blk\.1\.ffn_down_exps\.weight: is missing"),
    "up missing": (NO_GATE, _drop(UP), r"tensor blk\.1\.ffn_up_exps\.weight: is missing; the others"),
    "gate in one layer alone": (
        NO_GATE,
        _added("blk.1.ffn_gate_exps.weight", (32, 64, 4)),
        r"tensor blk\.0\.ffn_gate_exps\.weight: is missing; the others",
    ),
    "merged and up": (
        MERGED,
        _added(UP, (32, 64, 4)),
        r"tensor blk\.0\.ffn_gate_up_exps\.weight: cannot be beside tensors of gate or up alone",
    ),
    "merged of half the rows": (
        MERGED,
        _replace(DOWN, shape=(128, 32, 4), type_id=1, data=bytes(2 * 128 * 32 * 4)),
        r"tensor blk\.1\.ffn_down_exps\.weight: experts \(128, 32\) do not fit gate_up's \(32, 128\)",
    ),
    "merged of odd rows": (
        MERGED,
        _replace(GATE_UP, shape=(32, 129, 4), type_id=1, data=bytes(2 * 129 * 32 * 4)),
        r"tensor blk\.1\.ffn_down_exps\.weight: experts \(64, 32\) do not fit gate_up's \(32, 129\)",
    ),
    "down of another width": (
        NO_GATE,
        _replace(DOWN, shape=(32, 32, 4), type_id=1, data=bytes(2 * 32 * 32 * 4)),
        r"tensor blk\.1\.ffn_down_exps\.weight: experts \(32, 32\) do not fit up's \(32, 64\)",
    ),
}


@pytest.mark.parametrize("rule", BROKEN_OTHERS)
def test_broken_rule_of_other_matrices_is_named(tmp_path: Path, rule: str) -> None:
    projections, change, message = BROKEN_OTHERS[rule]
    write_random(tmp_path / "m.gguf", *other(projections))
    kv, parts = take_apart(tmp_path / "m.gguf")
    change(kv, parts)
    write_parts(tmp_path / "broken.gguf", kv, parts)
    with pytest.raises(FormatError, match=message):
        container.validate(tmp_path / "broken.gguf")


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rule_is_named(good: Path, tmp_path: Path, rule: str) -> None:
    change, message = BROKEN[rule]
    kv, parts = take_apart(good)
    write_parts(tmp_path / "same.gguf", kv, parts)
    container.validate(tmp_path / "same.gguf")  # what is refused below is refused for the change alone
    change(kv, parts)
    write_parts(tmp_path / "broken.gguf", kv, parts)
    with pytest.raises(FormatError, match=message):
        container.validate(tmp_path / "broken.gguf")


@given(table=st.lists(st.integers(-2, 4), min_size=8, max_size=8))
@PROPERTY
def test_only_the_one_right_map_is_accepted(good: Path, tmp_path: Path, table: list[int]) -> None:
    """Random maps: accepted exactly when they put the experts, ascending, into the places that there are."""
    kv, parts = take_apart(good)
    _map(parts, lambda old: old.__setitem__(slice(None), np.reshape(table, (4, 2))))
    write_parts(tmp_path / "map.gguf", kv, parts)
    places = [tuple(table[i : i + 2]) for i in range(0, 8, 2)]
    right = sorted(places) == [(0, 0), (1, 0), (2, 0), (2, 1)] and places.index((2, 0)) < places.index((2, 1))
    if right:
        container.validate(tmp_path / "map.gguf")
    else:
        with pytest.raises(FormatError, match=rf"tensor {T}\.map"):
            container.validate(tmp_path / "map.gguf")


@given(order=st.permutations([(0, 0), (1, 0), (2, 0), (2, 1)]))
@PROPERTY
def test_all_right_maps_are_accepted(good: Path, tmp_path: Path, order: list[tuple[int, int]]) -> None:
    kv, parts = take_apart(good)
    _map(parts, lambda old: old.__setitem__(slice(None), np.array(order)))
    write_parts(tmp_path / "map.gguf", kv, parts)
    if order.index((2, 0)) < order.index((2, 1)):
        model = container.validate(tmp_path / "map.gguf")
        kinds = ("F16", "Q4_0", "Q8_0")
        assert [model.type_of(0, "gate", e).name for e in range(4)] == [kinds[g] for g, _ in order]
    else:
        with pytest.raises(FormatError, match="ascending"):
            container.validate(tmp_path / "map.gguf")


@given(st.data())
@settings(PROPERTY, max_examples=400)
def test_flipped_bytes_never_crash(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(good.read_bytes())
    n_header = container.validate(good).header.data_offset
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, n_header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(whole)
    with suppress(FormatError):
        render_description(container.describe_model(container.MixedGguf.open(path)))


@given(st.floats(0, 1, exclude_max=True))
@PROPERTY
def test_truncated_files_are_refused(good: Path, tmp_path: Path, share: float) -> None:
    whole = good.read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FormatError, match=r"short\.gguf"):
        container.validate(tmp_path / "short.gguf")


def test_bytes_after_the_end_are_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / "long.gguf").write_bytes(good.read_bytes() + bytes(32))
    with pytest.raises(
        FormatError, match=r"tensor output_norm\.weight: the file has \d+ bytes; it must end at"
    ):
        container.validate(tmp_path / "long.gguf")


def test_a_plain_file_opens_but_is_not_ours(good: Path, tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint()
    write_random(tmp_path / "uniform.gguf", checkpoint, uniform(checkpoint.info, "Q4_0"))
    kv, parts = take_apart(tmp_path / "uniform.gguf")
    plain = {key: value for key, value in kv.items() if not key.startswith("mc_gguf.")}
    write_parts(tmp_path / "plain.gguf", plain, parts)
    model = container.MixedGguf.open(tmp_path / "plain.gguf")
    assert (model.is_ours, model.is_mixed, model.expert_bpw) == (False, False, 4.5)
    with pytest.raises(FormatError, match=r"key mc_gguf\.version is missing"):
        container.validate(tmp_path / "plain.gguf")


def test_whose_keys_they_are() -> None:
    assert container.has_own_keys(["general.name", "mc_gguf.routing.version"])
    assert not container.has_own_keys(["general.name", "mc_gguf", "llama.mc_gguf.version"])


def test_golden_bytes(tmp_path: Path) -> None:
    """The example of docs/reference/format.md, to the byte: a change here is a change of the format."""
    checkpoint = RandomCheckpoint(1, 2, n_embd=32, n_ff=32)
    experts = {p: [["Q8_0", "Q4_0"]] for p in PROJECTIONS}
    tensors = container.layout(checkpoint.info, experts, FixedTypes())
    header = container.encode_header(checkpoint, tensors, ONES, TWOS)
    assert len(header) == tensors[0].offset == GOLDEN_HEADER_BYTES
    assert hashlib.sha256(header).hexdigest() == GOLDEN_HEADER_SHA256
    assert container.total_bytes(tensors) == GOLDEN_FILE_BYTES


GOLDEN_HEADER_BYTES = 2272
GOLDEN_HEADER_SHA256 = "cab922cff8d4c6b00f61de0130048e272da9af09a931f2b2e0eddc8f83625f54"
GOLDEN_FILE_BYTES = 12608
