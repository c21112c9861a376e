"""The decoder forward against transformers and the runtime, the other implementations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_gguf import Llama
from mc_gguf.common.errors import SourceError
from mc_gguf.runtime import Runtime
from mc_gguf.source import Checkpoint, open_checkpoint
from mc_gguf.source import decoder as forward
from mc_gguf.source.architecture import ARCHITECTURES
from mc_gguf.source.decoder import Decoder, RouterOutput
from tests.support.moe_directories import CONFIGS, random_moe, save_moe, write_f32
from tests.support.small_models import MemoryCheckpoint, random_mixtral, tiny_mixtral


def logits(decoder: Decoder, rows: Any) -> torch.Tensor:
    hidden = decoder.embed(rows)
    for layer in range(decoder.checkpoint.info.n_layer):
        decoder.attention(layer, hidden)
        decoder.feed_forward(layer, hidden)
    return decoder.logits(hidden)


def reference(model: Any, rows: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(torch.from_numpy(rows).long()).logits)


def random_rows(n_vocab: int, shape: tuple[int, int]) -> Any:
    return np.random.default_rng(0).integers(0, n_vocab, shape).astype(np.int32)


def test_logits_equal_transformers_on_the_trained_model() -> None:
    model = tiny_mixtral()
    rows = random_rows(4096, (3, 200))
    difference = logits(Decoder(MemoryCheckpoint(model)), rows) - reference(model, rows)
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(("experts", "used"), [(5, 3), (8, 2), (4, 1), (3, 3)])
def test_logits_equal_transformers_for_other_expert_counts(experts: int, used: int) -> None:
    model = random_mixtral(num_local_experts=experts, num_experts_per_tok=used)
    rows = random_rows(96, (2, 40))
    expected = reference(model, rows)
    difference = logits(Decoder(MemoryCheckpoint(model)), rows) - expected
    assert difference.abs().max() < 1e-4 * expected.abs().max()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, rows = Decoder(MemoryCheckpoint(random_mixtral())), random_rows(96, (5, 16))
    whole = logits(decoder, rows)
    monkeypatch.setattr(forward, "CHUNK", 7)
    torch.testing.assert_close(logits(decoder, rows), whole, rtol=1e-4, atol=1e-4)


def test_routing_is_sorted_and_normalised() -> None:
    decoder = Decoder(MemoryCheckpoint(random_mixtral()))
    routing = decoder.route(0, torch.randn(30, 64))
    assert routing.experts.shape == (30, 3)
    assert (routing.probs.diff(dim=1) <= 0).all()
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(30))
    torch.testing.assert_close(routing.all_probs.gather(1, routing.experts), routing.probs)


def test_linear_rope_scaling_halves_the_angles() -> None:
    checkpoint = MemoryCheckpoint(random_mixtral())
    plain = Decoder(checkpoint)._rotation(9)
    checkpoint.hparams = {**checkpoint.hparams, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    scaled = Decoder(checkpoint)._rotation(17)
    torch.testing.assert_close(scaled[0][::2], plain[0])


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "yarn"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"attention.head_count": None}, "attention.head_count"),
        ({"attention.head_count_kv": [2, 4]}, "attention.head_count_kv"),
    ],
)
def test_unsupported_models_are_refused(hparams: dict[str, Any], message: str) -> None:
    checkpoint = MemoryCheckpoint(random_mixtral())
    checkpoint.hparams = {k: v for k, v in {**checkpoint.hparams, **hparams}.items() if v is not None}
    with pytest.raises(SourceError, match=message):
        Decoder(checkpoint)


def test_other_architectures_are_refused_by_name() -> None:
    checkpoint = MemoryCheckpoint(random_mixtral())
    checkpoint.info = replace(checkpoint.info, architecture="deepseek2")
    with pytest.raises(SourceError, match=r"llama, .*, with experts, not 'deepseek2'"):
        Decoder(checkpoint)


def test_token_outside_the_vocabulary_is_refused() -> None:
    decoder = Decoder(MemoryCheckpoint(random_mixtral()))
    with pytest.raises(SourceError, match="vocabulary of 96"):
        decoder.embed(np.array([[96]], dtype=np.int32))


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of two models' next tokens, nats."""
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (expected, found))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="module", params=list(CONFIGS))
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    """A random model of 64 experts, top-8, as transformers has it and as its directory is read."""
    model = random_moe(request.param)
    return model, open_checkpoint(save_moe(model, tmp_path_factory.mktemp(request.param)))


