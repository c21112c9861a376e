"""Calibration against transformers and brute force; resuming, interruption, unrouted experts."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import NOMINAL_TYPES, PROJECTIONS, Calibration
from mc_gguf.calibrate import calibrator
from mc_gguf.calibrate.calibrator import calibrate_checkpoint, calibrate_to_file, state_bytes
from mc_gguf.calibrate.expert_errors import nominal_errors
from mc_gguf.calibrate.layer import LayerMeasurement
from mc_gguf.calibrate.matrices import Matrix
from mc_gguf.calibrate.options import CalibrationOptions, measured_types
from mc_gguf.capture import capture as captures
from mc_gguf.capture import observer as observers
from mc_gguf.capture.function import ExpertFunction, UnknownFunctionError
from mc_gguf.capture.price import Change
from mc_gguf.common.errors import McError, SourceError
from mc_gguf.common.files import workdir_path
from mc_gguf.common.workdir import Workdir
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import CANDIDATES, FALLBACKS
from mc_gguf.source.text import Corpus
from tests.support import ROOT
from tests.support.block_reference import BlockReference, block_references
from tests.support.small_models import MemoryCheckpoint, random_mixtral
from tests.support.synthetic_calibration import model_info

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]

TYPES = ("IQ4_NL", "Q5_0", "Q8_0")
OPTIONS = CalibrationOptions(types=TYPES, sensitivity_tokens=64, matrix_tokens=32, threads=1)


def corpus(n_rows: int = 6, ctx: int = 32, n_vocab: int = 96) -> Corpus:
    rows = np.random.default_rng(7).integers(0, n_vocab, (n_rows, ctx)).astype(np.int32)
    return Corpus(rows, ("random",), "0" * 64, n_rows * ctx, 0)


def in_batches(patch: pytest.MonkeyPatch) -> None:
    """The text is evaluated in three batches, and what the first have given is kept."""
    patch.setattr(calibrator, "rows_at_once", lambda *_: 2)
    patch.setattr(captures, "SAVE_EVERY", 1)


@pytest.fixture(autouse=True)
def _in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    in_batches(monkeypatch)


@cache
def model() -> Any:
    return random_mixtral()


def source() -> MemoryCheckpoint:
    """In float32: what the runtime computes differs from transformers by the 16 bits of its KV cache."""
    return MemoryCheckpoint(model(), "F32")


@cache
def expected() -> Calibration:
    return calibrate_checkpoint(source(), corpus(), OPTIONS, quiet=True)


@cache
def references() -> list[BlockReference]:
    return block_references(model(), corpus().rows)


@pytest.mark.parametrize("layer", [0, 1])
def test_statistics_are_those_of_transformers(layer: int) -> None:
    calibration, reference = expected(), references()[layer]
    probs, weights = reference.probs, reference.weights
    outputs = reference.outputs()
    for e in range(5):
        index, ranks = reference.tokens_of(e)
        hidden, _ = reference.output(reference.matrices(e), index)
        assert calibration.frequency[layer, e] == len(index)
        assert calibration.routing_weight[layer, e] == pytest.approx(
            float(probs[index, ranks].sum()), rel=2e-3
        )
        into = reference.x[index].square().mean(0).numpy()
        assert calibration.imatrix_in[layer, e] == pytest.approx(into, rel=5e-3)
        middle = hidden.square().mean(0).numpy()
        assert calibration.imatrix_mid[layer, e] == pytest.approx(middle, rel=2e-2)
        own = outputs[index, ranks]
        squares = float((own * weights[index, ranks][:, None]).square().sum())
        assert calibration.output_sq[layer, e] == pytest.approx(squares, rel=5e-3)
        assert calibration.down_max[layer, e] == pytest.approx(float(own.abs().max()), rel=1e-2)
    for rank in (1, 2):
        ratios = np.quantile((probs[:, rank] / probs[:, 0]).numpy(), [0, 0.25, 0.5, 1])
        found = calibration.ratio_quantiles[layer, rank - 1, [0, 250, 500, 1000]]
        assert found == pytest.approx(ratios, rel=2e-2, abs=1e-4)
    cosines = torch.cosine_similarity(reference.before, reference.after, dim=1)
    assert calibration.block_score[layer] == pytest.approx(1 - float(cosines.mean()), rel=5e-3)
    assert calibration.hidden_max[layer] == pytest.approx(float(reference.after.abs().max()), rel=5e-3)


def quantized(weights: torch.Tensor, kind: str, imatrix: NDArray[np.float32] | None) -> torch.Tensor:
    data = quantize_rows(np.ascontiguousarray(weights.numpy()), kind, imatrix, 1)
    return torch.from_numpy(dequantize_rows(data, kind, weights.shape[1], weights.shape[0]))


@pytest.mark.parametrize(
    ("layer", "expert", "projection", "kind"), [(0, 1, "gate", 0), (1, 4, "up", 2), (1, 0, "down", 1)]
)
def test_errors_are_those_of_the_whole_block(layer: int, expert: int, projection: str, kind: int) -> None:
    """With one matrix replaced by its dequantized self."""
    calibration, reference = expected(), references()[layer]
    index, ranks = reference.tokens_of(expert)
    matrices = reference.matrices(expert)
    imatrix = calibration.imatrix(layer, projection, expert)
    changed = matrices | {projection: quantized(matrices[projection], TYPES[kind], imatrix)}
    change = reference.output(changed, index)[1] - reference.output(matrices, index)[1]
    each = (change * reference.weights[index, ranks][:, None]).double().square().sum(1)
    at = (layer, expert, PROJECTIONS.index(projection), kind)
    assert calibration.sq_error[at] == pytest.approx(float(each.sum()), rel=2e-2)
    relative = float((each / reference.after[index].double().square().sum(1)).sum())
    assert calibration.relative_error[at] == pytest.approx(relative, rel=2e-2)
    weights = (changed[projection] - matrices[projection]).double().square().sum()
    assert calibration.weight_error[at] == pytest.approx(float(weights), rel=1e-3)


def test_sampling_tokens_scales_to_all_of_them() -> None:
    sampled = calibrate_checkpoint(source(), corpus(), replace(OPTIONS, max_tokens=40), quiet=True)
    exact = expected()
    assert (sampled.output_sq == exact.output_sq).all()
    assert sampled.sq_error.sum() == pytest.approx(exact.sq_error.sum(), rel=0.1)
    assert sampled.relative_error.sum() == pytest.approx(exact.relative_error.sum(), rel=0.1)
    assert (sampled.sq_error != exact.sq_error).any()


def test_weights_of_16_bits_give_nearly_the_same() -> None:
    """The runtime rounds the other factors of their products."""
    found = calibrate_checkpoint(MemoryCheckpoint(model()), corpus(), OPTIONS, quiet=True)
    exact = expected()
    assert np.abs(found.frequency - exact.frequency).max() <= 2  # a token on the edge
    for name, tolerance in (("imatrix_in", 0.1), ("output_sq", 0.05), ("sq_error", 0.05)):
        a, b = found.statistics[name], exact.statistics[name]
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b), name
    for name in ("routing_sensitivity", "kld_per_error", "matrix_price"):
        np.testing.assert_allclose(found.statistics[name], exact.statistics[name], rtol=0.2, err_msg=name)


def test_the_result_does_not_depend_on_threads() -> None:
    found = calibrate_checkpoint(source(), corpus(), replace(OPTIONS, threads=2), quiet=True)
    for name, array in expected().statistics.items():
        np.testing.assert_allclose(array, found.statistics[name], rtol=1e-5, err_msg=name)


def test_the_file_carries_model_types_and_text(tmp_path: Path) -> None:
    checkpoint, output = source(), tmp_path / "calib.safetensors"
    calibrate_to_file(checkpoint, corpus(), output, OPTIONS, quiet=True)
    loaded = Calibration.load(output)
    assert_equal(loaded, expected())
    assert (loaded.model, loaded.types, loaded.layers) == (checkpoint.info, TYPES, (0, 1))
    assert loaded.matrices == tuple(
        f"blk.{layer}.attn_{x}.weight" for layer in (0, 1) for x in ("q", "k", "v", "output")
    )
    assert loaded.matrix_types == ("IQ4_NL", "Q8_0")
    assert loaded.corpus["rows"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["calib.safetensors"]


def assert_equal(one: Calibration, other: Calibration) -> None:
    assert set(one.statistics) == set(other.statistics) == {line.name for line in Calibration.table()}
    for name, array in one.statistics.items():
        np.testing.assert_array_equal(array, other.statistics[name], err_msg=name)


def test_what_was_evaluated_is_handed_over(tmp_path: Path) -> None:
    seen = list[str]()

    def look(calibration: Calibration, folder: Path) -> None:
        assert calibration.fingerprint
        seen.extend(path.name for path in folder.iterdir())

    calibrate_to_file(source(), corpus(), tmp_path / "calib", OPTIONS, quiet=True, hand_over=look)
    assert {"model.gguf", "spool"} <= set(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["calib"]


class Killed(Exception):
    """In place of a signal."""


# Where a run is interrupted, and how many experts' matrices are read when it goes on; every layer's experts
# are read once for the few tokens that verify their function, and once more when they are measured.
PLACES = {
    "copy": 60,
    "capture": 60,
    "first layer": 60,
    "second layer": 30,
    "matrices": 0,
    "divergences": 0,
    "changes": 0,
}


def fail_at(patch: pytest.MonkeyPatch, place: str, error: type[BaseException]) -> None:
    """From now on a calibration is interrupted once it has reached the place."""

    def before(owner: Any, name: str, is_there: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if is_there(*arguments):
                raise error
            return original(*arguments, **named)

        patch.setattr(owner, name, wrapped)

    if place == "copy":
        before(MemoryCheckpoint, "raw", lambda _self, name, *_: name.startswith("blk.1.ffn_up"))
    elif place == "capture":
        before(captures._Writer, "block_output", lambda self, block, *_: (self.first, block.layer) == (64, 1))
    elif place.endswith("layer"):
        layer = int(place == "second layer")
        before(LayerMeasurement, "_expert", lambda self, n, *_: (self.layer, n) == (layer, 2))
    elif place == "matrices":
        before(Matrix, "measure", lambda self, *_: self.name == "blk.1.attn_v.weight")
    else:
        name = {"divergences": "divergences", "changes": "relative_changes"}[place]
        before(calibrator, name, lambda *_: True)


def interrupt(
    monkeypatch: pytest.MonkeyPatch, place: str, output: Path, error: type[BaseException] = Killed
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, place, error)
        with pytest.raises(error):
            calibrate_to_file(source(), corpus(), output, OPTIONS, quiet=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_run_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    output = tmp_path / "calib.safetensors"
    interrupt(monkeypatch, place, output, error)
    partial = workdir_path(output)
    assert [*tmp_path.iterdir()] in ([], [partial])
    checkpoint = source()
    assert_equal(calibrate_to_file(checkpoint, corpus(), output, OPTIONS, quiet=True), expected())
    assert checkpoint.n_reads <= PLACES[place]
    assert list(tmp_path.iterdir()) == [output]


KILLED = """
from tests.calibrate.test_calibrator import *

