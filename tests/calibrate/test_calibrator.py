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
from mc_gguf.calibrate.calibrator import calibrate_checkpoint, calibrate_to_file
from mc_gguf.calibrate.expert_errors import nominal_errors
from mc_gguf.calibrate.options import CalibrationOptions, measured_types
from mc_gguf.calibrate.state import state_bytes
from mc_gguf.common.errors import McError, SourceError
from mc_gguf.common.files import workdir_path
from mc_gguf.common.workdir import Workdir
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import CANDIDATES, FALLBACKS
from mc_gguf.source.text import Corpus
from tests.support import ROOT
from tests.support.small_models import MemoryCheckpoint, random_mixtral

pytestmark = pytest.mark.native

TYPES = ("IQ4_NL", "Q5_0", "Q8_0")


def corpus(n_rows: int = 6, ctx: int = 32, n_vocab: int = 96) -> Corpus:
    rows = np.random.default_rng(7).integers(0, n_vocab, (n_rows, ctx)).astype(np.int32)
    return Corpus(rows, ("random",), "0" * 64, n_rows * ctx, 0)


@cache
def case() -> tuple[Any, Calibration]:
    model = random_mixtral()
    return model, calibrate_checkpoint(
        MemoryCheckpoint(model), corpus(), CalibrationOptions(types=TYPES, threads=2), quiet=True
    )


@cache
def block_inputs() -> list[torch.Tensor]:
    """What transformers feeds into the MoE block of every layer, [n_tokens, n_embd]."""
    seen: list[torch.Tensor] = []
    model, _ = case()
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).clone()))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(torch.from_numpy(corpus().rows).long())
    for handle in handles:
        handle.remove()
    return seen


def routed(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [n, E] and the chosen experts [n, K] of transformers' router."""
    with torch.inference_mode():
        probs = torch.softmax(block_inputs()[layer] @ case()[0].model.layers[layer].mlp.gate.weight.T, dim=-1)
    return probs, probs.topk(3).indices


@pytest.mark.parametrize("layer", [0, 1])
def test_statistics_are_those_of_transformers(layer: int) -> None:
    model, calibration = case()
    x, (probs, chosen), experts = block_inputs()[layer], routed(layer), model.model.layers[layer].mlp.experts
    with torch.inference_mode():
        for e in range(5):
            tokens = (chosen == e).any(1)
            gate, up = experts.gate_up_proj[e].chunk(2)
            h = torch.nn.functional.silu(x[tokens] @ gate.T) * (x[tokens] @ up.T)
            g = probs[tokens, e] / probs[tokens].gather(1, chosen[tokens]).sum(1)
            assert calibration.frequency[layer, e] == tokens.sum()
            assert calibration.routing_weight[layer, e] == pytest.approx(
                float(probs[tokens, e].sum()), rel=1e-4
            )
            assert calibration.imatrix_in[layer, e] == pytest.approx(
                x[tokens].square().mean(0).numpy(), rel=1e-3
            )
            assert calibration.imatrix_mid[layer, e] == pytest.approx(h.square().mean(0).numpy(), rel=1e-3)
            expected = float((h @ experts.down_proj[e].T * g[:, None]).square().sum())
            assert calibration.output_sq[layer, e] == pytest.approx(expected, rel=1e-3)
    top = probs.gather(1, chosen)
    for rank in (1, 2):
        expected_ratios = np.quantile((top[:, rank] / top[:, 0]).detach().numpy(), [0, 0.25, 0.5, 1])
        found = calibration.ratio_quantiles[layer, rank - 1, [0, 250, 500, 1000]]
        assert found == pytest.approx(expected_ratios, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("layer", "expert", "projection", "kind"), [(0, 1, "gate", 0), (1, 4, "up", 2), (1, 0, "down", 1)]
)
def test_errors_are_those_of_the_whole_block(layer: int, expert: int, projection: str, kind: int) -> None:
    """transformers' own block before and after one matrix is replaced by its dequantized self."""
    import copy

    model, calibration = case()
    block, x = copy.deepcopy(model.model.layers[layer].mlp), block_inputs()[layer][None]
    p = PROJECTIONS.index(projection)
    weights = {
        "gate": block.experts.gate_up_proj.data[expert, :96],
        "up": block.experts.gate_up_proj.data[expert, 96:],
        "down": block.experts.down_proj.data[expert],
    }[projection]
    imatrix = calibration.imatrix(layer, projection, expert)
    with torch.inference_mode():
        before = _tensor(block(x))
        data = quantize_rows(weights.float().numpy(), TYPES[kind], imatrix, 1)
        weights.copy_(
            torch.from_numpy(dequantize_rows(data, TYPES[kind], weights.shape[1], weights.shape[0]))
        )
        expected = float((_tensor(block(x)) - before).double().square().sum())
    assert calibration.sq_error[layer, expert, p, kind] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("part", ["q", "k", "v", "output"])
@pytest.mark.parametrize("layer", [0, 1])
def test_errors_of_attention_are_those_of_the_whole_block(layer: int, part: str) -> None:
    """transformers' own attention before and after one matrix is replaced by its dequantized self. Rows of Q
    and K are permuted in a GGUF, which changes nothing: each is rounded by itself.
    """
    import copy

    handles: list[Any] = []
    model, calibration = case()
    assert calibration.attention_types == ("IQ4_NL", "Q8_0")
    changed, seen = copy.deepcopy(model), dict[Any, tuple[torch.Tensor, torch.Tensor]]()
    for one in (model, changed):
        module = one.model.layers[layer].self_attn

        def hook(_: Any, arguments: Any, kwargs: Any, output: Any, key: Any = one) -> None:
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else arguments[0]
            seen[key] = inputs, _tensor(output)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    name = "o_proj" if part == "output" else f"{part}_proj"
    weight = getattr(changed.model.layers[layer].self_attn, name).weight.data
    states = list[torch.Tensor]()
    block = model.model.layers[layer]
    handles.append(block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])))
    imatrix = calibration.attention_imatrix(layer, part)
    data = quantize_rows(weight.numpy(), "IQ4_NL", imatrix, 1)
    weight.copy_(torch.from_numpy(dequantize_rows(data, "IQ4_NL", weight.shape[1], weight.shape[0])))
    with torch.inference_mode():
        for one in (model, changed):
            one(torch.from_numpy(corpus().rows).long())
    for handle in handles:
        handle.remove()
    inputs, before = seen[model]
    error = (seen[changed][1] - before).square().sum(-1).double()
    expected = (error / (states[0] + before).square().sum(-1).double()).mean()
    found = calibration.attention_error[layer, ["q", "k", "v", "output"].index(part), 0]
    assert found == pytest.approx(float(expected), rel=5e-3)
    if part != "output":
        assert imatrix == pytest.approx(inputs.square().mean((0, 1)).numpy(), rel=1e-3)