def test_logits_equal_transformers_for_every_architecture(moe: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = moe
    rows = random_rows(4096, (3, 50))
    difference = logits(Decoder(checkpoint), rows) - reference(model, rows)
    assert difference.abs().max() < 1e-4


@pytest.mark.native
def test_logits_equal_the_runtime_s_for_every_architecture(
    moe: tuple[Any, Checkpoint], runtime: Runtime, tmp_path: Path
) -> None:
    """Up to the F16 cache of keys and values. Each entry of ARCHITECTURES counts: changed, it is far off."""
    decoder, rows = Decoder(moe[1]), random_rows(4096, (1, 60))
    llm = Llama(write_f32(moe[1], tmp_path / "m.gguf"), n_ctx=64, n_batch=64, logits_all=True, n_threads=1)
    llm.eval(rows[0].tolist())
    expected = torch.from_numpy(np.array(llm.scores[: rows.size]))[None]
    llm.close()
    assert kl(expected, logits(decoder, rows)) < 1e-4
    right = decoder.shape.architecture
    for wrong in (replace(right, neox=not right.neox), replace(right, renormalise=not right.renormalise)):
        decoder.shape = replace(decoder.shape, architecture=wrong)
        assert kl(expected, logits(decoder, rows)) > 0.01


def test_routing_weights_are_normalised_where_the_architecture_says_so() -> None:
    probs = torch.tensor([[0.3, 0.2, 0.0]])
    decoder = Decoder(MemoryCheckpoint(random_mixtral()))
    torch.testing.assert_close(decoder.weights(probs), torch.tensor([[0.6, 0.4, 0.0]]))
    decoder.shape = replace(decoder.shape, architecture=ARCHITECTURES["olmoe"])
    torch.testing.assert_close(decoder.weights(probs), probs)


# What the models' authors do; llama.cpp's graphs agree.
RENORMALISES = {"Qwen3Moe": True, "Mixtral": True, "Olmoe": False, "Qwen2Moe": False}


def router_output(decoder: Decoder) -> RouterOutput:
    hidden = decoder.embed(random_rows(4096, (2, 40)))
    decoder.attention(0, hidden)
    return decoder.route(0, hidden.flatten(0, 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_nearest_tokens_have_the_weight_of_the_last_place(name: str, tmp_path: Path) -> None:
    """Against the definition, spelled out for one token after another."""
    decoder = Decoder(open_checkpoint(save_moe(random_moe(name), tmp_path)))
    output, expert = router_output(decoder), 5
    routed = output.tokens_of(expert)
    assert 0 < len(routed) < 80
    found = decoder.nearest_tokens(output, expert, 12)
    assert not set(found.index.tolist()) & set(routed.index.tolist())
    others = sorted(set(range(80)) - set(routed.index.tolist()), key=lambda t: -output.all_probs[t, expert])
    assert set(found.index.tolist()) == set(others[:12])
    for token, prob, weight in zip(found.index, found.probs, found.weights, strict=True):
        chosen = [float(output.all_probs[token, e]) for e in (*output.experts[token, :-1], expert)]
        assert float(prob) == pytest.approx(chosen[-1])
        expected = chosen[-1] / sum(chosen) if RENORMALISES[name] else chosen[-1]
        assert float(weight) == pytest.approx(expected, rel=1e-5)


def test_nearest_tokens_are_not_those_that_are_excluded() -> None:
    decoder = Decoder(MemoryCheckpoint(random_mixtral()))
    output = decoder.route(0, torch.randn(30, 64))
    excluded = torch.arange(30) % 2 == 0
    found = decoder.nearest_tokens(output, 2, 100, excluded)  # more than there are
    routed = set(output.tokens_of(2).index.tolist())
    assert set(found.index.tolist()) == set(range(1, 30, 2)) - routed
    assert (found.probs.diff() <= 0).all()
