"""Quantizing: ggml's kernels on arrays, and plans carried out into files."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mc_gguf import container
from mc_gguf.artifacts import NO_CALIBRATION, PROJECTIONS, FixedTypes, expert_tensor_name
from mc_gguf.artifacts.matching import find_calibration
from mc_gguf.common.errors import ArtifactError, McError, SourceError
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import CANDIDATES, TYPES
from mc_gguf.quantize.writer import write_model
from mc_gguf.routing import default_metadata
from mc_gguf.routing.metadata import routing_metadata_from
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.runtime.packages import load_gguf
from mc_gguf.source import open_checkpoint
from tests.support import TINY
from tests.support.gguf_models import (
    ONES,
    Part,
    RandomCheckpoint,
    make_calibration,
    make_plan,
    mixed,
    quantized_gguf,
    take_apart,
    uniform,
    write_parts,
)
from tests.support.synthetic_calibration import MERGED, NO_GATE
from tools.common import RELATIVE_ERROR

pytestmark = pytest.mark.native

FAST = ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS")
# A quantizer that lost its scale is far off.
RATES = {name: RELATIVE_ERROR[name] for name in (*FAST, "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")}
RATES |= {name: RELATIVE_ERROR[name] for name in ("IQ3_XXS", "IQ3_S", "Q5_K", "Q6_K", "Q8_0")}
RATES |= {"F16": 5e-8, "BF16": 3e-6}


def gaussian(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)


# --- kernels
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATES)
def test_error_of_each_type(name: str) -> None:
    weights = gaussian(16, 512)
    data = quantize_rows(weights, name, np.ones(512, dtype=np.float32), threads=2)
    assert data.shape == (16, TYPES[name].row_bytes(512))
    back = dequantize_rows(data, name, cols=512, rows=16)
    assert float(((back - weights) ** 2).sum() / (weights**2).sum()) == pytest.approx(RATES[name], rel=0.25)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "Q2_K", "IQ2_XS", "IQ4_NL"])
def test_dequantize_as_gguf_py(name: str) -> None:
    """gguf-py has its own dequantizers, in numpy."""
    gguf = load_gguf()
    data = quantize_rows(gaussian(8, 256), name, np.ones(256, dtype=np.float32), threads=1)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(8, 256)
    np.testing.assert_array_equal(dequantize_rows(data, name, 256, 8), expected)


@pytest.mark.parametrize("name", ["Q2_K", "IQ1_S", "Q8_0", "F32"])
def test_bytes_do_not_depend_on_threads(name: str) -> None:
    weights, imatrix = gaussian(37, 256), gaussian(1, 256)[0] ** 2
    one = quantize_rows(weights, name, imatrix, threads=1)
    for threads in (2, 3, 64):
        np.testing.assert_array_equal(quantize_rows(weights, name, imatrix, threads), one)


def test_the_importance_matrix_matters() -> None:
    weights, imatrix = gaussian(64, 256), np.full(256, 1e-3, dtype=np.float32)
    imatrix[:32] = 1
    flat = dequantize_rows(quantize_rows(weights, "Q2_K", None, 1), "Q2_K", 256, 64)
    led = dequantize_rows(quantize_rows(weights, "Q2_K", imatrix, 1), "Q2_K", 256, 64)
    flat_error, led_error = (((w - weights)[:, :32] ** 2).sum() for w in (flat, led))
    assert led_error < 0.95 * flat_error


def test_an_empty_importance_matrix_counts_as_ones() -> None:
    weights = gaussian(4, 256)
    zeros, ones = np.zeros(256, dtype=np.float32), np.ones(256, dtype=np.float32)
    np.testing.assert_array_equal(
        quantize_rows(weights, "IQ1_S", zeros, 1), quantize_rows(weights, "IQ1_S", ones, 1)
    )


@pytest.mark.parametrize(
    ("cols", "name", "imatrix", "message"),
    [
        (256, "IQ1_S", None, "IQ1_S needs an importance matrix"),
        (256, "Q2_K", np.ones(255, dtype=np.float32), r"shape \(255,\), the rows have 256"),
        (256, "Q2_K", np.full(256, np.nan, dtype=np.float32), "negative or non-finite"),
        (256, "Q2_K", -np.ones(256, dtype=np.float32), "negative or non-finite"),
        (128, "Q2_K", None, "multiple of 256, not 128"),
        (256, "Q2_X", None, "unknown ggml type 'Q2_X'"),
    ],
)
def test_what_ggml_would_abort_on_is_refused(
    cols: int, name: str, imatrix: np.ndarray | None, message: str
) -> None:
    with pytest.raises(McError, match=message):
        quantize_rows(gaussian(2, cols), name, imatrix, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "larger than Q8_0 can take")],
)
def test_weights_that_do_not_fit(value: float, message: str) -> None:
    weights = gaussian(8, 256)
    weights[5, 7] = value
    with pytest.raises(McError, match=f"row 5 .* {message}"):
        quantize_rows(weights, "Q8_0", None, 2)


def test_dequantize_checks_the_size() -> None:
    with pytest.raises(McError, match="2 x 256 weights of Q2_K do not take 84 bytes"):
        dequantize_rows(np.zeros(84, dtype=np.uint8), "Q2_K", 256, 2)


# --- plans
# ----------------------------------------------------------------------------------------------------------


def test_every_expert_is_its_own_quantization(wide: RandomCheckpoint, tmp_path: Path) -> None:
    calibration = make_calibration(wide.info, tmp_path / "c.safetensors")
    experts = mixed(wide, CANDIDATES)
    plan = make_plan(wide.info, experts, tmp_path / "plan.json", calibration.fingerprint)
    model = write_model(wide, calibration, plan, tmp_path / "m.gguf", threads=2)
    size = container.file_bytes(wide.info, experts, FixedTypes(), routing_metadata_from(calibration))
    assert (tmp_path / "m.gguf").stat().st_size == size
    assert (model.plan_fingerprint, model.calibration_fingerprint) == (
        plan.fingerprint,
        calibration.fingerprint,
    )
    for layer in range(2):
        for projection in PROJECTIONS:
            table = calibration.imatrix_mid if projection == "down" else calibration.imatrix_in
            for expert in range(5):
                weights = wide.expert(layer, projection, expert)
                expected = quantize_rows(weights, experts[projection][layer][expert], table[layer, expert], 1)
                np.testing.assert_array_equal(model.data(layer, projection, expert), expected)
    expected = quantize_rows(wide.tensor("blk.1.attn_k.weight"), "Q8_0", None, 1)
    np.testing.assert_array_equal(model.tensor_data("blk.1.attn_k.weight"), expected.reshape(-1))
    norm = model.tensor_data("output_norm.weight").view(np.float32)
    np.testing.assert_array_equal(norm, wide.tensor("output_norm.weight"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors", "m.gguf", "plan.json"]


def test_the_file_carries_the_calibration_s_routing(wide: RandomCheckpoint, tmp_path: Path) -> None:
    calibration = make_calibration(wide.info, tmp_path / "c.safetensors")
    plan = make_plan(wide.info, mixed(wide, FAST), tmp_path / "plan.json", calibration.fingerprint)
    found = write_model(wide, calibration, plan, tmp_path / "m.gguf", threads=2).routing
    expected = default_metadata(RoutingProfile.of(calibration))
    assert found is not None
    assert found.profile is not None
    assert (found.active, found.protect) == (expected.active, 0.02)
    np.testing.assert_array_equal(found.thresholds, expected.thresholds)
    np.testing.assert_array_equal(found.profile.ratio_quantiles, calibration.ratio_quantiles)
    np.testing.assert_array_equal(found.profile.sensitivity, calibration.routing_sensitivity)
    np.testing.assert_array_equal(found.profile.curve, calibration.routing_curve)
    assert (found.calibration, found.model) == (calibration.fingerprint, wide.info.fingerprint)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_sixteen_bit_plan_copies_bytes(tmp_path: Path, kind: str) -> None:
    checkpoint = RandomCheckpoint(1, 3, kind=kind)
    fixed = FixedTypes(kind, kind, kind, kind)
    plan = make_plan(checkpoint.info, uniform(checkpoint.info, kind), tmp_path / "p.json", fixed=fixed)
    model = write_model(checkpoint, None, plan, tmp_path / "m.gguf", threads=1)
    assert not model.is_mixed
    assert model.expert_bpw == 16
    for spec in checkpoint.info.tensors:
        parts = range(3) if "_exps" in spec.name else [None]
        expected = b"".join(checkpoint.raw(spec.name, e).tobytes() for e in parts)
        assert model.tensor_data(spec.name).tobytes() == expected


@pytest.mark.parametrize("kind", ["Q4_1", "MXFP4", "Q4_K"])
def test_a_quantized_source_keeps_its_own_types(tmp_path: Path, kind: str) -> None:
    """Matrices that have fewer bits already are copied, and experts of the planned type are, too."""
    quantized_gguf(tmp_path / "q.gguf", kind)
    source = open_checkpoint(tmp_path / "q.gguf")
    experts = mixed(source, ("Q4_K", "Q8_0"))
    plan = make_plan(source.info, experts, tmp_path / "p.json", NO_CALIBRATION)
    model = write_model(source, None, plan, tmp_path / "m.gguf", threads=1)
    types = {name: t.type.name for name, t in model.header.tensors.items()}
    for part in ("q", "k", "v", "output"):
        name = f"blk.1.attn_{part}.weight"
        assert types[name] == kind
        assert model.tensor_data(name).tobytes() == source.raw(name).tobytes()
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"
    for layer, projection, expert in itertools.product(range(2), PROJECTIONS, range(3)):
        wanted = experts[projection][layer][expert]
        assert model.type_of(layer, projection, expert).name == wanted
        if wanted == kind:
            expected = source.raw(expert_tensor_name(layer, projection), expert)
        else:
            expected = quantize_rows(source.expert(layer, projection, expert), wanted, None, 1).reshape(-1)
        assert model.data(layer, projection, expert).tobytes() == expected.tobytes()


def test_integers_that_are_no_weights_are_copied(tmp_path: Path) -> None:
    quantized_gguf(tmp_path / "q.gguf", "Q8_0")
    kv, parts = take_apart(tmp_path / "q.gguf")
    numbers = np.arange(8, dtype=np.int32)
    parts.append(Part("rope_freqs.index", (8,), 26, numbers.tobytes()))
    write_parts(tmp_path / "i.gguf", kv, parts)
    source = open_checkpoint(tmp_path / "i.gguf")
    np.testing.assert_array_equal(source.tensor("rope_freqs.index"), numbers.astype(np.float32))
    plan = make_plan(source.info, uniform(source.info, "Q8_0"), tmp_path / "p.json", NO_CALIBRATION)
    model = write_model(source, None, plan, tmp_path / "m.gguf", threads=1)
    assert model.header.tensors["rope_freqs.index"].type.name == "I32"
    assert model.tensor_data("rope_freqs.index").tobytes() == numbers.tobytes()


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
def test_experts_with_other_matrices(tmp_path: Path, projections: tuple[str, ...]) -> None:
    checkpoint = RandomCheckpoint(2, 5, n_embd=256, n_ff=256, projections=projections)
    calibration = make_calibration(checkpoint.info, tmp_path / "c.safetensors")
    experts = mixed(checkpoint, CANDIDATES)
    assert tuple(experts) == projections
    plan = make_plan(checkpoint.info, experts, tmp_path / "plan.json", calibration.fingerprint)
    model = write_model(checkpoint, calibration, plan, tmp_path / "m.gguf", threads=2)
    for layer, projection, expert in itertools.product(range(2), projections, range(5)):
        weights = checkpoint.expert(layer, projection, expert)
        assert weights.shape == ((512 if projection == "gate_up" else 256), 256)
        imatrix = (calibration.imatrix_mid if projection == "down" else calibration.imatrix_in)[layer, expert]
        expected = quantize_rows(weights, experts[projection][layer][expert], imatrix, 1)
        np.testing.assert_array_equal(model.data(layer, projection, expert), expected)


def test_other_matrices_have_the_types_and_importance_that_were_measured(
    wide: RandomCheckpoint, tmp_path: Path
) -> None:
    names = ("blk.0.attn_q.weight", "blk.1.attn_output.weight")
    calibration = make_calibration(wide.info, tmp_path / "c.safetensors")
    imatrix = np.random.default_rng(1).random(512, dtype=np.float32) + 0.01
    statistics = {**calibration.statistics, "matrix_in": imatrix}
    calibration = replace(calibration, matrices=names, statistics=statistics).save(tmp_path / "c.safetensors")
    fixed = FixedTypes(others={names[0]: "IQ3_XXS", names[1]: "Q4_K"})
    types = uniform(wide.info, "Q4_0")
    plan = make_plan(wide.info, types, tmp_path / "p.json", calibration.fingerprint, fixed)
    model = write_model(wide, calibration, plan, tmp_path / "m.gguf", threads=1)
    for name, row in zip(names, (imatrix[:256], imatrix[256:]), strict=True):
        assert model.header.tensors[name].type.name == fixed.others[name]
        expected = quantize_rows(wide.tensor(name), fixed.others[name], row, 1)
        np.testing.assert_array_equal(model.tensor_data(name), expected.reshape(-1))
    assert model.header.tensors["blk.0.attn_k.weight"].type.name == "Q8_0"
    fixed = FixedTypes(others={"blk.1.attn_q.weight": "IQ3_XXS"})
    plan = make_plan(wide.info, types, tmp_path / "p.json", calibration.fingerprint, fixed)
    with pytest.raises(McError, match=r"blk\.1\.attn_q\.weight cannot be IQ3_XXS, which needs an importance"):
        write_model(wide, calibration, plan, tmp_path / "m.gguf", threads=1)


def test_unused_experts_are_named_once(
    wide: RandomCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = make_calibration(wide.info, tmp_path / "c.safetensors", unused=[(0, 2), (1, 4)])
    plan = make_plan(wide.info, uniform(wide.info, "Q2_K"), tmp_path / "p.json", calibration.fingerprint)
    with caplog.at_level(logging.WARNING):
        model = write_model(wide, calibration, plan, tmp_path / "m.gguf", threads=1)
    assert len(caplog.records) == 1
    assert "2 experts are quantized without an importance matrix, because no token" in caplog.text
    assert "layer 0 expert 2, layer 1 expert 4" in caplog.text
    ones = np.ones(256, dtype=np.float32)
    expected = quantize_rows(wide.expert(0, "gate", 2), "Q2_K", ones, 1)
    np.testing.assert_array_equal(model.data(0, "gate", 2), expected)


def test_published_statistics_give_types_without_importance(wide: RandomCheckpoint, tmp_path: Path) -> None:
    plan = make_plan(wide.info, mixed(wide, FAST), tmp_path / "p.json", model_fingerprint="")
    assert find_calibration(plan, tmp_path) is None
    model = write_model(wide, None, plan, tmp_path / "m.gguf", threads=1)
    assert model.calibration_fingerprint == ONES
    needy = make_plan(wide.info, uniform(wide.info, "IQ2_XS"), tmp_path / "q.json", model_fingerprint="")
    with pytest.raises(ArtifactError, match=r"ffn_gate_exps\.weight is to be IQ2_XS, .*needs a calibration"):
        write_model(wide, None, needy, tmp_path / "n.gguf", threads=1)
    calibration = make_calibration(wide.info, tmp_path / "c.safetensors")
    model = write_model(wide, calibration, needy, tmp_path / "n.gguf", threads=2)
    assert model.calibration_fingerprint == calibration.fingerprint


def test_a_plan_that_needs_no_calibration(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(1, 3)
    plan = make_plan(checkpoint.info, uniform(checkpoint.info, "BF16"), tmp_path / "p.json", NO_CALIBRATION)
    assert find_calibration(plan, tmp_path) is None
    empty = replace(make_calibration(checkpoint.info, tmp_path / "c.safetensors"), fingerprint=NO_CALIBRATION)
    model = write_model(checkpoint, empty, plan, tmp_path / "m.gguf", threads=1)
    assert model.calibration_fingerprint == NO_CALIBRATION
    assert not [key for key in model.header.kv if key.startswith("mc_gguf.routing.")]


def test_files_that_do_not_belong_together(wide: RandomCheckpoint, tmp_path: Path) -> None:
    other = RandomCheckpoint(2, 5, n_embd=256, n_ff=512)
    mine = make_calibration(wide.info, tmp_path / "mine.safetensors")
    types = uniform(wide.info, "Q2_K")
    plan = make_plan(wide.info, types, tmp_path / "p.json", mine.fingerprint)
    output = tmp_path / "m.gguf"
    with pytest.raises(ArtifactError, match="the plan was made for another model"):
        write_model(other, mine, plan, output, 1)
    with pytest.raises(ArtifactError, match="the calibration was made with another model"):
        write_model(wide, make_calibration(other.info, tmp_path / "other.safetensors"), plan, output, 1)
    with pytest.raises(ArtifactError, match="the plan was made from another calibration"):
        write_model(wide, mine, make_plan(wide.info, types, tmp_path / "q.json", ONES), output, 1)
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors in .* is the plan's calibration"):
        find_calibration(make_plan(wide.info, types, tmp_path / "q.json", ONES), tmp_path)
    short = RandomCheckpoint(1, 5, n_embd=256, n_ff=256)
    with pytest.raises(ArtifactError, match="the plan covers 2 layers, the model has experts in 1"):
        write_model(
            short, None, make_plan(wide.info, types, tmp_path / "q.json", model_fingerprint=""), output, 1
        )
    bad = make_plan(wide.info, types, tmp_path / "q.json", mine.fingerprint, FixedTypes(token_embd="IQ1_S"))
    with pytest.raises(McError, match=r"token_embd\.weight cannot be IQ1_S"):
        write_model(wide, mine, bad, output, 1)
    assert not output.exists()


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = RandomCheckpoint(1, 2)
    plan = make_plan(checkpoint.info, uniform(checkpoint.info, "Q4_0"), tmp_path / "p.json")
    monkeypatch.setattr(checkpoint, "expert", lambda *place: np.full((64, 32), np.nan, dtype=np.float32))
    with pytest.raises(SourceError, match=r"blk\.0\.ffn_gate_exps\.weight, expert 0: .* not finite"):
        write_model(checkpoint, None, plan, tmp_path / "m.gguf", threads=1)


def test_bundled_model_and_its_gguf_give_the_same_file(tmp_path: Path, tiny_gguf: Path) -> None:
    """The HF directory and the GGUF that llama.cpp's converter makes of it are the same source."""
    hf, gguf = open_checkpoint(TINY), open_checkpoint(tiny_gguf)
    outputs = []
    for name, source in (("hf", hf), ("gguf", gguf)):
        plan = make_plan(source.info, uniform(source.info, "Q2_K"), tmp_path / "p.json", model_fingerprint="")
        write_model(source, None, plan, tmp_path / f"{name}.gguf", threads=2)
        outputs.append((tmp_path / f"{name}.gguf").read_bytes())
    assert outputs[0] == outputs[1]


