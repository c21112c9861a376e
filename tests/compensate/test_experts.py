"""Error compensation of a model: the pass, the bank, the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mc_gguf.artifacts import PROJECTIONS, Calibration, Plan
from mc_gguf.cli import main
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.progress import Progress
from mc_gguf.compensate.bank import Bank
from mc_gguf.compensate.experts import Wanted, calibration_text, compensate, open_bank
from mc_gguf.compensate.hessian import Collector, HessianTokens, held_out_tokens, run_expert
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.source import Checkpoint, open_checkpoint
from mc_gguf.source.decoder import Decoder
from mc_gguf.source.text import Corpus, load_corpus
from tests.support.moe_directories import random_moe, save_moe

pytestmark = pytest.mark.native
TOKENS, CTX = 4096, 256


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> Checkpoint:
    return open_checkpoint(tiny_model)


@pytest.fixture(scope="module")
def corpus(source: Checkpoint) -> Corpus:
    return load_corpus(source, tokens=TOKENS, ctx=CTX)


@pytest.fixture(scope="module")
def calibration(source: Checkpoint, corpus: Corpus) -> Calibration:
    """Flat importance matrices."""
    info = source.info
    shape = (info.n_layer, info.n_expert)
    ones = [np.ones((*shape, n), dtype=np.float32) for n in (info.n_embd, info.n_ff)]
    blank = Calibration.blank(info)
    return replace(
        blank,
        statistics={"imatrix_in": ones[0], "imatrix_mid": ones[1]},
        fingerprint="1" * 64,
        corpus=corpus.to_json(),
    )


def want(name: str, layers: Iterable[int], experts: Iterable[int]) -> Wanted:
    kinds = frozenset((p, name) for p in PROJECTIONS)
    return {(layer, expert): kinds for layer in layers for expert in experts}


def contents(bank: Bank, wanted: Wanted) -> list[bytes]:
    found = [bank.get(*key, *kind) for key, kinds in _places(wanted) for kind in kinds]
    assert all(blocks is not None for blocks in found)
    return [blocks.tobytes() for blocks in found if blocks is not None]


def _places(wanted: Wanted) -> list[tuple[tuple[int, str, int], list[tuple[str]]]]:
    return [
        ((layer, p, expert), [(name,)])
        for (layer, expert), kinds in sorted(wanted.items())
        for p, name in sorted(kinds)
    ]


class Killed(Exception):
    """In place of a signal."""


class Bomb(Progress):
    """Ends the pass after some matrices."""

    def __init__(self, after: int) -> None:
        super().__init__("", 0, "", open("/dev/null", "w"), True)
        self.after = after

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        super().update(done, total, note)
        if done >= self.after:
            raise Killed


def test_killed_resumed_and_threads_give_the_same_bytes(
    source: Checkpoint, corpus: Corpus, calibration: Calibration, tmp_path: Path
) -> None:
    wanted = want("Q3_K", (0, 2), (1, 6))
    whole = open_bank(tmp_path / "a", calibration)
    outcome = compensate(source, calibration, wanted, corpus, whole, 2)
    assert outcome.compensated + outcome.plain == 12
    assert np.median(outcome.ratios) < 0.8
    parts, states = open_bank(tmp_path / "b", calibration), tmp_path / "states"
    with pytest.raises(Killed):
        compensate(source, calibration, wanted, corpus, parts, 1, Bomb(9), states=states)
    assert [path.name for path in states.iterdir()] == ["hidden-2.npy"]
    outcome = compensate(source, calibration, wanted, corpus, parts, 1, states=states)
    assert not states.exists()
    assert outcome.compensated + outcome.plain == 3
    assert contents(parts, wanted) == contents(whole, wanted)
    assert not compensate(source, calibration, wanted, corpus, parts, 1).ratios


def test_the_pass_is_the_decoders_forward(tmp_path: Path) -> None:
    """With a shared expert, and experts that no token reaches."""
    source = open_checkpoint(save_moe(random_moe("Qwen2Moe", num_experts_per_tok=1), tmp_path / "hf"))
    corpus, info, decoder = load_corpus(source, tokens=64, ctx=32), source.info, Decoder(source)
    ones = [np.ones((2, info.n_expert, n), dtype=np.float32) for n in (info.n_embd, info.n_ff)]
    statistics = {"imatrix_in": ones[0], "imatrix_mid": ones[1]}
    flat = replace(Calibration.blank(info), statistics=statistics, corpus=corpus.to_json())
    bank, states = open_bank(tmp_path / "bank", flat), tmp_path / "states"
    with pytest.raises(Killed):
        compensate(source, flat, want("Q4_0", (1,), (0,)), corpus, bank, 1, Bomb(3), states=states)
    hidden = decoder.embed(corpus.rows)
    decoder.attention(0, hidden)
    reached = set(decoder.route(0, hidden.flatten(0, 1)).experts.flatten().tolist())
    assert len(reached) < info.n_expert
    decoder.feed_forward(0, hidden)
    np.testing.assert_allclose(np.load(states / "hidden-1.npy"), hidden.numpy(), rtol=1e-5, atol=1e-5)


def test_block_output_is_closer_on_other_text(
    source: Checkpoint, corpus: Corpus, calibration: Calibration, tmp_path: Path
) -> None:
    """The whole block of a layer in IQ2_XS, on text that the Hessians have not seen."""
    wanted = want("IQ2_XS", (0,), range(source.info.n_expert))
    bank = open_bank(tmp_path, calibration)
    compensate(source, calibration, wanted, corpus, bank, 2)
    decoder = Decoder(source)
    hidden = decoder.embed(load_corpus(source, tokens=2048, ctx=CTX, seed=9).rows)
    decoder.attention(0, hidden)
    outputs = []
    for how in ("exact", "plain", "compensated"):
        out = hidden.clone()
        _Replaced(source, bank, how).feed_forward(0, out)
        outputs.append(out)
    plain, ours = (float((out - outputs[0]).square().sum()) for out in outputs[1:])
    assert ours < 0.75 * plain


class _Replaced(Decoder):
    """Experts of layer 0 as they come out of the bank, or of ggml's quantizer."""

    def __init__(self, checkpoint: Checkpoint, bank: Bank, how: str) -> None:
        super().__init__(checkpoint)
        self.bank, self.how = bank, how

    def expert(self, layer, expert):  # type: ignore[no-untyped-def]
        exact = super().expert(layer, expert)
        if self.how == "exact":
            return exact
        found = []
        for p in PROJECTIONS:
            weights = getattr(exact, p).numpy()
            rows, cols = weights.shape
            blocks = self.bank.get(layer, p, expert, "IQ2_XS")
            if self.how == "plain":
                blocks = quantize_rows(weights, "IQ2_XS", np.ones(cols, dtype=np.float32), 1)
            assert blocks is not None
            found.append(torch.from_numpy(dequantize_rows(blocks, "IQ2_XS", cols, rows)))
        return type(exact)(*found)