place = sys.argv[2]
with pytest.MonkeyPatch.context() as patch:
    class Kill(Exception):
        def __init__(self):
            os.kill(os.getpid(), signal.SIGKILL)

    in_batches(patch)
    fail_at(patch, place, Kill)
    calibrate_to_file(source(), corpus(), Path(sys.argv[1]), OPTIONS, quiet=True)
"""


@pytest.mark.parametrize("place", ["capture", "second layer", "divergences"])
def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, place: str) -> None:
    output = tmp_path / "calib.safetensors"
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, output, place],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.iterdir()) == [workdir_path(output)]
    checkpoint = source()
    assert_equal(calibrate_to_file(checkpoint, corpus(), output, OPTIONS, quiet=True), expected())
    assert checkpoint.n_reads <= PLACES[place]
    assert list(tmp_path.iterdir()) == [output]


def test_a_kill_between_two_files_loses_at_most_one_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state as it is when the changes of the second layer are the last thing that was written."""
    output, seen = tmp_path / "calib.safetensors", tmp_path / "seen"
    partial, original = workdir_path(output), Path.replace

    def watching(self: Path, target: Any) -> Path:
        found = original(self, target)
        if Path(target) == partial / "change-1.npy":
            shutil.copytree(partial, seen)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", watching)
        calibrate_to_file(source(), corpus(), output, OPTIONS, quiet=True)
    output.unlink()
    seen.rename(partial)
    checkpoint = source()
    assert_equal(calibrate_to_file(checkpoint, corpus(), output, OPTIONS, quiet=True), expected())
    assert checkpoint.n_reads == PLACES["second layer"]