def test_same_bytes_as_llama_cpps_quantizer(tmp_path: Path, tiny_gguf: Path, runtime: object) -> None:
    """llama_model_quantize with the same importance matrices, every matrix in one type."""
    import ctypes

    from mc_gguf.runtime import use_in_llama_cpp

    source = open_checkpoint(tiny_gguf)
    calibration = make_calibration(source.info, tmp_path / "c.safetensors")
    plan = make_plan(source.info, uniform(source.info, "Q2_K"), tmp_path / "p.json", calibration.fingerprint)
    model = write_model(source, calibration, plan, tmp_path / "ours.gguf", threads=2)
    llama_cpp = use_in_llama_cpp()
    kind = llama_cpp.llama_model_imatrix_data
    tables = {
        expert_tensor_name(layer, p): np.ascontiguousarray(
            (calibration.imatrix_mid if p == "down" else calibration.imatrix_in)[layer]
        )
        for layer in range(6)
        for p in PROJECTIONS
    }
    floats = ctypes.POINTER(ctypes.c_float)
    entries = [kind(name.encode(), t.ctypes.data_as(floats), t.size) for name, t in tables.items()]
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = 2, 10, True  # LLAMA_FTYPE_MOSTLY_Q2_K
    params.imatrix = (kind * (len(entries) + 1))(*entries)
    target = tmp_path / "theirs.gguf"
    paths = str(tiny_gguf).encode(), str(target).encode()
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) == 0
    theirs = container.MixedGguf.open(target)
    for name in tables:
        np.testing.assert_array_equal(model.tensor_data(name), theirs.tensor_data(name))
