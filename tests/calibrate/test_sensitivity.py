"""Sensitivity and curve against transformers' models with the experts dropped inside their own blocks."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mc_gguf.calibrate.sensitivity import SENSITIVITY_TOKENS, branch_rows
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from mc_gguf.artifacts import Calibration
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.calibrate.statistics import N_QUANTILES
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.source import open_checkpoint
from mc_gguf.source.text import Corpus, load_corpus
from tests.support import TINY
from tests.support.moe_directories import CONFIGS, random_moe, save_moe
from tests.support.small_models import MemoryCheckpoint, random_mixtral, tiny_mixtral

pytestmark = pytest.mark.native
MIDDLE = N_QUANTILES // 2


@cache
def case(name: str) -> tuple[Any, NDArray[np.int32], Calibration]:
    """The bundled model on its text (top-2), or a random one: top-3, or of another architecture and top-8;
    model, rows and calibration.
    """
    options = CalibrationOptions(types=("Q8_0",), max_rows=8, max_tokens=8, threads=2)
    if name in CONFIGS:
        model = random_moe(name)
        rows = np.random.default_rng(7).integers(0, 4096, (6, 32)).astype(np.int32)
        text = Corpus(rows, ("random",), "0" * 64, rows.size, 0)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = open_checkpoint(save_moe(model, Path(folder)))
            return model, rows, calibrate_checkpoint(checkpoint, text, options, quiet=True)
    if name == "bundled":
        model = tiny_mixtral()
        text = load_corpus(open_checkpoint(TINY), tokens=1024, ctx=128)
    else:
        model = random_mixtral()
        rows = np.random.default_rng(7).integers(0, 96, (6, 32)).astype(np.int32)
        text = Corpus(rows, ("random",), "0" * 64, rows.size, 0)
    return model, text.rows, calibrate_checkpoint(MemoryCheckpoint(model), text, options, quiet=True)


def block(mlp: Any, x: torch.Tensor, thresholds: NDArray[np.float64]) -> torch.Tensor:
    """Output [n, n_embd] of transformers' MoE block for x, without the experts of rank j >= 1 where
    w_j / w_0 < thresholds[j - 1].
    """
    probs, chosen = torch.softmax(x @ mlp.gate.weight.T, dim=-1).topk(len(thresholds) + 1)
    limits = torch.from_numpy(np.concatenate([[0.0], thresholds]))
    weights = probs * (probs / probs[:, :1] >= limits)
    if getattr(mlp.gate, "norm_topk_prob", True):  # Mixtral has no choice
        weights = weights / weights.sum(1, keepdim=True)
    out = torch.zeros_like(x)
    if hasattr(mlp, "shared_expert"):
        out += torch.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)
    for e in range(len(mlp.experts.gate_up_proj)):
        gate, up = mlp.experts.gate_up_proj[e].chunk(2)
        y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.experts.down_proj[e].T
        out += y * (weights * (chosen == e)).sum(1, keepdim=True)
    return out


@contextmanager
def dropping(model: Any, layer: int, thresholds: NDArray[np.float64]) -> Iterator[None]:
    """`model` with one layer that drops its experts."""

    def instead(mlp: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> torch.Tensor:
        return block(mlp, inputs[0].flatten(0, 1), thresholds).view_as(inputs[0])

    handle = model.model.layers[layer].mlp.register_forward_hook(instead)
    yield
    handle.remove()


def log_probs(model: Any, rows: NDArray[np.int32]) -> torch.Tensor:
    with torch.inference_mode():
        logits = torch.as_tensor(model(torch.from_numpy(rows).long()).logits)
    return torch.log_softmax(logits.double(), dim=-1)


OTHERS = [("Qwen3Moe", 0), ("Olmoe", 0), ("Qwen2Moe", 0), ("Qwen2Moe", 1)]


@pytest.mark.parametrize(
    ("name", "layer"), [("bundled", 0), ("bundled", 4), ("random", 0), ("random", 1), *OTHERS]
)
def test_sensitivity_is_that_of_the_whole_model(name: str, layer: int) -> None:
    model, rows, calibration = case(name)
    base = log_probs(model, rows)
    with dropping(model, layer, calibration.ratio_quantiles[layer, :, MIDDLE]):
        changed = log_probs(model, rows)
    expected = float((base.exp() * (base - changed)).sum(-1).mean())
    assert calibration.routing_sensitivity[layer] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-5


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Every row in multiples of 1.05 root mean squares, at most two of them."""
    step = 1.05 * matrix.square().mean(-1, keepdim=True).sqrt()
    return (matrix / step).round().clamp(-2, 2) * step


