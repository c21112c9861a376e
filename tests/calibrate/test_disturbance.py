"""Prices and curves against transformers' models with the experts dropped or rounded inside their blocks."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.disturbance import rounded_output
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.calibrate.statistics import N_QUANTILES
from mc_gguf.capture.expert import Expert
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.source import open_checkpoint
from mc_gguf.source.text import Corpus, load_corpus
from tests.support import TINY
from tests.support.block_reference import BlockReference, block_references, divergence, round_rows
from tests.support.moe_directories import CONFIGS, random_moe, save_moe, write_f32
from tests.support.small_models import MemoryCheckpoint, random_mixtral, tiny_mixtral

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]

MIDDLE = N_QUANTILES // 2
OPTIONS = CalibrationOptions(types=("Q8_0",), max_rows=8, max_tokens=8, threads=1)


def corpus(n_rows: int = 6, ctx: int = 32, n_vocab: int = 96) -> Corpus:
    rows = np.random.default_rng(7).integers(0, n_vocab, (n_rows, ctx)).astype(np.int32)
    return Corpus(rows, ("random",), "0" * 64, rows.size, 0)


@cache
def case(name: str) -> tuple[Any, NDArray[np.int32], Calibration]:
    """The bundled model on its text (top-2), or a random one: top-3, or of another architecture and top-8;
    model, rows and calibration. All are stored as F32.
    """
    if name in CONFIGS:
        model, text = random_moe(name), corpus(n_vocab=4096)
        with tempfile.TemporaryDirectory() as folder:
            source = open_checkpoint(save_moe(model, Path(folder)))
            checkpoint = open_checkpoint(write_f32(source, Path(folder) / "f32.gguf"))
            return model, text.rows, calibrate_checkpoint(checkpoint, text, OPTIONS, quiet=True)
    if name == "bundled":
        model, text = tiny_mixtral(), load_corpus(open_checkpoint(TINY), tokens=512, ctx=128)
    else:
        model, text = random_mixtral(), corpus()
    return model, text.rows, calibrate_checkpoint(MemoryCheckpoint(model, "F32"), text, OPTIONS, quiet=True)


@cache
def references(name: str) -> list[BlockReference]:
    return block_references(*case(name)[:2])


def dropped(reference: BlockReference, thresholds: NDArray[np.float64]) -> torch.Tensor:
    """[N, n_embd] what dropping experts adds to the block's output."""
    change = reference.kept(reference.keep(thresholds)) - reference.weights
    return torch.einsum("tk,tke->te", change, reference.outputs())


OTHERS = [("Qwen3Moe", 0), ("Olmoe", 0), ("Qwen2Moe", 1)]


