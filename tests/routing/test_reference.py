"""The runtime's routing decisions, slot by slot, against the torch implementation on the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mc_gguf.routing.params import IMPORTANCES, RoutingParams
from tests.support import WIKITEXT
from tests.support.eval_capture import Batch, Context, Decision
from tests.support.routing_reference import Reference, Routed, load, splitmix64, ubatches, uniform

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]
N_LAYER = 6
# llama.cpp's flash attention rounds keys and values to F16 whatever the cache holds.
NEAR_FLASH = 1e-2
Step = Batch | tuple[int, int]  # decode, or remove (sequence, start)
Weights = tuple[dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> Weights:
    return load(tiny_model)


@pytest.fixture(scope="module")
def text(tiny_model: Path) -> NDArray[np.int64]:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    return np.array(tokenizer.encode(WIKITEXT.read_text()[:20_000]).ids)


def thresholds(*by_rank: float) -> NDArray[np.float32]:
    """For every layer the same, from rank 1 on."""
    return np.tile(np.array([0.0, *by_rank], dtype=np.float32), (N_LAYER, 1))


ODP = RoutingParams("odp", thresholds=thresholds(0.6), protect=0.1)
EVERYTHING_BELOW = RoutingParams("odp", thresholds=thresholds(2.0), protect=0.5)


def batch_of(text: NDArray[np.int64], *parts: tuple[int, int, int], last_only: bool = False) -> Batch:
    """Tokens of sequences as (sequence, first position, n), one after another; each sequence reads another
    piece of the text. Logits of all tokens, or of each part's last."""
    sequences = np.concatenate([np.full(n, sequence) for sequence, _, n in parts])
    positions = np.concatenate([np.arange(first, first + n) for _, first, n in parts])
    ends = np.cumsum([n for _, _, n in parts]) - 1
    wanted = np.isin(np.arange(len(positions)), ends) if last_only else np.ones(len(positions), dtype=bool)
    return Batch(text[1000 * sequences + positions], positions, sequences, wanted)


def pick(batch: Batch, tokens: NDArray[np.int64]) -> Batch:
    return Batch(batch.tokens[tokens], batch.positions[tokens], batch.sequences[tokens], batch.wanted[tokens])


@dataclass
class Agreement:
    """What was compared: slots, near ties among them, largest relative errors (of the logits: absolute).

    by_layer [n_layer, 3, n_rank]: slots kept, dropped, protected; experts [n_layer, 2, n_expert]: ubatches
    that would use an expert, that do.
    """

    by_layer: NDArray[np.int64]
    experts: NDArray[np.int64]
    n_slots: int = 0
    n_near: int = 0
    importance: float = 0.0
    received: float = 0.0
    received_first: float = 0.0  # in layer 0, which flash attention's rounding does not reach
    logits: float = 0.0

    def add(self, layer: int, found: Decision, expected: Routed, n_expert: int) -> None:
        """One layer of one ubatch; fails where a decision differs that is no near tie."""
        dropped = found.routed == n_expert
        np.testing.assert_array_equal(found.experts, expected.experts, f"selection in layer {layer}")
        np.testing.assert_array_equal(dropped, expected.dropped, f"decisions in layer {layer}")
        np.testing.assert_array_equal(found.routed[~dropped], found.experts[~dropped])
        if found.importance is not None:
            self.importance = max(self.importance, relative(found.importance, expected.importance))
        if found.received is not None and len(found.received) == len(expected.received):
            error = relative(found.received, expected.received)
            self.received = max(self.received, error)
            self.received_first = max(self.received_first, error if layer == 0 else 0.0)

        near = expected.near | expected.near_experts[:, None]
        self.n_slots += near.numel()
        self.n_near += int(near.sum())
        below = expected.below.numpy()
        self.by_layer[layer] += np.stack([(~dropped).sum(0), dropped.sum(0), (below & ~dropped).sum(0)])
        for row, used in enumerate((found.experts, found.routed)):
            self.experts[layer, row] += np.isin(np.arange(n_expert), used)


def relative(found: NDArray[np.float32], expected: torch.Tensor) -> float:
    """Largest relative difference."""
    wanted = expected.numpy()
    return float((np.abs(found - wanted) / np.abs(wanted)).max(initial=0.0))