@pytest.mark.parametrize("change", ["seed", "sensitivity", "matrices", "text", "no resume"])
def test_a_state_of_something_else_is_not_continued(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, options = tmp_path / "calib.safetensors", OPTIONS
    interrupt(monkeypatch, "second layer", output)
    text = replace(corpus(), sha256="1" * 64) if change == "text" else corpus()
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "sensitivity": {"sensitivity_tokens": 32},
        "matrices": {"matrix_tokens": 16},
    }
    options = replace(options, **changes.get(change, {}))
    checkpoint = source()
    with caplog.at_level(logging.WARNING):
        calibrate_to_file(checkpoint, text, output, options, resume=change != "no resume", quiet=True)
    assert checkpoint.n_reads == PLACES["first layer"]
    assert ("starting anew" in caplog.text) == (change != "no resume")
    assert ("made with another seed" in caplog.text) == (change == "seed")


@pytest.mark.parametrize(
    ("name", "n_reads"),
    [
        ("change-0.npy", 60),
        ("change-1.npy", 60),
        ("stats.safetensors", 60),
        ("spool/sums.safetensors", 0),
        ("matrices.json", 0),
        ("divergences.json", 0),
    ],
)
def test_a_damaged_state_is_made_anew_as_far_as_need_be(
    tmp_path: Path, name: str, n_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "calib.safetensors"
    interrupt(monkeypatch, "changes", output)
    path = workdir_path(output) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoint = source()
    assert_equal(calibrate_to_file(checkpoint, corpus(), output, OPTIONS, quiet=True), expected())
    assert checkpoint.n_reads == n_reads


def test_the_disk_is_measured_and_the_lock_taken_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = source(), tmp_path / "new" / "calib"
    with Workdir(output, {}), pytest.raises(McError, match=r"another process .* is writing .*calib"):
        calibrate_to_file(checkpoint, corpus(), output, OPTIONS, quiet=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(McError, match="has 1000 B free, but the work on calib takes"):
        calibrate_to_file(checkpoint, corpus(), output, OPTIONS, quiet=True)
    assert checkpoint.n_reads == 0
    assert not list(tmp_path.iterdir())


def test_the_state_takes_no_more_than_was_asked_of_the_disk(tmp_path: Path) -> None:
    """All of it is there when the calibration is handed over; sums and statistics are small."""
    output, largest = tmp_path / "calib", [0]
    small = ("sums.safetensors", "stats.safetensors", "result.safetensors")

    def measure(_calibration: Calibration, folder: Path) -> None:
        paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in small]
        largest.append(sum(path.stat().st_size for path in paths))

    calibrate_to_file(source(), corpus(), output, OPTIONS, quiet=True, hand_over=measure)
    promised = state_bytes(source(), corpus().rows, OPTIONS)
    assert 0.7 * promised < largest[-1] <= promised + 10_000


class Unrouted(MemoryCheckpoint):
    """Seven experts, top-3; the router's rows are w, -w, v, -v, u, -u and 0, so that the last is never
    chosen.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, "F32")
        for name, values in self._tensors.items():
            if name.endswith("ffn_gate_inp.weight"):
                values[1:6:2], values[6] = -values[0:6:2], 0


def test_an_unrouted_expert_counts_as_if_one_token_had_come(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Unrouted(random_mixtral(num_local_experts=7))
    with caplog.at_level(logging.WARNING):
        calibration = calibrate_checkpoint(checkpoint, corpus(), OPTIONS, quiet=True)
    assert (calibration.frequency[:, 6] == 0).all()
    assert (calibration.imatrix_in[:, 6] == 0).all()
    assert (calibration.output_sq[:, 6] == 0).all()
    per_token = calibration.sq_error[:, :6] / calibration.frequency[:, :6, None, None]
    assert (calibration.sq_error[:, 6] > 0).all()
    assert (calibration.sq_error[:, 6] < 3 * per_token.max(axis=1)).all()
    assert "2 of them none (layer/expert" in caplog.text


def test_an_unknown_operation_is_named_and_importance_matrices_take_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_node: Any) -> Any:
        raise UnknownFunctionError("WIN_PART")

    monkeypatch.setattr(observers, "function_of", unknown)
    with caplog.at_level(logging.WARNING):
        found = calibrate_checkpoint(source(), corpus(), OPTIONS, quiet=True)
    for layer in (0, 1):
        assert (
            f"layer {layer}: what its experts compute is not recognised (the operation WIN_PART"
            in caplog.text
        )
    exact = expected()
    for name in (
        "frequency",
        "imatrix_in",
        "imatrix_mid",
        "output_sq",
        "routing_sensitivity",
        "matrix_error",
    ):
        np.testing.assert_allclose(found.statistics[name], exact.statistics[name], rtol=1e-5, err_msg=name)
    for name in ("sq_error", "relative_error", "kld_per_error"):
        ratio = found.statistics[name] / exact.statistics[name]
        assert 0.3 < ratio.min() <= ratio.max() < 3, name
    assert (found.hessian_trace == 0).all()


def test_a_wrong_function_is_detected(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's operation taken for another one."""
    wrong = ["GLU.GEGLU", ["product", "gate"], ["product", "up"]]
    monkeypatch.setattr(observers, "function_of", lambda _node: wrong)
    with caplog.at_level(logging.WARNING):
        found = calibrate_checkpoint(source(), corpus(), OPTIONS, quiet=True)
    assert ExpertFunction(wrong).text == "geglu(gate, up)"
    assert "(geglu(gate, up) differs from what the runtime computes by 0." in caplog.text
    assert (found.hessian_trace == 0).all()


def test_the_measured_types_depend_on_the_row_length() -> None:
    info = MemoryCheckpoint(random_mixtral()).info
    assert measured_types(info, None) == FALLBACKS
    assert measured_types(model_info(n_embd=256, n_ff=512), None) == CANDIDATES
    mixed = measured_types(model_info(n_embd=256, n_ff=96), None)
    assert set(mixed) == {*CANDIDATES, *FALLBACKS}
    assert measured_types(info, ["q8_0", "Q4_K", "F16"]) == ("Q8_0", "F16")
    with pytest.raises(McError, match="none of the types Q4_K fits rows of 64 weights"):
        measured_types(info, ["Q4_K"])
    with pytest.raises(McError, match="unknown ggml type"):
        measured_types(info, ["Q9"])


def test_nominal_errors_take_the_nearest_larger_type() -> None:
    errors = np.arange(1, 4, dtype=np.float64).reshape(1, 1, 1, 3).repeat(3, axis=2) ** 2 / 3
    assert np.allclose(nominal_errors(errors, NOMINAL_TYPES), [[[1, 2, 3]]])
    assert np.allclose(nominal_errors(errors, ("IQ1_M", "IQ2_S", "Q8_0")), [[[1, 2, 3]]])
    assert np.allclose(nominal_errors(errors, ("IQ1_S", "IQ1_M", "IQ2_XXS")), [[[1, 3, 3]]])
    errors[0, 0, 2, 0] = np.inf
    assert np.allclose(nominal_errors(errors, NOMINAL_TYPES) ** 2, [[[2 / 3 + 4 / 3, 4, 9]]])


class Changed(MemoryCheckpoint):
    """A tensor multiplied by a number."""

    def __init__(self, name: str, factor: float) -> None:
        super().__init__(model(), "F32")
        self._tensors[name] = self._tensors[name] * np.float32(factor)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SourceError, match=r"layer 1, .* reach nan"):
        calibrate_checkpoint(Changed("blk.1.attn_output.weight", np.nan), corpus(), OPTIONS, quiet=True)