@pytest.mark.parametrize(
    ("name", "layer"), [("bundled", 0), ("bundled", 4), ("random", 0), ("random", 1), *OTHERS]
)
def test_sensitivity_is_that_of_the_whole_model(name: str, layer: int) -> None:
    model, rows, calibration = case(name)
    reference = references(name)[layer]
    change = dropped(reference, calibration.ratio_quantiles[layer, :, MIDDLE])
    expected = divergence(model, rows, reference.mlp, change)
    assert expected > 1e-5
    assert calibration.routing_sensitivity[layer] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("name", "layer"), [("bundled", 0), ("bundled", 5), ("random", 0), ("random", 1), ("Qwen3Moe", 1)]
)
def test_a_unit_of_error_costs_what_rounding_the_experts_costs(name: str, layer: int) -> None:
    model, rows, calibration = case(name)
    reference = references(name)[layer]
    changes = (reference.outputs(rounded=True) - reference.outputs()) * reference.weights[..., None]
    sizes = reference.after.square().sum(-1)[:, None]
    error = float((changes.square().sum(-1) / sizes).sum(1).mean())
    expected = divergence(model, rows, reference.mlp, changes.sum(1)) / error
    assert calibration.kld_per_error[layer] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("name", "layer"), [("bundled", 1), ("bundled", 5), ("random", 0), ("random", 1), *OTHERS]
)
def test_the_curve_is_the_error_of_the_block(name: str, layer: int) -> None:
    _, _, calibration = case(name)
    reference, quantiles = references(name)[layer], calibration.ratio_quantiles[layer]
    at = (100, 300, 800, 990)  # at 1000 one token is on the edge
    errors = [float(dropped(reference, quantiles[:, i]).square().sum()) for i in (MIDDLE, *at)]
    found = calibration.routing_curve[layer, list(at)]
    np.testing.assert_allclose(found, np.array(errors[1:]) / errors[0], rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("name", ["bundled", "random", "Qwen3Moe"])
def test_curves_rise_from_0_and_are_1_at_the_median(name: str) -> None:
    calibration = case(name)[2]
    assert (calibration.routing_curve[:, 0] == 0).all()
    assert (calibration.routing_curve[:, MIDDLE] == 1).all()
    assert (np.diff(calibration.routing_curve) >= 0).all()
    assert RoutingProfile.of(calibration).n_rank == {"bundled": 2, "random": 3, "Qwen3Moe": 8}[name]


def test_few_tokens_are_enough_for_prices() -> None:
    """Of the first tokens of evenly spread rows."""
    model, text = random_mixtral(), corpus()
    options = CalibrationOptions(types=("Q8_0",), max_rows=8, sensitivity_tokens=40, threads=1)
    found = calibrate_checkpoint(MemoryCheckpoint(model, "F32"), text, options, quiet=True)
    rows = text.rows[:1]  # 40 tokens are one row of 32
    reference = block_references(model, rows)[1]
    change = dropped(reference, found.ratio_quantiles[1, :, MIDDLE])
    assert found.routing_sensitivity[1] == pytest.approx(
        divergence(model, rows, reference.mlp, change), rel=0.03
    )


def test_one_expert_a_token_has_nothing_to_drop() -> None:
    checkpoint = MemoryCheckpoint(random_mixtral(num_experts_per_tok=1))
    calibration = calibrate_checkpoint(checkpoint, corpus(2), OPTIONS, quiet=True)
    assert calibration.routing_sensitivity == pytest.approx(np.zeros(2), abs=1e-8)
    assert RoutingProfile.of(calibration).n_rank == 1
    assert (calibration.kld_per_error > 0).all()


GATE, UP, WHOLE = ["product", "gate"], ["product", "up"], ["product", "gate_up"]


@pytest.mark.parametrize("kind", ["gated", "merged", "no gate"])
def test_rounding_in_pieces_is_rounding_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc_gguf.calibrate.disturbance._UNITS", 24)
    torch.manual_seed(0)
    n_embd, n_ff = 32, 80
    rows = {"gated": {"gate": 1, "up": 1}, "merged": {"gate_up": 2}, "no gate": {"up": 1}}[kind]
    matrices = {p: torch.randn(n * n_ff, n_embd) for p, n in rows.items()}
    matrices |= {"down": torch.randn(n_embd, n_ff)}
    functions: dict[str, list[Any]] = {
        "gated": ["GLU.SWIGLU", GATE, UP],
        "merged": ["GLU.SWIGLU", ["half", 0, WHOLE], ["half", 1, WHOLE]],
        "no gate": ["SQR", ["UNARY.RELU", UP]],
    }
    x, exact = torch.randn(9, n_embd), {p: round_rows(m) for p, m in matrices.items()}
    if kind == "no gate":
        hidden = torch.relu(x @ exact["up"].T).square()
    else:
        gate, up = exact["gate_up"].chunk(2) if kind == "merged" else (exact["gate"], exact["up"])
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    expert = Expert(matrices, ExpertFunction(functions[kind]), {})
    torch.testing.assert_close(rounded_output(expert, x), hidden @ exact["down"].T, rtol=1e-4, atol=1e-3)


def test_no_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    test_one_expert_a_token_has_nothing_to_drop()
    assert not list(tmp_path.iterdir())
