"""The KL divergence of candidates from the unquantized model; they advance through the layers together.

A layer's weights are read once for all candidates, and an expert's matrices once for each type that any
candidate gives them. The hidden states of the incumbent are kept, so that a candidate starts at the first
layer in which it differs. Only experts are quantized: what the other tensors lose is the same in every
candidate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import PROJECTIONS, Floats
from mc_gguf.refine.matrices import Matrices
from mc_gguf.source.decoder import CHUNK, Decoder, Expert, RouterOutput

Ints = NDArray[np.int64]
# So many tokens at once have their log-probabilities (n_vocab floats each) in memory.
LOGIT_TOKENS = 512


@dataclass(frozen=True)
class Assignment:
    """Types of all experts: `columns` [L, E, 3] are indices into `types`; -1 stands for the source's own."""

    types: tuple[str, ...]
    columns: Ints

    def name(self, layer: int, expert: int, projection: int) -> str | None:
        column = int(self.columns[layer, expert, projection])
        return None if column < 0 else self.types[column]

    def first_difference(self, other: Assignment) -> int:
        """The first layer in which the two differ, or the number of layers when they are equal."""
        differs = (self.columns != other.columns).any(axis=(1, 2))
        return int(differs.argmax()) if differs.any() else len(differs)


class Layers:
    """The decoder's layers with the experts of any assignment. All sums over tokens have the same order."""

    def __init__(self, decoder: Decoder, matrices: Matrices) -> None:
        self.decoder, self.matrices = decoder, matrices
        self.n_layer = decoder.checkpoint.info.n_layer

    def expert(self, layer: int, expert: int, names: Mapping[str, str | None]) -> Expert:
        gate, up, down = (self.matrices.get(layer, p, expert, names[p]) for p in PROJECTIONS)
        return Expert(gate, up, down)

    def attend(self, layer: int, hidden: Sequence[Tensor]) -> None:
        """Apply the attention of `layer` to all of `hidden` [rows, ctx, n_embd], in place."""
        added = self.decoder.attention_added(layer)
        for states in hidden:
            for rows in torch.split(states, max(1, CHUNK // states.shape[1])):
                rows += added(rows)

    @torch.no_grad()
    def advance(self, layer: int, hidden: Sequence[Tensor], assignments: Sequence[Assignment]) -> None:
        """Apply `layer` of every assignment to its hidden states [rows, ctx, n_embd], in place."""
        self.attend(layer, hidden)
        route, norm = self.decoder.router(layer), self.decoder.ffn_norm(layer)
        flat = [states.view(-1, states.shape[-1]) for states in hidden]
        routings = [route(states) for states in flat]
        inputs = [self.decoder.norm(states, norm) for states in flat]
        unrouted = self.decoder.unrouted(layer)
        for states in flat:
            states += unrouted(states)
        for number in range(self.decoder.shape.n_expert):
            made: dict[tuple[str, str | None], Tensor] = {}
            for states, x, routing, assignment in zip(flat, inputs, routings, assignments, strict=True):
                parts = []
                for p, projection in enumerate(PROJECTIONS):
                    key = (projection, assignment.name(layer, number, p))
                    if key not in made:
                        made[key] = self.matrices.get(layer, projection, number, key[1])
                    parts.append(made[key])
                self._push(Expert(*parts), number, x, routing, states)

    def _push(self, expert: Expert, number: int, x: Tensor, routing: RouterOutput, states: Tensor) -> None:
        index, slots = torch.nonzero(routing.experts == number, as_tuple=True)
        for part, rank in zip(torch.split(index, CHUNK), torch.split(slots, CHUNK), strict=True):
            y = expert.hidden(x[part]) @ expert.down.T
            states.index_add_(0, part, y.mul_(routing.weights[part, rank, None]))


class Evaluator:
    """Mean KL divergence of assignments on token rows [R, ctx], from the hidden states of an incumbent."""

    def __init__(
        self,
        layers: Layers,
        rows: NDArray[np.int32],
        types: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layers, self.rows, began = layers, rows, clock()
        info = layers.decoder.checkpoint.info
        shape = (info.n_layer, info.n_expert, len(PROJECTIONS))
        self._embedded = layers.decoder.embed(rows)
        plain = Assignment(tuple(types), np.full(shape, -1, dtype=np.int64))
        states = self._embedded.clone()
        for layer in range(info.n_layer):
            layers.advance(layer, [states], [plain])
        self.reference, self.seconds_per_row = states, (clock() - began) / len(rows)
        self.incumbent = plain
        self.states: list[Tensor] = []

    def settle(self, incumbent: Assignment) -> Floats:
        """Make `incumbent` the one that candidates start from. Returns its divergence per row [R]."""
        first = self.incumbent.first_difference(incumbent) if self.states else 0
        states = self.states[: first + 1] or [self._embedded]
        for layer in range(first, self.layers.n_layer):
            following = states[-1].clone()
            self.layers.advance(layer, [following], [incumbent])
            states.append(following)
        self.incumbent, self.states = incumbent, states
        return np.asarray(self.divergence([states[-1]], np.arange(len(self.rows)))[0])

    def sweep(self, candidates: Sequence[Assignment], rows: Ints | None = None) -> Floats:
        """Divergence [candidates, rows] in nats per token, of all rows or those numbered `rows`."""
        firsts = [self.incumbent.first_difference(c) for c in candidates]
        last = self.layers.n_layer
        picked = np.arange(len(self.rows)) if rows is None else rows
        hidden = [self.states[last][picked] if first == last else torch.empty(0) for first in firsts]
        for layer in range(last):
            for i, first in enumerate(firsts):
                if first == layer:
                    hidden[i] = self.states[layer][picked]
            active = [i for i, first in enumerate(firsts) if first <= layer]
            self.layers.advance(layer, [hidden[i] for i in active], [candidates[i] for i in active])
        return self.divergence(hidden, picked)

    @torch.no_grad()
    def divergence(self, hidden: Sequence[Tensor], rows: Ints) -> Floats:
        """KL divergence [len(hidden), rows] of final hidden states from the reference's, nats per token."""
        logits, reference = self.layers.decoder.output(), self.reference[rows]
        total = np.zeros((len(hidden), len(rows)))
        for part in torch.split(torch.arange(len(rows)), max(1, LOGIT_TOKENS // self.rows.shape[1])):
            expected = F.log_softmax(logits(reference[part]), dim=-1)
            probs = expected.exp()
            for i, states in enumerate(hidden):
                found = F.log_softmax(logits(states[part]), dim=-1)
                lost = (probs * (expected - found)).sum(-1, dtype=torch.float64)
                total[i, part.numpy()] = lost.mean(1).numpy()
        return total