def test_tensors_of_zeros_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    calibrate_checkpoint(Changed("output.weight", 0), corpus(), OPTIONS, quiet=True)
    assert "1 tensors are nothing but zeros (output.weight): was the download interrupted?" in caplog.text


def test_damage_outside_the_experts_is_found_first() -> None:
    class Damaged(MemoryCheckpoint):
        def tensor(self, name: str) -> NDArray[np.float32]:
            if name == "output.weight":
                raise SourceError("output.weight: nan")
            return super().tensor(name)

    checkpoint = Damaged(model(), "F32")
    with pytest.raises(SourceError, match=r"output\.weight: nan"):
        calibrate_checkpoint(checkpoint, corpus(), OPTIONS, quiet=True)
    assert checkpoint.n_reads == 0


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    text = corpus(n_vocab=97)
    text.rows[0, 0] = 96
    with pytest.raises(SourceError, match="outside the model's vocabulary of 96"):
        calibrate_checkpoint(source(), text, OPTIONS, quiet=True)


def test_experts_are_read_twice_and_other_matrices_a_few_times() -> None:
    """However many layers there are."""
    checkpoint = MemoryCheckpoint(random_mixtral(num_hidden_layers=4), "F32")
    calibrate_checkpoint(checkpoint, corpus(2), OPTIONS, quiet=True)
    assert checkpoint.n_reads == 4 * 5 * 3 * 2


def test_changes_are_made_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all layers together can be larger than the memory."""
    seen = list[Change]()

    def watch(name: str) -> None:
        original = getattr(calibrator, name)

        def watched(path: Path, rows: Any, changes: list[Change], *arguments: Any) -> Any:
            seen.extend(changes)
            return original(path, rows, changes, *arguments)

        monkeypatch.setattr(calibrator, name, watched)

    watch("divergences")
    watch("relative_changes")
    found = calibrate_checkpoint(source(), corpus(2), OPTIONS, quiet=True)
    assert [change.target for change in seen] == ["blk.0", "blk.0", "blk.1", "blk.1", *found.matrices]