def test_forward_is_the_decoders_and_hessians_add_up(source: Checkpoint, corpus: Corpus) -> None:
    decoder = Decoder(source)
    with torch.inference_mode():
        hidden = decoder.embed(corpus.rows)
        decoder.attention(0, hidden)
        flat = hidden.flatten(0, 1).clone()
        decoder.feed_forward(0, hidden)
        routing, norm, added = decoder.route(0, flat), decoder.ffn_norm(0), torch.zeros_like(flat)
        held_out = held_out_tokens(*corpus.rows.shape)
        assert int(held_out.sum()) == len(flat) // 8
        used = torch.nonzero(~held_out)[:, 0]
        for number in range(source.info.n_expert):
            expert, tokens = decoder.expert(0, number), HessianTokens.routed(routing, number, held_out)
            more = HessianTokens.enough(decoder, routing, number, 100_000, held_out)  # more than there are
            assert len(set(more.index.tolist())) == len(more.index)
            assert set(more.index.tolist()) == set(tokens.index.tolist()) | set(used.tolist())
            assert float(more.weights[more.n_routed :].max()) < 0.2
            collector = Collector(expert, True, True)
            run_expert(decoder, expert, flat, norm, more, added, collector)
            x = decoder.norm(flat[more.index], norm)
            weighted = (expert.hidden(x) * more.weights[:, None]).double()
            inputs = collector.inputs(True)
            assert len(inputs.held_out) == min(int(tokens.held_out.sum()), 512) > 0
            assert inputs.n_tokens == len(used)
            kept = weighted[~more.held_out]
            scale = float(kept.square().sum())
            assert float((inputs.hessian - kept.T @ kept).abs().max()) < 1e-5 * scale
        assert torch.equal(flat + added, hidden.flatten(0, 1))


def test_another_text_is_refused(source: Checkpoint, calibration: Calibration, tmp_path: Path) -> None:
    corpus = calibration_text(source, calibration)
    np.testing.assert_array_equal(corpus.rows, load_corpus(source, tokens=TOKENS, ctx=CTX).rows)
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 20_000)
    with pytest.raises(ArtifactError, match=r"give that one, or do without error compensation"):
        calibration_text(source, calibration, (other,))


def test_command_line(tiny_model: Path, tmp_path: Path) -> None:
    """convert and quantize make the same file, with compensation and without it."""
    text = tmp_path / "text.txt"
    text.write_text((tiny_model / "README.md").read_text() * 40)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    quick = ("--tokens", 1024, "--ctx", 128, "--rows", 8, "--types", "Q3_K,Q4_K", "--text", text)
    model = tmp_path / "m.gguf"
    assert "error compensation: squared error on held-out tokens" in run(
        "convert", tiny_model, "-o", model, "--bpw", 4.0, *quick
    )
    plan = tmp_path / "m.plan.json"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"m.gguf", "m.plan.json", "m.calib.safetensors", "text.txt"}
    for name, options in (("a", ("--calibration-text", text)), ("b", ("--no-compensate",))):
        run("quantize", tiny_model, plan, "-o", tmp_path / name, *options)
    assert (tmp_path / "a").read_bytes() == model.read_bytes()
    assert (tmp_path / "b").stat().st_size == model.stat().st_size
    assert (tmp_path / "b").read_bytes() != model.read_bytes()
    assert Plan.load(plan).file_bytes == model.stat().st_size
    result = CliRunner().invoke(main, ["quantize", str(tiny_model), str(plan), "-o", str(tmp_path / "c")])
    assert result.exit_code == 1
    assert "Error: --calibration-text, --compensate/--no-compensate: the calibration was" in result.output
