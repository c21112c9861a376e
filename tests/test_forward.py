"""The decoder forward against transformers' Mixtral, the second implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import MemoryCheckpoint, random_mixtral, tiny_mixtral

from mc_gguf import forward
from mc_gguf.errors import SourceError
from mc_gguf.forward import Decoder


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
    from dataclasses import replace

    checkpoint = MemoryCheckpoint(random_mixtral())
    checkpoint.info = replace(checkpoint.info, architecture="qwen3moe")
    with pytest.raises(SourceError, match="qwen3moe"):
        Decoder(checkpoint)


def test_token_outside_the_vocabulary_is_refused() -> None:
    decoder = Decoder(MemoryCheckpoint(random_mixtral()))
    with pytest.raises(SourceError, match="vocabulary of 96"):
        decoder.embed(np.array([[96]], dtype=np.int32))