def compare(context: Context, reference: Reference, steps: Sequence[Step]) -> Agreement:
    """Runs the steps in both; fails where they differ, and where the counters are not the sums."""
    agreement = Agreement(
        np.zeros((reference.n_layer, 3, reference.n_used), dtype=np.int64),
        np.zeros((reference.n_layer, 2, reference.n_expert), dtype=np.int64),
    )
    context.set_routing(reference.routing)
    for step in steps:
        if not isinstance(step, Batch):
            context.remove(*step)
            reference.remove(*step)
            continue
        logits, found = context.decode(step)
        parts = list(ubatches(step, context.n_ubatch, context.unified))
        assert len(found) == len(parts), "llama.cpp split the batch in another way"
        places = np.cumsum(step.wanted) - 1  # of a token's logits
        for tokens, decisions in zip(parts, found, strict=True):
            expected_logits, expected = reference.decode(pick(step, tokens), decisions)
            for layer, pair in enumerate(zip(decisions, expected, strict=True)):
                agreement.add(layer, *pair, reference.n_expert)
            error = np.abs(logits[places[tokens[step.wanted[tokens]]]] - expected_logits.numpy())
            agreement.logits = max(agreement.logits, error.max(initial=0.0))
    slots, experts = context.counters()
    np.testing.assert_array_equal(slots[:, :2], agreement.by_layer[:, :2])
    np.testing.assert_array_equal(experts, agreement.experts)
    # a near tie of a protected token may be below the threshold for one and not for the other
    assert np.abs(slots[:, 2] - agreement.by_layer[:, 2]).sum() <= agreement.n_near
    check_rounding(agreement, reference, context.flash_attention)
    return agreement


def check_rounding(agreement: Agreement, reference: Reference, flash_attention: bool) -> None:
    """The bounds hold with room: 1 in 1000 slots is a near tie, 1 in 30 with flash attention."""
    assert agreement.n_near <= (0.06 if flash_attention else 0.004) * agreement.n_slots + 4
    assert agreement.logits <= (5e-2 if flash_attention else 5e-4)
    if reference.routing.importance != "mean":  # a difference of large numbers
        assert agreement.importance <= (2e-2 if flash_attention else 1e-3)


def near(flash_attention: bool) -> float:
    return NEAR_FLASH if flash_attention else 1e-4


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("n_ubatch", [512, 64])
def test_importance_measures(
    tiny_f32: Path, weights: Weights, text: NDArray[np.int64], n_ubatch: int, flash_attention: bool
) -> None:
    """Prefill in one ubatch and in several, then decode."""
    decode = [batch_of(text, (0, 300 + i, 1)) for i in range(6)]
    steps: list[Step] = [batch_of(text, (0, 0, 300)), *decode, (0, 0)]
    measures = ("attention", "last") if flash_attention else IMPORTANCES
    protected = set()
    with Context(tiny_f32, n_ubatch=n_ubatch, flash_attention=flash_attention) as context:
        for importance in measures:
            routing = replace(ODP, importance=importance)
            agreement = compare(context, Reference(*weights, routing, near(flash_attention)), steps)
            _, dropped, kept_by_protection = agreement.by_layer.sum((0, 2))
            assert dropped > 1000
            assert kept_by_protection > 100
            if importance == "attention":
                assert 0 < agreement.received_first < 1e-4  # exact with flash attention too
            protected.add(agreement.by_layer[:, 2].tobytes())
    assert len(protected) == len(measures)  # each measure protects others


