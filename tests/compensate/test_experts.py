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
from mc_gguf.calibrate.routed import Routing
from mc_gguf.calibrate.verify import verified_function
from mc_gguf.capture.capture import LayerRows
from mc_gguf.capture.expert import read_expert
from mc_gguf.capture.spool import Spool
from mc_gguf.cli import main
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.progress import Progress
from mc_gguf.compensate import experts as passes
from mc_gguf.compensate.bank import Bank
from mc_gguf.compensate.experts import Wanted, calibration_text, captured, compensate, open_bank
from mc_gguf.compensate.hessian import Collector, HessianTokens, collect, held_out_tokens
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.source import Checkpoint, open_checkpoint
from mc_gguf.source.decoder import Decoder
from mc_gguf.source.text import Corpus, load_corpus
from tests.support.moe_directories import random_moe, save_moe, write_f32

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
    assert sorted(path.name for path in states.iterdir()) == ["model.gguf", "spool"]
    (states / "model.gguf").unlink()  # what the text gave is in the spool
    outcome = compensate(source, calibration, wanted, corpus, parts, 1, states=states)
    assert not states.exists()
    assert outcome.compensated + outcome.plain == 3
    assert contents(parts, wanted) == contents(whole, wanted)
    assert not compensate(source, calibration, wanted, corpus, parts, 1).ratios


def test_the_spool_of_a_calibration_is_enough(
    source: Checkpoint, corpus: Corpus, calibration: Calibration, tmp_path: Path
) -> None:
    """What `states` has is taken, and the text is not evaluated again."""
    states, wanted = tmp_path / "states", want("Q4_0", (1,), (3,))
    captured(source, corpus, states, 1, None)
    (states / "model.gguf").write_bytes(b"damaged")
    banks = [open_bank(tmp_path / name, calibration) for name in "ab"]
    compensate(source, calibration, wanted, corpus, banks[0], 1, states=states)
    compensate(source, calibration, wanted, corpus, banks[1], 1)
    assert contents(banks[0], wanted) == contents(banks[1], wanted)


def test_a_pass_can_be_ended_and_goes_on(
    source: Checkpoint, corpus: Corpus, calibration: Calibration, tmp_path: Path
) -> None:
    wanted, states = want("Q4_0", (1,), (0, 3)), tmp_path / "states"
    bank, asked = open_bank(tmp_path / "bank", calibration), list[tuple[int, int]]()

    def stop(made: int, total: int) -> bool:
        asked.append((made, total))
        return False

    outcome = compensate(source, calibration, wanted, corpus, bank, 1, states=states, keep_going=stop)
    assert asked == [(3, 6)]
    assert not outcome.is_complete
    assert states.exists()
    outcome = compensate(
        source, calibration, wanted, corpus, bank, 1, states=states, keep_going=lambda *_: True
    )
    assert outcome.is_complete
    assert len(contents(bank, wanted)) == 6
    assert not states.exists()


