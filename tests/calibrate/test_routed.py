"""Tokens by expert, the nearest tokens of others, and what dropping experts changes, against brute force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mc_gguf.calibrate.routed import Routing

N, E, K = 200, 7, 3
# How a router makes weights of its numbers: probabilities of all experts, left alone or made to sum up to a
# number, or logits with a softmax over the selected experts.
KINDS = ["plain", "scaled", "renormalised", "renormalised and scaled", "logits"]

Doubles = NDArray[np.float64]


def softmax(x: Doubles) -> Doubles:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def weights_of(kind: str, selected: Doubles) -> Doubles:
    """[..., K] weights of experts for which the router's numbers are `selected`."""
    if kind == "logits":
        return softmax(selected)
    scale = 2.5 if "scaled" in kind else 1.0
    sums = selected.sum(-1, keepdims=True) if "renormalised" in kind else 1.0
    return np.asarray(selected / sums * scale)


def numbers(kind: str, n_expert: int = E, k: int = K, seed: int = 0) -> tuple[Doubles, NDArray[np.int32]]:
    """The router's numbers [N, E], exact in float16, and the selected experts [N, k] in no order."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((N, n_expert)) * 1.5
    router = (logits if kind == "logits" else softmax(logits)).astype(np.float16).astype(np.float64)
    experts = np.argsort(-router, axis=1)[:, :k].astype(np.int32)
    return router, rng.permuted(experts, axis=1)


def routing(kind: str, n_expert: int = E, k: int = K) -> tuple[Routing, Doubles]:
    """A router's tokens as a spool has them, and its numbers."""
    router, experts = numbers(kind, n_expert, k)
    selected = np.take_along_axis(router, experts, axis=1)
    weights = weights_of(kind, selected)
    rows: Any = SimpleNamespace(
        experts=experts,
        probs=(weights if kind == "logits" else selected).astype(np.float32),
        weights=weights.astype(np.float32),
        router=router.astype(np.float16),
        has_weighted_input=False,
    )
    return Routing(rows), router


@pytest.mark.parametrize("kind", KINDS)
def test_whether_a_model_renormalises_is_seen_in_its_weights(kind: str) -> None:
    expected = kind not in ("plain", "scaled")
    assert routing(kind)[0].renormalises == expected
    assert routing(kind, k=1)[0].renormalises == expected


def test_weighted_inputs_are_not_renormalised() -> None:
    found, _ = routing("plain")
    found.rows.has_weighted_input = True  # type: ignore[misc]
    found.weights[:] = 1
    assert not found.renormalises


def test_tokens_of_every_expert() -> None:
    found, _ = routing("renormalised", n_expert=12)
    for expert in range(12):
        tokens = found.tokens_of(expert)
        pairs = [(t, s) for t in range(N) for s in range(K) if found.experts[t, s] == expert]
        assert [*zip(tokens.index.tolist(), tokens.slots.tolist(), strict=True)] == pairs
        assert len(tokens) == len(pairs)
        assert tokens.probs.tolist() == [found.probs[p] for p in pairs]
        assert tokens.weights.tolist() == [found.weights[p] for p in pairs]
    assert len(found.tokens_of(500)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_excluded", [0, 50])
@pytest.mark.parametrize("k", [1, K])
def test_nearest_tokens_are_those_of_brute_force(kind: str, n_excluded: int, k: int) -> None:
    found, router = routing(kind, k=k)
    excluded = np.zeros(N, dtype=bool)
    excluded[np.random.default_rng(1).permutation(N)[:n_excluded]] = True
    for expert in range(E):
        own = set(found.tokens_of(expert).index.tolist())
        others = [t for t in range(N) if t not in own and not excluded[t]]
        expected = sorted(others, key=lambda t: -router[t, expert])
        for count in (10, N):
            nearest = found.nearest(expert, count, excluded if n_excluded else None)
            assert nearest.index.tolist() == expected[:count]
        for place, token in enumerate(expected):
            slot = int(nearest.slots[place])
            selected = router[token, found.experts[token]]
            assert selected[slot] == selected.min()
            selected[slot] = router[token, expert]  # it takes the place of the last one
            weight = weights_of(kind, selected)[slot]
            assert nearest.weights[place] == pytest.approx(weight, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_those_of_brute_force(kind: str) -> None:
    found, _ = routing(kind)
    thresholds = np.array([0.6, 0.3])
    changes = found.changes(thresholds)
    assert changes.shape == (N, K)
    n_dropped = 0
    for token in range(N):
        probs = found.probs[token]
        order = np.argsort(-probs, kind="stable")
        kept = {int(order[0])} | {
            int(s) for rank, s in enumerate(order[1:]) if probs[s] >= thresholds[rank] * probs[order[0]]
        }
        n_dropped += K - len(kept)
        for slot in range(K):
            before = probs[slot] / probs.sum() if found.renormalises else probs[slot]
            total = sum(probs[s] for s in kept)
            after = (probs[slot] / total if found.renormalises else probs[slot]) * (slot in kept)
            assert changes[token, slot] == pytest.approx(after / before - 1, abs=1e-12)
    assert 0 < n_dropped < N * K
    assert (found.changes(np.zeros(K - 1)) == 0).all()


def test_one_expert_a_token_is_never_dropped() -> None:
    found, _ = routing("renormalised", k=1)
    assert (found.changes(np.zeros(0)) == 0).all()
    assert found.sorted_probs.shape == (N, 1)


def test_probabilities_are_sorted_within_each_token() -> None:
    found, _ = routing("plain")
    assert (np.diff(found.sorted_probs, axis=1) <= 0).all()
    np.testing.assert_array_equal(np.sort(found.sorted_probs, axis=1), np.sort(found.probs, axis=1))


def test_weights_of_zero_tell_nothing() -> None:
    """Experts whose probability underflows, and tokens without any."""
    rows: Any = SimpleNamespace(
        experts=np.array([[0, 1], [1, 2]], np.int32),
        probs=np.zeros((2, 2), np.float32),
        weights=np.zeros((2, 2), np.float32),
        router=np.zeros((2, 3), np.float16),
        has_weighted_input=False,
    )
    found = Routing(rows)
    assert not found.renormalises
    assert np.isfinite(found.nearest(2, 5).weights).all()
    assert np.isfinite(found.changes(np.array([0.5]))).all()
