"""What the runtime computes, in a spool, against transformers; batches, interruption, damage."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.capture import capture as captures
from mc_gguf.capture import observer as observers
from mc_gguf.capture.capture import CaptureOptions, LayerRows, capture
from mc_gguf.capture.context import Devices
from mc_gguf.capture.copy import write_copy
from mc_gguf.capture.function import UnknownFunctionError
from mc_gguf.capture.observer import Block, Observer
from mc_gguf.capture.spool import Spool, from_half
from mc_gguf.common.errors import SourceError
from mc_gguf.common.progress import progress
from tests.support.block_reference import BlockReference, block_references
from tests.support.small_models import MemoryCheckpoint, random_mixtral

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]

ROWS = np.random.default_rng(7).integers(0, 96, (5, 32)).astype(np.int32)
SAMPLES = np.r_[0:32, 96:128].astype(np.int64)
MATRIX_SAMPLES = np.r_[0:8, 96:104].astype(np.int64)
SWIGLU = ["GLU.SWIGLU", ["product", "gate"], ["product", "up"]]


@cache
def model() -> Any:
    return random_mixtral()


@cache
def references() -> list[BlockReference]:
    return block_references(model(), ROWS)


def write_model(folder: Path) -> Path:
    path = folder / "model.gguf"
    folder.mkdir(exist_ok=True)
    if not path.exists():
        write_copy(MemoryCheckpoint(model(), "F32"), path)
    return path


def captured(folder: Path, n_seq: int = 1, threads: int = 1) -> Spool:
    """A spool in `folder`, going on with what is there."""
    path, spool = write_model(folder), Spool(folder / "spool")
    options = CaptureOptions(ROWS, SAMPLES, MATRIX_SAMPLES, n_seq)
    with progress("capture", quiet=True) as bar:
        capture(path, MemoryCheckpoint(model(), "F32").info, options, Devices(threads), spool, bar)
    return spool


@pytest.fixture(scope="module", params=[1, 2, 5])
def spool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Spool:
    return captured(tmp_path_factory.mktemp("capture"), request.param)


def layer_rows(spool: Spool, layer: int) -> LayerRows:
    return LayerRows(spool, layer, ROWS.size, len(SAMPLES))


def close(found: Any, expected: Any, tolerance: float = 4e-3) -> None:
    """The runtime's attention keeps keys and values as float16, and a spool what it keeps."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_rows_are_those_of_transformers(spool: Spool, layer: int) -> None:
    found, reference = layer_rows(spool, layer), references()[layer]
    assert (found.n_used, found.rows_per_token) == (3, 1)
    order = np.argsort(-found.probs, axis=1)

    def ranked(rows: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(rows, order, axis=1)

    np.testing.assert_array_equal(ranked(found.experts), reference.experts)
    close(ranked(found.probs), reference.probs)
    close(ranked(found.weights), reference.weights)
    close(found.router, reference.router)
    every = np.arange(ROWS.size)
    close(found.inputs(every, np.zeros_like(every)), reference.x)
    outputs = reference.outputs()
    close(ranked(found.output_max), outputs.abs().amax(2))
    weighted = outputs * reference.weights[..., None]
    close(ranked(found.output_sq), weighted.square().sum(2), 8e-3)
    close(found.hidden_sq, reference.after.square().sum(1))
    sampled = np.take_along_axis(found.sampled_outputs().numpy(), order[SAMPLES][..., None], axis=1)
    close(sampled, weighted[SAMPLES])


@pytest.mark.parametrize("layer", [0, 1])
def test_sums_are_those_of_transformers(spool: Spool, layer: int) -> None:
    found, reference = layer_rows(spool, layer), references()[layer]
    for number in range(5):
        index, _ = reference.tokens_of(number)
        hidden, _ = reference.output(reference.matrices(number), index)
        close(found.sum("middle_sq")[number], hidden.square().sum(0), 8e-3)
    cosines = torch.cosine_similarity(reference.before, reference.after, dim=1)
    close(found.sum("cosine")[0] / ROWS.size, cosines.mean())
    close(found.sum("hidden_max")[0], reference.after.abs().max())
    slots = np.argsort(-found.probs[:8], axis=1)
    middle = np.take_along_axis(found.middle, slots[..., None], axis=1)
    for token in range(8):
        for rank in range(3):
            number = int(reference.experts[token, rank])
            hidden, _ = reference.output(reference.matrices(number), torch.tensor([token]))
            close(middle[token, rank], hidden[0], 1e-2)


def test_the_median_of_hidden_states_is_that_of_the_first_batch(tmp_path: Path) -> None:
    for n_seq in (1, 2):
        spool = captured(tmp_path / str(n_seq), n_seq)
        median = references()[1].after[: n_seq * 32].abs().median()
        close(layer_rows(spool, 1).sum("hidden_median")[0], median)


@pytest.mark.parametrize(("name", "module"), [("attn_q", "q_proj"), ("attn_output", "o_proj")])
def test_inputs_of_other_matrices_are_those_of_transformers(spool: Spool, name: str, module: str) -> None:
    seen = list[torch.Tensor]()
    linear = getattr(model().model.layers[1].self_attn, module)
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model()(torch.from_numpy(ROWS).long())
    handle.remove()
    key = spool.facts["matrices"][f"blk.1.{name}.weight"]
    assert spool.sums[f"{key}.n"] == [ROWS.size]
    close(spool.sums[f"{key}.sq"], seen[0].square().sum(0))
    rows = spool.rows(key, np.float16, (seen[0].shape[1],)).read(len(MATRIX_SAMPLES))
    scale = spool.rows(f"{key}.scale", np.float32).read(len(MATRIX_SAMPLES))
    close(from_half(rows, scale), seen[0][MATRIX_SAMPLES])


def test_matrices_with_the_same_input_share_its_rows(spool: Spool) -> None:
    keys = {part: spool.facts["matrices"][f"blk.0.attn_{part}.weight"] for part in ("q", "k", "v", "output")}
    assert keys["q"] == keys["k"] == keys["v"] != keys["output"]
    assert "output.weight" in spool.facts["matrices"]
    assert not any("exps" in name for name in spool.facts["matrices"])


def test_the_function_is_read_from_the_graph(spool: Spool) -> None:
    for layer in (0, 1):
        rows = layer_rows(spool, layer)
        assert rows.function is not None
        assert (rows.function.expression, rows.function.down_bias, rows.unknown) == (SWIGLU, "", "")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "spool").iterdir())}


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
def test_what_is_raised_in_the_callback_comes_out_and_the_rest_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, error: type[BaseException]
) -> None:
    """The runtime has not computed what comes after; the bytes are those of a run in one go."""
    captured(tmp_path / "whole")
    calls: list[int] = []
    original = captures._Writer.block_output

    def interrupted(self: Any, block: Block, *arguments: Any) -> None:
        if (self.first // 32, block.layer) == (batch, 1) and not calls:
            calls.append(self.first)
            raise error("here")
        original(self, block, *arguments)

    folder = tmp_path / "parts"
    monkeypatch.setattr(captures, "SAVE_EVERY", 1)
    monkeypatch.setattr(captures._Writer, "block_output", interrupted)
    with pytest.raises(error, match="here"):
        captured(folder)
    assert calls == [batch * 32]
    assert Spool(folder / "spool").done == batch * 32
    captured(folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_complete_spool_needs_no_model(tmp_path: Path) -> None:
    captured(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"damaged")
    captured(tmp_path)
    assert contents(tmp_path) == before


def test_damaged_sums_start_anew(tmp_path: Path) -> None:
    captured(tmp_path)
    before = contents(tmp_path)
    path = tmp_path / "spool" / "sums.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    captured(tmp_path)
    assert contents(tmp_path) == before


def test_threads_do_not_change_the_rows(tmp_path: Path) -> None:
    for threads in (1, 2):
        captured(tmp_path / str(threads), threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_operation_that_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_node: Any) -> Any:
        raise UnknownFunctionError("WIN_PART")

    monkeypatch.setattr(observers, "function_of", unknown)
    rows = layer_rows(captured(tmp_path), 1)
    assert (rows.function, rows.unknown) == (None, "WIN_PART")


def test_a_model_whose_experts_are_not_computed_is_refused(tmp_path: Path) -> None:
    info = MemoryCheckpoint(model(), "F32").info
    more = tuple(
        replace(t, name=t.name.replace("blk.1.", "blk.2."))
        for t in info.tensors
        if t.name.startswith("blk.1.")
    )
    wrong = replace(info, n_layer=3, tensors=info.tensors + more)
    options = CaptureOptions(ROWS, SAMPLES, MATRIX_SAMPLES)
    with (
        progress("capture", quiet=True) as bar,
        pytest.raises(SourceError, match="did not compute the experts of layer 2"),
    ):
        capture(write_model(tmp_path), wrong, options, Devices(1), Spool(tmp_path / "spool"), bar)


def test_a_file_that_the_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SourceError, match=r"the runtime cannot load .*model\.gguf: "):
        captured(tmp_path)


def test_what_comes_after_the_final_norm_is_not_computed() -> None:
    """The product with the output matrix is the largest of small models."""

    class Nothing(observers.Sink):
        """Takes no notice."""

    observer = Observer(Nothing())
    observer.is_finished = True
    assert observer(0, True, None) is False
    assert observer(0, False, None) is False
    observer.begin()
    assert not observer.is_finished