def _tensor(output: Any) -> torch.Tensor:
    return torch.as_tensor(output[0] if isinstance(output, tuple) else output)


def test_sampling_tokens_scales_to_all_of_them() -> None:
    model, exact = case()
    sampled = calibrate_checkpoint(
        MemoryCheckpoint(model),
        corpus(),
        CalibrationOptions(types=TYPES, max_tokens=40, threads=2),
        quiet=True,
    )
    assert (sampled.output_sq == exact.output_sq).all()
    assert sampled.sq_error.sum() == pytest.approx(exact.sq_error.sum(), rel=0.1)
    assert (sampled.sq_error != exact.sq_error).any()


def test_the_file_carries_model_types_and_text(tmp_path: Path) -> None:
    model, expected = case()
    checkpoint, output = MemoryCheckpoint(model), tmp_path / "calib.safetensors"
    calibrate_to_file(checkpoint, corpus(), output, CalibrationOptions(types=TYPES, threads=2), quiet=True)
    loaded = Calibration.load(output)
    assert_equal(loaded, expected)
    assert (loaded.model, loaded.types, loaded.layers) == (checkpoint.info, TYPES, (0, 1))
    assert loaded.corpus["rows"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["calib.safetensors"]


def assert_equal(one: Calibration, other: Calibration) -> None:
    assert set(one.statistics) == set(other.statistics) == {line.name for line in Calibration.table()}
    for name, array in one.statistics.items():
        np.testing.assert_array_equal(array, other.statistics[name], err_msg=name)


STATE_AFTER_ONE = [
    *(f"branches-1/{i}.npy" for i in range(3)),
    "hidden-1.npy",
    "identity.json",
    "lock",
    "stats.safetensors",
]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Interrupted(MemoryCheckpoint):
    """Raises KeyboardInterrupt when the second layer's experts are read."""

    def expert(self, layer: int, projection: str, expert: int) -> NDArray[np.float32]:
        if (layer, expert) == (1, 2):
            raise KeyboardInterrupt
        return super().expert(layer, projection, expert)


def test_interrupt_leaves_only_what_resume_needs(tmp_path: Path) -> None:
    model, expected = case()
    output, options = tmp_path / "calib.safetensors", CalibrationOptions(types=TYPES, threads=2)
    with pytest.raises(KeyboardInterrupt):
        calibrate_to_file(Interrupted(model), corpus(), output, options, quiet=True)
    partial = tmp_path / ".calib.safetensors.partial"
    assert list(tmp_path.iterdir()) == [partial]
    assert files(partial) == STATE_AFTER_ONE
    checkpoint = MemoryCheckpoint(model)
    assert_equal(calibrate_to_file(checkpoint, corpus(), output, options, quiet=True), expected)
    assert checkpoint.n_reads == 5 * 3  # the second layer only
    assert list(tmp_path.iterdir()) == [output]


def test_a_failure_in_the_first_layer_leaves_nothing(tmp_path: Path) -> None:
    class Failing(MemoryCheckpoint):
        def expert(self, layer: int, projection: str, expert: int) -> NDArray[np.float32]:
            raise SourceError("cannot be read")

    with pytest.raises(SourceError):
        calibrate_to_file(
            Failing(case()[0]),
            corpus(),
            tmp_path / "calib",
            CalibrationOptions(types=TYPES, threads=1),
            quiet=True,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("last", ["branches-2", "hidden-2.npy", "stats.safetensors"])
def test_a_kill_between_two_layers_loses_at_most_one(
    tmp_path: Path, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state as it is when `last` is the last thing of the second layer that was written."""
    model, expected = case()
    output, options = tmp_path / "calib.safetensors", CalibrationOptions(types=TYPES, threads=2)
    partial, seen = tmp_path / ".calib.safetensors.partial", tmp_path / "seen"

    def watched(function: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def watching(source: Any, target: Any) -> None:
            function(source, target)
            if Path(target) == partial / last and (partial / "branches-2").exists():
                shutil.copytree(partial, seen)

        return watching

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", watched(Path.replace))
        patch.setattr(Path, "rename", watched(Path.rename))
        calibrate_to_file(MemoryCheckpoint(model), corpus(), output, options, quiet=True)
    output.unlink()
    seen.rename(partial)
    assert {"branches-1/0.npy", "branches-2/4.npy", "hidden-1.npy"} <= set(files(partial))
    checkpoint = MemoryCheckpoint(model)
    assert_equal(calibrate_to_file(checkpoint, corpus(), output, options, quiet=True), expected)
    assert checkpoint.n_reads == (0 if last == "stats.safetensors" else 5 * 3)


KILLED = """
from tests.calibrate.test_calibrator import *

class Killed(MemoryCheckpoint):
    def expert(self, layer, projection, expert):
        if (layer, expert) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().expert(layer, projection, expert)

options = CalibrationOptions(types=TYPES, threads=2)
calibrate_to_file(Killed(random_mixtral()), corpus(), Path(sys.argv[1]), options, quiet=True)
"""


def test_killed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    model, expected = case()
    output = tmp_path / "calib.safetensors"
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, output],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    left = [f"working/{name}.npy" for name in ("0", "1", "2", "added-0", "added-1", "added-2")]
    assert files(tmp_path / ".calib.safetensors.partial") == STATE_AFTER_ONE + left
    checkpoint = MemoryCheckpoint(model)
    resumed = calibrate_to_file(
        checkpoint, corpus(), output, CalibrationOptions(types=TYPES, threads=2), quiet=True
    )
    assert checkpoint.n_reads == 5 * 3
    assert_equal(resumed, expected)


@pytest.mark.parametrize(
    "change", ["seed", "sensitivity", "text", "damage", "no branches", "cut branch", "no resume"]
)
def test_a_state_of_something_else_is_not_continued(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = case()
    output, options = tmp_path / "calib.safetensors", CalibrationOptions(types=TYPES, threads=2)
    with pytest.raises(KeyboardInterrupt):
        calibrate_to_file(Interrupted(model), corpus(), output, options, quiet=True)
    text = replace(corpus(), sha256="1" * 64) if change == "text" else corpus()
    if change == "seed":
        options = replace(options, seed=1)
    if change == "sensitivity":
        options = replace(options, sensitivity_tokens=64)
    if change == "no branches":
        (tmp_path / ".calib.safetensors.partial" / "branches-1" / "1.npy").unlink()
    if change in ("damage", "cut branch"):
        name = "hidden-1.npy" if change == "damage" else "branches-1/1.npy"
        path = tmp_path / ".calib.safetensors.partial" / name
        path.write_bytes(path.read_bytes()[:500])
    checkpoint = MemoryCheckpoint(model)
    with caplog.at_level(logging.WARNING):
        calibrate_to_file(checkpoint, text, output, options, resume=change != "no resume", quiet=True)
    assert checkpoint.n_reads == 2 * 5 * 3
    assert ("starting anew" in caplog.text) == (change != "no resume")
    assert ("made with another seed" in caplog.text) == (change == "seed")


def test_the_disk_is_measured_and_the_lock_taken_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = MemoryCheckpoint(case()[0]), tmp_path / "new" / "calib"
    options = CalibrationOptions(types=TYPES, threads=1)
    with Workdir(output, {}), pytest.raises(McError, match=r"another process .* is writing .*calib"):
        calibrate_to_file(checkpoint, corpus(), output, options, quiet=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(McError, match="has 1000 B free, but the work on calib takes"):
        calibrate_to_file(checkpoint, corpus(), output, options, quiet=True)
    assert checkpoint.n_reads == 0
    assert not list(tmp_path.iterdir())


def test_the_state_takes_no_more_than_was_asked_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured whenever a file of a state is complete; headers of files and the statistics are small."""
    output, options = tmp_path / "calib", CalibrationOptions(types=TYPES, threads=1)
    checkpoint, largest = MemoryCheckpoint(case()[0]), [0]
    replace_file = Path.replace

    def measured(self: Path, target: Path) -> Path:
        found = replace_file(self, target)
        states = (p.stat().st_size for p in workdir_path(output).rglob("*.npy"))
        largest[0] = max(largest[0], sum(states))
        return found

    monkeypatch.setattr(Path, "replace", measured)
    calibrate_to_file(checkpoint, corpus(), output, options, quiet=True)
    promised = state_bytes(checkpoint.info, corpus().rows, options.sensitivity_tokens)
    assert 0.3 * promised < largest[0] <= promised + 128 * 20


class Unrouted(MemoryCheckpoint):
    """Seven experts, top-3; the router's rows are w, -w, v, -v, u, -u and 0, so that the last is never
    chosen.
    """

    def tensor(self, name: str) -> NDArray[np.float32]:
        values = super().tensor(name)
        if name.endswith("ffn_gate_inp.weight"):
            values[1:6:2], values[6] = -values[0:6:2], 0
        return values


def test_an_unrouted_expert_counts_as_if_one_token_had_come(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Unrouted(random_mixtral(num_local_experts=7))
    with caplog.at_level(logging.WARNING):
        calibration = calibrate_checkpoint(
            checkpoint, corpus(), CalibrationOptions(types=TYPES, threads=2), quiet=True
        )
    assert (calibration.frequency[:, 6] == 0).all()
    assert (calibration.imatrix_in[:, 6] == 0).all()
    assert (calibration.output_sq[:, 6] == 0).all()
    per_token = calibration.sq_error[:, :6] / calibration.frequency[:, :6, None, None]
    assert (calibration.sq_error[:, 6] > 0).all()
    assert (calibration.sq_error[:, 6] < 3 * per_token.max(axis=1)).all()
    assert "2 of them none (layer/expert" in caplog.text


def test_the_measured_types_depend_on_the_row_length() -> None:
    info = MemoryCheckpoint(random_mixtral()).info
    assert measured_types(info, None) == FALLBACKS
    assert measured_types(replace(info, n_embd=256, n_ff=512), None) == CANDIDATES
    mixed = measured_types(replace(info, n_embd=256), None)
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


def test_values_that_are_not_finite_are_refused() -> None:
    class Damaged(MemoryCheckpoint):
        def tensor(self, name: str) -> NDArray[np.float32]:
            return super().tensor(name) * (np.nan if name == "blk.1.attn_output.weight" else 1)

    with pytest.raises(SourceError, match="layer 1, attention: hidden states reach nan"):
        calibrate_checkpoint(
            Damaged(random_mixtral()), corpus(), CalibrationOptions(types=TYPES, threads=2), quiet=True
        )


def test_tensors_of_zeros_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    class Interrupted(MemoryCheckpoint):
        def tensor(self, name: str) -> NDArray[np.float32]:
            return super().tensor(name) * (0 if name == "output.weight" else 1)

    options = CalibrationOptions(types=TYPES, threads=2)
    calibrate_checkpoint(Interrupted(random_mixtral()), corpus(), options, quiet=True)
    assert "1 tensors are nothing but zeros (output.weight): was the download interrupted?" in caplog.text


def test_damage_outside_the_experts_is_found_first() -> None:
    class Damaged(MemoryCheckpoint):
        def tensor(self, name: str) -> NDArray[np.float32]:
            if name == "output.weight":
                raise SourceError("output.weight: nan")
            return super().tensor(name)

    checkpoint = Damaged(random_mixtral())
    with pytest.raises(SourceError, match=r"output\.weight: nan"):
        calibrate_checkpoint(checkpoint, corpus(), CalibrationOptions(types=TYPES, threads=2), quiet=True)
    assert checkpoint.n_reads == 0


def test_models_with_dense_layers_are_refused() -> None:
    checkpoint = MemoryCheckpoint(random_mixtral())
    tensors = tuple(t for t in checkpoint.info.tensors if not t.name.startswith("blk.1.ffn_down"))
    checkpoint.info = replace(checkpoint.info, tensors=tensors)
    with pytest.raises(SourceError, match="experts in every layer"):
        calibrate_checkpoint(checkpoint, corpus(), quiet=True)