FOUR = np.random.default_rng(0).uniform(0.2, 0.9, (N_LAYER, 4)).astype(np.float32)  # by layer and rank
POLICIES = {
    "threshold": (RoutingParams("threshold", thresholds=thresholds(0.5)), 2),
    "threshold, 4 ranks": (RoutingParams("threshold", thresholds=FOUR), 4),
    "odp, 4 ranks": (RoutingParams("odp", thresholds=FOUR, protect=0.25), 4),
    "odp, some layers": (replace(ODP, active=np.array([1, 0, 1, 1, 0, 0], dtype=bool)), 2),
    "odp, nothing protected": (replace(ODP, protect=0.0), 2),
    "odp, all protected": (replace(ODP, protect=1.0), 2),
    "odp, ceil of 7": (replace(ODP, protect=0.07), 2),  # 0.07 * 100 is a little more than 7
    "keep_min": (RoutingParams("keep_min", ratio=0.45), 2),
    "keep_min 2 of 4": (RoutingParams("keep_min", ratio=0.35, keep_min=2), 4),
    "top_p": (RoutingParams("top_p", top_p=0.6), 2),
    "top_p, 4 ranks": (RoutingParams("top_p", top_p=0.8), 4),
    "random": (RoutingParams("random", rate=0.3, seed=1), 2),
    "random, 4 ranks": (RoutingParams("random", rate=0.4, seed=2**32 - 5), 4),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies(tiny_f32: Path, weights: Weights, text: NDArray[np.int64], name: str) -> None:
    routing, n_used = POLICIES[name]
    steps = [batch_of(text, (0, 0, 100)), *(batch_of(text, (0, 100 + i, 1)) for i in range(6))]
    config = weights[1] | {"num_experts_per_tok": n_used}
    with Context(tiny_f32, n_used=n_used) as context:
        agreement = compare(context, Reference(weights[0], config, routing), steps)
    kept, dropped, protected = agreement.by_layer.sum(0)
    assert (kept + dropped == 106 * N_LAYER).all()
    assert dropped[0] == 0
    if routing.policy == "odp" and routing.protect > 0:
        assert protected[1:].all()
    if routing.policy == "random":
        share = dropped[1:].sum() / (106 * N_LAYER * (n_used - 1))
        assert share == pytest.approx(routing.rate, abs=0.05)
    assert dropped[-1] > 0 or routing.protect == 1


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("importance", ["attention", "last"])
def test_several_sequences(
    tiny_f32: Path,
    weights: Weights,
    text: NDArray[np.int64],
    importance: str,
    unified: bool,
    flash_attention: bool,
) -> None:
    """Of different lengths in one batch, one of a single token; then one step of each; then prefill beside
    decode."""
    together = batch_of(text, (0, 0, 70), (1, 0, 41), (2, 0, 1), (3, 0, 90))
    if unified:  # tokens of different sequences in turn
        together = pick(together, np.random.default_rng(0).permutation(len(together.tokens)))
        together = pick(together, np.argsort(together.positions, kind="stable"))
    steps = [
        together,
        batch_of(text, (0, 70, 1), (1, 41, 1), (2, 1, 1), (3, 90, 1)),
        batch_of(text, (0, 71, 1), (1, 42, 1), (2, 2, 30), (3, 91, 20)),
    ]
    routing = replace(ODP, importance=importance)
    with Context(tiny_f32, n_ubatch=128, unified=unified, flash_attention=flash_attention) as context:
        compare(context, Reference(*weights, routing, near(flash_attention)), steps)


@pytest.mark.parametrize("importance", ["attention", "last", "l1"])
def test_only_some_logits_wanted(
    tiny_f32: Path, weights: Weights, text: NDArray[np.int64], importance: str
) -> None:
    """The last layer's block then has few rows, in some ubatches none, and the protected are of those."""
    last = batch_of(text, (0, 0, 150), (1, 0, 100), last_only=True)
    some = replace(last, wanted=np.arange(250) % 3 == 0)
    routing = replace(ODP, importance=importance, protect=0.3)
    with Context(tiny_f32, n_ubatch=64) as context:
        for batch in (last, some):
            agreement = compare(context, Reference(*weights, routing), [batch, (0, 0), (1, 0)])
            assert agreement.by_layer[-1, :2].sum() == 2 * batch.wanted.sum()


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("unified", [True, False])
def test_cache_with_holes(
    tiny_f32: Path, weights: Weights, text: NDArray[np.int64], unified: bool, flash_attention: bool
) -> None:
    """The cells of a prompt are then in several places of the KV cache."""
    steps: list[Step] = [
        batch_of(text, (0, 0, 60)),
        batch_of(text, (1, 0, 30)),
        (0, 20),
        batch_of(text, (2, 0, 25)),
        (1, 5),
        batch_of(text, (0, 20, 90), (3, 0, 40)),
    ]
    threads = 2 if unified else 1
    with Context(tiny_f32, unified=unified, flash_attention=flash_attention, n_threads=threads) as context:
        compare(context, Reference(*weights, ODP, near(flash_attention)), steps)


@pytest.mark.parametrize("n_sequences", [7, 8])
def test_tokens_of_several_sequences_are_ranked(
    tiny_f32: Path, text: NDArray[np.int64], n_sequences: int
) -> None:
    """Eight tokens that belong to as many sequences are protected as in one sequence."""
    alone = batch_of(text, (0, 0, 8))
    shared = replace(alone, shared={i: tuple(range(1, n_sequences)) for i in range(8)})
    counted = []
    for batch in (alone, shared):
        with Context(tiny_f32, n_seq_max=8) as context:
            context.set_routing(EVERYTHING_BELOW)
            context.decode(batch)
            counted.append(context.counters()[0])
    np.testing.assert_array_equal(counted[0], counted[1])
    assert (counted[0][:, 2, 1] == 4).all()


@pytest.mark.parametrize("flash_attention", [False, True])
def test_attention_received_by_a_shared_prompt(
    tiny_f32: Path, text: NDArray[np.int64], flash_attention: bool
) -> None:
    """Each query's attention sums to 1, so the means times the number of queries sum to their number."""
    whole = batch_of(text, (0, 0, 30), (1, 0, 30), (2, 0, 30))
    batch = pick(whole, np.r_[0:30, 40:60, 70:90])  # of the others only what comes after 10 tokens
    batch = replace(batch, shared={i: (1, 2) for i in range(10)})
    queries = 30.0 - batch.positions
    queries[:10] += 40
    with Context(tiny_f32, n_seq_max=3, flash_attention=flash_attention) as context:
        context.set_routing(EVERYTHING_BELOW)
        for decision in context.decode(batch)[1][0]:
            assert decision.received is not None
            assert (decision.received * queries).sum() == pytest.approx(70, rel=1e-3)


def test_random_numbers_are_splitmix64() -> None:
    first = 0xE220A8397B1DCDAF  # of the generator's reference implementation, seed 0
    assert splitmix64(0) == first
    assert uniform(seed=0, layer=0, position=0, rank=0) != uniform(seed=0, layer=0, position=0, rank=1)