def test_experts_whose_function_is_not_known_are_left_out(
    source: Checkpoint,
    corpus: Corpus,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def verified(checkpoint: Checkpoint, routing: Routing):  # type: ignore[no-untyped-def]
        return (None, "unknown") if routing.rows.layer == 0 else verified_function(checkpoint, routing)

    monkeypatch.setattr(passes, "verified_function", verified)
    bank, wanted = open_bank(tmp_path, calibration), want("Q4_0", (0, 2), (1,))
    outcome = compensate(source, calibration, wanted, corpus, bank, 1)
    assert outcome.is_complete
    assert outcome.compensated + outcome.plain == 3
    assert all(bank.get(0, p, 1, "Q4_0") is None for p in PROJECTIONS)
    assert len(contents(bank, want("Q4_0", (2,), (1,)))) == 3


def test_inputs_are_the_decoders(tmp_path: Path) -> None:
    """With a shared expert, and experts that no token reaches."""
    directory = open_checkpoint(save_moe(random_moe("Qwen2Moe", num_experts_per_tok=1), tmp_path / "hf"))
    source = open_checkpoint(write_f32(directory, tmp_path / "f32.gguf"))
    corpus, decoder = load_corpus(directory, tokens=64, ctx=32), Decoder(source)
    spool = captured(source, corpus, tmp_path / "states", 1, None)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["spool"]  # a GGUF needs no copy
    hidden, every = decoder.embed(corpus.rows), np.arange(64)
    for layer in (0, 1):
        decoder.attention(layer, hidden)
        flat = hidden.flatten(0, 1).clone()
        expected = decoder.route(layer, flat)
        routing = Routing(LayerRows(spool, layer, 64, 0))
        np.testing.assert_array_equal(routing.experts, expected.experts)
        assert len(np.unique(routing.experts)) < source.info.n_expert
        np.testing.assert_allclose(routing.weights, expected.weights, rtol=1e-2)
        x, wanted = routing.rows.inputs(every, every * 0), decoder.norm(flat, decoder.ffn_norm(layer))
        assert float((x - wanted).norm()) < 5e-3 * float(wanted.norm())
        decoder.feed_forward(layer, hidden)


def test_block_output_is_closer_on_other_text(
    source: Checkpoint, corpus: Corpus, calibration: Calibration, tmp_path: Path
) -> None:
    """The whole block of a layer in Q2_K, on text that the Hessians have not seen."""
    wanted = want("Q2_K", (0,), range(source.info.n_expert))
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
            blocks = self.bank.get(layer, p, expert, "Q2_K")
            if self.how == "plain":
                blocks = quantize_rows(weights, "Q2_K", np.ones(cols, dtype=np.float32), 1)
            assert blocks is not None
            found.append(torch.from_numpy(dequantize_rows(blocks, "Q2_K", cols, rows)))
        return type(exact)(*found)


@pytest.fixture(scope="module")
def spool(source: Checkpoint, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Spool:
    return captured(source, corpus, tmp_path_factory.mktemp("states"), 2, None)


def test_hessians_add_up(source: Checkpoint, corpus: Corpus, spool: Spool) -> None:
    routing = Routing(LayerRows(spool, 0, corpus.n_tokens, 0))
    function = routing.rows.function
    assert function is not None
    held_out = held_out_tokens(*corpus.rows.shape)
    assert int(held_out.sum()) == corpus.n_tokens // 8
    used, decoder = torch.nonzero(~held_out)[:, 0], Decoder(source)
    for number in range(source.info.n_expert):
        expert, tokens = (
            read_expert(source, 0, number, function),
            HessianTokens.routed(routing, number, held_out),
        )
        more = HessianTokens.enough(routing, number, 100_000, held_out)  # more than there are
        assert len(set(more.index.tolist())) == len(more.index)
        assert set(more.index.tolist()) == set(tokens.index.tolist()) | set(used.tolist())
        assert (more.index[: more.n_routed] == tokens.index).all()
        assert float(more.weights[more.n_routed :].max()) < 0.2
        collector = Collector(expert, True, True)
        collect(expert, routing, more, collector)
        x = routing.rows.inputs(more.index, more.slots)
        hidden = decoder.expert(0, number).hidden(x)
        for values, is_down in ((x, False), (hidden, True)):
            weighted, inputs = (values * more.weights[:, None]).double(), collector.inputs(is_down)
            assert len(inputs.held_out) == min(int(tokens.held_out.sum()), 512) > 0
            kept_aside = weighted[more.held_out][:512].float()
            torch.testing.assert_close(inputs.held_out, kept_aside, rtol=1e-4, atol=1e-4)
            assert inputs.n_tokens == len(used)
            kept = weighted[~more.held_out]
            scale = float(kept.square().sum())
            assert float((inputs.hessian - kept.T @ kept).abs().max()) < 1e-5 * scale


def test_an_expert_with_enough_tokens_has_its_own_alone(corpus: Corpus, spool: Spool) -> None:
    routing = Routing(LayerRows(spool, 0, corpus.n_tokens, 0))
    held_out = held_out_tokens(*corpus.rows.shape)
    own = HessianTokens.routed(routing, 2, held_out)
    assert len(own.index) == len(HessianTokens.enough(routing, 2, 1, held_out).index)
    wanted = len(own.index) // 4 + 10  # columns, of which each needs four tokens
    more = HessianTokens.enough(routing, 2, wanted, held_out)
    assert len(more.index) == 4 * wanted
    assert not more.held_out[own.n_routed :].any()


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