def expert_outputs(mlp: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted outputs [n, E, n_embd] of all experts for x, and the routing weights [n, E]; 0: not used."""
    with torch.inference_mode():
        probs, chosen = torch.softmax(x @ mlp.gate.weight.T, dim=-1).topk(mlp.top_k)
        weights = torch.zeros(len(x), len(mlp.experts.gate_up_proj)).scatter_(
            1, chosen, probs / probs.sum(1, keepdim=True)
        )
        found = []
        for e in range(weights.shape[1]):
            gate, up = mlp.experts.gate_up_proj[e].chunk(2)
            y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.experts.down_proj[e].T
            found.append(y * weights[:, e, None])
    return torch.stack(found, 1), weights


@contextmanager
def rounding(model: Any, layer: int) -> Iterator[None]:
    """`model` with the experts of one layer rounded."""
    experts = model.model.layers[layer].mlp.experts
    before = [p.data for p in (experts.gate_up_proj, experts.down_proj)]
    experts.gate_up_proj.data, experts.down_proj.data = (rounded(p) for p in before)
    yield
    experts.gate_up_proj.data, experts.down_proj.data = before


@pytest.mark.parametrize(("name", "layer"), [("bundled", 0), ("bundled", 5), ("random", 0), ("random", 1)])
def test_a_unit_of_error_costs_what_rounding_the_experts_costs(name: str, layer: int) -> None:
    model, rows, calibration = case(name)
    seen: list[torch.Tensor] = []
    block_of = model.model.layers[layer]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
        for module in (block_of.post_attention_layernorm, block_of.mlp)
    ]
    base = log_probs(model, rows)
    for hook in hooks:
        hook.remove()
    outputs = [expert_outputs(block_of.mlp, seen[1])]
    with rounding(model, layer):
        changed = log_probs(model, rows)
        outputs.append(expert_outputs(block_of.mlp, seen[1]))
    whole, used = outputs[0][0], outputs[0][1] > 0
    errors = (outputs[1][0] - whole).square().sum(-1) / (seen[0][:, None] + whole).square().sum(-1)
    error = float((errors * used).sum(1).mean())
    divergence = float((base.exp() * (base - changed)).sum(-1).mean())
    assert calibration.kld_per_error[layer] == pytest.approx(divergence / error, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "layer"), [("bundled", 1), ("bundled", 5), ("random", 0), ("random", 1), *OTHERS]
)
def test_the_curve_is_the_error_of_the_block(name: str, layer: int) -> None:
    model, rows, calibration = case(name)
    seen: list[torch.Tensor] = []
    mlp = model.model.layers[layer].mlp
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    log_probs(model, rows)
    handle.remove()
    quantiles = calibration.ratio_quantiles[layer]
    with torch.inference_mode():
        whole = block(mlp, seen[0], np.zeros(len(quantiles)))
        errors = [
            float((block(mlp, seen[0], quantiles[:, i]) - whole).double().square().sum())
            for i in (MIDDLE, 100, 300, 800, 990)  # at 1000 one token is on the edge
        ]
    found = calibration.routing_curve[layer, [100, 300, 800, 990]]
    np.testing.assert_allclose(found, np.array(errors[1:]) / errors[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["bundled", "random"])
def test_curves_rise_from_0_and_are_1_at_the_median(name: str) -> None:
    calibration = case(name)[2]
    assert (calibration.routing_curve[:, 0] == 0).all()
    assert (calibration.routing_curve[:, MIDDLE] == 1).all()
    assert (np.diff(calibration.routing_curve) >= 0).all()
    assert RoutingProfile.of(calibration).n_rank == (2 if name == "bundled" else 3)


def test_one_expert_a_token_has_nothing_to_drop() -> None:
    rows = np.random.default_rng(7).integers(0, 96, (2, 32)).astype(np.int32)
    text = Corpus(rows, ("random",), "0" * 64, rows.size, 0)
    checkpoint = MemoryCheckpoint(random_mixtral(num_experts_per_tok=1))
    calibration = calibrate_checkpoint(
        checkpoint, text, CalibrationOptions(types=("Q8_0",), threads=2), quiet=True
    )
    assert (calibration.routing_sensitivity == 0).all()
    assert RoutingProfile.of(calibration).n_rank == 1


def test_the_rows_are_spread_over_the_text() -> None:
    rows = np.arange(100 * 512, dtype=np.int32).reshape(100, 512)
    found = branch_rows(rows, SENSITIVITY_TOKENS)
    assert (found == rows[[0, 33, 66, 99]]).all()
    assert (branch_rows(rows[:3], SENSITIVITY_TOKENS) == rows[:3]).all()
    assert branch_rows(rows, 1100).shape == (2, 512)
    assert (branch_rows(rows, 200) == rows[:1, :200]).all()


CTX, N_ROWS, N_EMBD = 64, 16, 256
BRANCH_BYTES = N_ROWS * CTX * N_EMBD * 4


@cache
def peak_bytes(n_layer: int) -> int:
    """The most that the tensors of a calibration hold at once, as torch's allocator counts it; all of the
    text runs through the branches.
    """
    rows = np.random.default_rng(7).integers(0, 96, (N_ROWS, CTX)).astype(np.int32)
    text = Corpus(rows, ("random",), "0" * 64, rows.size, 0)
    # Small weights: whether torch or numpy holds what is read depends on where it happens to lie.
    sizes = {"num_hidden_layers": n_layer, "hidden_size": N_EMBD, "intermediate_size": 32, "head_dim": 8}
    checkpoint = MemoryCheckpoint(random_mixtral(**sizes))
    options = CalibrationOptions(types=("Q8_0",), max_rows=8, max_tokens=8, threads=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        calibrate_checkpoint(checkpoint, text, options, quiet=True)
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def test_memory_does_not_grow_with_the_layers() -> None:
    """Six layers have four branches more than two. Their routing takes a quarter of one; the embeddings of
    the text, one, are torch's or numpy's.
    """
    few, many = peak_bytes(2), peak_bytes(6)
    assert many < few + 2 * BRANCH_BYTES
    # hidden states and what the layer adds, of the calibration and of one branch; the outputs of top-3
    assert few > 7 * BRANCH_BYTES


def test_every_weight_is_read_as_often_for_many_branches_as_for_few() -> None:
    class Counting(MemoryCheckpoint):
        def tensor(self, name: str) -> NDArray[np.float32]:
            reads[name] += 1
            return super().tensor(name)

    reads: Counter[str] = Counter()
    rows = np.random.default_rng(7).integers(0, 96, (2, 32)).astype(np.int32)
    text = Corpus(rows, ("random",), "0" * 64, rows.size, 0)
    checkpoint = Counting(random_mixtral(num_hidden_layers=6))
    calibrate_checkpoint(
        checkpoint, text, CalibrationOptions(types=("Q8_0",), max_rows=8, threads=1), quiet=True
    )
    assert checkpoint.n_reads == 6 * 5 * 3
    for part in ("attn_norm", "attn_q", "attn_output", "ffn_gate_inp", "ffn_norm"):
        assert len({reads[f"blk.{layer}.{part}.weight"] for layer in range(6)}) == 1


def test_no_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    test_one_expert_a_token_has_nothing_to_drop()
    assert not list(tmp_path.iterdir())
