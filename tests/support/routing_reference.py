"""Dynamic expert routing on a whole Mixtral in float64 torch: the second implementation.

It reads the Hugging Face weights and uses rotate-half rotary embedding, attention over a list of past keys,
and a loop over experts. What to drop follows from the definitions in patches/src/include (mc.h,
ggml-mc-routing.h). It follows the runtime only where its own decision is a near tie, so that one slot that
rounding decides does not make everything after it another computation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from mc_gguf.routing.params import RoutingParams
from tests.support.eval_capture import Batch, Decision


@dataclass(frozen=True, eq=False)
class Tokens:
    """The rows of a MoE block: their sequences and positions [R]; received [R] is the mean attention that
    their keys receive from the queries of this ubatch, and queries [R] the number of those queries, which are
    at or after the token.
    """

    sequences: Tensor
    positions: Tensor
    received: Tensor
    queries: Tensor


@dataclass(frozen=True, eq=False)
class Routed:
    """The decisions of one layer in one ubatch, R rows, K experts each, best first.

    Arrays [R, K]: experts int64; weights; below, where the policy alone would drop the slot; dropped; near,
    where rounding may turn the decision. Arrays [R]: near_experts, where rounding may turn the selection or
    its order; importance; received, the mean attention that the row's key receives.
    """

    experts: Tensor
    weights: Tensor
    below: Tensor
    dropped: Tensor
    near: Tensor
    near_experts: Tensor
    importance: Tensor
    received: Tensor


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights in float64 by their Hugging Face names, and the configuration."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    return weights, json.loads((folder / "config.json").read_text())


class Reference:
    """One model and the keys and values of all tokens that it has seen.

    `near` is the relative distance to another decision below which rounding may decide.
    """

    def __init__(
        self, weights: dict[str, Tensor], config: dict[str, Any], routing: RoutingParams, near: float = 1e-4
    ) -> None:
        self._weights, self.config, self.routing, self.near = weights, config, routing, near
        self.n_layer: int = self.config["num_hidden_layers"]
        self.n_expert: int = self.config["num_local_experts"]
        self.n_used: int = self.config["num_experts_per_tok"]
        self.head_dim: int = self.config["head_dim"]
        self._sequences = torch.empty(0, dtype=torch.int64)  # of all tokens seen, as the next two
        self._positions = torch.empty(0, dtype=torch.int64)
        nothing = torch.empty(self.config["num_key_value_heads"], 0, self.head_dim, dtype=torch.float64)
        self._cache = [(nothing, nothing)] * self.n_layer

    def remove(self, sequence: int, start: int) -> None:
        """Forget a sequence's positions from `start` on."""
        left = ~((self._sequences == sequence) & (self._positions >= start))
        self._sequences, self._positions = self._sequences[left], self._positions[left]
        self._cache = [(keys[:, left], values[:, left]) for keys, values in self._cache]

    @torch.inference_mode()
    def decode(self, batch: Batch, found: Sequence[Decision]) -> tuple[Tensor, list[Routed]]:
        """Compute one ubatch. Returns the logits of the wanted tokens [n_wanted, n_vocab], and the decisions
        by layer; `found` are the runtime's decisions, which are followed at near ties.
        """
        sequences, positions = torch.from_numpy(batch.sequences), torch.from_numpy(batch.positions)
        self._sequences = torch.cat((self._sequences, sequences))
        self._positions = torch.cat((self._positions, positions))
        # visible[q, k]: query q of this ubatch sees key k of all
        visible = (sequences[:, None] == self._sequences) & (positions[:, None] >= self._positions)

        hidden = self._weights["model.embed_tokens.weight"][torch.from_numpy(batch.tokens)]
        decisions = []
        for layer in range(self.n_layer):
            attended, received = self._attention(layer, hidden, positions, visible)
            hidden = hidden + attended
            rows = torch.arange(len(sequences))
            if layer == self.n_layer - 1:  # nobody needs the others
                rows = torch.from_numpy(np.flatnonzero(batch.wanted))
                hidden = hidden[rows]
            x = self._norm(hidden, f"model.layers.{layer}.post_attention_layernorm")
            queries = visible[:, -len(sequences) :].sum(0)
            tokens = Tokens(sequences[rows], positions[rows], received[rows], queries[rows])
            decision = self._route(layer, x, tokens, found[layer])
            hidden = hidden + self._experts(layer, x, decision)
            decisions.append(decision)
        return self._norm(hidden, "model.norm") @ self._weights["lm_head.weight"].T, decisions

    def _attention(
        self, layer: int, hidden: Tensor, positions: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The block's output [n, n_embd], and the mean attention [n] that each token's key receives from the
        queries of the ubatch that see it.
        """
        n, name = len(hidden), f"model.layers.{layer}.self_attn"
        x = self._norm(hidden, f"model.layers.{layer}.input_layernorm")
        queries, keys, values = (
            (x @ self._weights[f"{name}.{part}_proj.weight"].T).view(n, -1, self.head_dim).transpose(0, 1)
            for part in "qkv"
        )
        past_keys, past_values = self._cache[layer]
        keys = torch.cat((past_keys, self._rotate(keys, positions)), dim=1)
        values = torch.cat((past_values, values), dim=1)
        self._cache[layer] = keys, values

        shared = len(queries) // len(keys)
        scores = self._rotate(queries, positions) @ keys.repeat_interleave(shared, 0).transpose(1, 2)
        probs = (scores / math.sqrt(self.head_dim)).masked_fill(~visible, -math.inf).softmax(-1)
        mixed = (probs @ values.repeat_interleave(shared, 0)).transpose(0, 1).flatten(1)
        received = probs[:, :, -n:].mean(0).sum(0) / visible[:, -n:].sum(0)
        return mixed @ self._weights[f"{name}.o_proj.weight"].T, received

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of [heads, n, head_dim] with the halves rotated against each other."""
        frequency = self.config["rope_theta"] ** -(torch.arange(0, self.head_dim, 2).double() / self.head_dim)
        angle = torch.outer(positions.double(), frequency)
        cos, sin = angle.cos(), angle.sin()
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def _route(self, layer: int, x: Tensor, tokens: Tokens, found: Decision) -> Routed:
        router = self._weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        probs = (x @ router.T).softmax(-1)
        ranked, experts = probs.sort(dim=-1, descending=True)
        near_experts = self._near(ranked[:, : self.n_used], ranked[:, 1 : self.n_used + 1]).any(-1)
        experts = experts[:, : self.n_used]
        experts = torch.where(near_experts[:, None], torch.from_numpy(found.experts).long(), experts)
        weights = probs.gather(-1, experts)

        importance = measure(x, tokens, self.routing.importance)
        below, near = self._below(layer, weights, tokens.positions)
        safe, near_safe = self._protected(importance, tokens.sequences)
        near = near | (below & near_safe[:, None])
        dropped = torch.where(near, torch.from_numpy(found.routed == self.n_expert), below & ~safe[:, None])
        return Routed(experts, weights, below, dropped, near, near_experts, importance, tokens.received)

    def _below(self, layer: int, weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The slots [R, K], by rank, that the policy alone drops, and those that rounding may turn."""
        routing, rank, first = self.routing, torch.arange(self.n_used), weights[:, :1]
        may_drop = (rank > 0).expand(weights.shape)
        if routing.active is not None and not routing.active[layer]:
            may_drop = torch.zeros_like(may_drop)
        if routing.policy in ("odp", "threshold"):
            assert routing.thresholds is not None
            value, limit = weights, torch.from_numpy(routing.thresholds)[layer].double() * first
        elif routing.policy == "keep_min":
            may_drop = may_drop & (rank >= routing.keep_min)
            value, limit = weights, float32(routing.ratio) * first
        elif routing.policy == "top_p":  # what the ranks before lack of the share; none: they are enough
            value = float32(routing.top_p) * weights.sum(-1, keepdim=True)
            limit = weights.cumsum(-1) - weights
            return may_drop & (value <= limit), may_drop & self._near(value, limit)
        else:
            assert routing.policy == "random"
            draws = [[uniform(routing.seed, layer, p, r) for r in rank.tolist()] for p in positions.tolist()]
            value = torch.tensor(draws, dtype=torch.float64).view(weights.shape)
            return may_drop & (value < float32(routing.rate)), torch.zeros_like(may_drop)  # exact
        return may_drop & (value < limit), may_drop & self._near(value, limit)

    def _protected(self, importance: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """The ceil(share * n) most important of each sequence's n rows, and those that rounding may turn. The
        only row of a sequence is not protected, unless all rows are.
        """
        share = self.routing.protect if self.routing.policy == "odp" else 0.0
        safe = torch.full(sequences.shape, share == 1)
        near = torch.zeros_like(safe)
        for sequence in set(sequences.tolist()) if 0 < share < 1 else ():
            rows = torch.nonzero(sequences == sequence).flatten()
            if len(rows) == 1:
                continue
            count = math.ceil(Fraction(str(share)) * len(rows))  # of the decimal number: 0.07 * 100 is 7
            value, order = importance[rows].sort(descending=True)
            safe[rows[order[:count]]] = True
            if count < len(rows):  # the other side of the border is within reach
                across = torch.where(safe[rows], value[count], value[count - 1])
                near[rows] = self._near(importance[rows], across)
        return safe, near

    def _near(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs() <= self.near * torch.maximum(a.abs(), b.abs())

    def _experts(self, layer: int, x: Tensor, decision: Routed) -> Tensor:
        """Mixtral renormalises the weights of the experts that are left to a sum of 1."""
        kept = decision.weights * ~decision.dropped
        kept = kept / kept.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(self.n_expert):
            w1, w2, w3 = (
                self._weights[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{i}.weight"]
                for i in (1, 2, 3)
            )
            rows, slots = torch.nonzero((decision.experts == expert) & ~decision.dropped, as_tuple=True)
            y = (F.silu(x[rows] @ w1.T) * (x[rows] @ w3.T)) @ w2.T
            out.index_add_(0, rows, y * kept[rows, slots, None])
        return out


def measure(x: Tensor, tokens: Tokens, name: str) -> Tensor:
    """Importance [R] of the rows of a MoE block's input x [R, n_embd]."""
    norm, mean = x.abs().sum(-1), x.mean(-1)
    centred = x - mean[:, None]
    variance = (centred**2).mean(-1)
    return {
        "attention": norm * tokens.received,
        "l1": norm,
        "mean": mean,
        "variance": variance,
        "kurtosis": (centred**4).mean(-1) / variance**2,
        "last": norm / tokens.queries,
    }[name]


def splitmix64(state: int) -> int:
    """The next number of the generator in this state."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def uniform(seed: int, layer: int, position: int, rank: int) -> float:
    """A slot's number in [0, 1): the top 53 bits of splitmix64 over the parts of its name, one by one."""
    z = 0
    for part in (seed, layer, position, rank):
        z = splitmix64(z ^ part)
    return float(z >> 11) * 2.0**-53


def float32(value: float) -> float:
    """The value as the runtime's parameters hold it."""
    return float(np.float32(value))


def ubatches(batch: Batch, n_ubatch: int, unified: bool) -> Iterator[NDArray[np.int64]]:
    """Which tokens of a batch go into each ubatch, in its order.

    With one KV cache for all sequences, tokens go as they come. Otherwise a ubatch takes the same number of
    tokens from each of the sequences with neighbouring numbers, one sequence after another.
    """
    if unified:
        yield from np.split(np.arange(len(batch.tokens)), range(n_ubatch, len(batch.tokens), n_ubatch))
        return
    left = np.arange(len(batch.tokens))
    while len(left):
        members: list[int] = []
        for sequence in batch.sequences[left].tolist():
            if not members or sequence == members[-1] + 1:
                members.append(sequence)
        tokens = [left[batch.sequences[left] == sequence] for sequence in members]
        n = min(n_ubatch // len(members), *(len(t) for t in tokens))
        taken = np.concatenate([t[:n] for t in tokens])
        yield taken
        left = np.setdiff1d(left, taken)
