"""Second-order expansion of the KL divergence around an incumbent, for all types of all experts at once.

    KLD(new) - KLD(incumbent) ~ sum_i (g[i, t_i] - g[i, c_i])
                                + 1/2 sum_s (sum_i v[s, i, t_i] - v[s, i, c_i])^2

g is the gradient of the divergence times the matrix's change from the source, where t_i is the new type and
c_i the incumbent's. v are the same products with another gradient: that of the log-likelihood of tokens
drawn from the incumbent's own distribution, one set for every SEGMENT of a row and every draw. E[v v'] is
the Fisher (Gauss-Newton) matrix of the divergence. It neglects what tokens of different segments do
together to a later token, which is little; in return one backward pass makes four times as many draws. One
such pass covers every type of every matrix, where finite differences would need a forward pass for each.

v hardly depends on the incumbent, so it is collected over rounds. It also tells how g changes from one
incumbent to the next, so that gradients of earlier rounds still count (memory.py).

Layers are streamed: the hidden states of all layers are kept, and the weights of one layer at a time are
read once forwards and once backwards, one expert at a time, every type of a matrix once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import PROJECTIONS, Floats
from mc_gguf.refine.passes import Assignment, Evaluator, Layers
from mc_gguf.source.decoder import Expert

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]
# Tokens of a row whose gradients are summed for one v.
SEGMENT = 128
# Gradients of one matrix, one for each segment, that are held at once.
GRADIENT_BYTES = 1 << 27


@dataclass(frozen=True, eq=False)
class Expansion:
    """At `choice` [N]: gradient [N, T] (inf: not wanted) and draws [S, N, T] of N matrices, T types; per
    token.
    """

    choice: Ints
    gradient: Floats
    draws: Singles


def expand(evaluator: Evaluator, rows: Ints, wanted: NDArray[np.bool_], n_draw: int, seed: int) -> Expansion:
    """The expansion at the evaluator's incumbent on some of its rows, for the types in `wanted` [L, E, 3,
    T].
    """
    states = [s[rows] for s in evaluator.states]
    n_row, ctx = states[0].shape[:2]
    signal = _output_signal(evaluator.layers, evaluator.reference[rows], states[-1], n_draw, seed)
    n_segment = -(-ctx // SEGMENT)
    products = np.zeros((1 + n_draw, n_row * n_segment, *wanted.shape), dtype=np.float32)
    for layer in reversed(range(wanted.shape[0])):
        back = _Backward(evaluator.layers, evaluator.incumbent, layer, wanted[layer])
        products[:, :, layer] = back.run(states[layer], signal)
    flat = products.reshape(1 + n_draw, n_row * n_segment, -1, wanted.shape[-1])
    gradient = flat[0].sum(axis=0, dtype=np.float64) / (n_row * ctx)
    gradient[~wanted.reshape(gradient.shape)] = np.inf
    draws = flat[1:].reshape(-1, *flat.shape[2:]) / (ctx / n_segment) ** 0.5
    return Expansion(evaluator.incumbent.columns.reshape(-1), gradient, draws)


def _output_signal(layers: Layers, reference: Tensor, final: Tensor, n_draw: int, seed: int) -> Tensor:
    """Gradients [1 + draws, rows, ctx, n_embd] at the last hidden states.

    The first is that of the divergence, the others those of the log-likelihood of drawn tokens.
    """
    output, generator = layers.decoder.output(), torch.Generator().manual_seed(seed)
    signal = torch.empty(1 + n_draw, *final.shape)
    for r in range(len(final)):
        with torch.no_grad():
            expected = torch.softmax(output(reference[r]), dim=-1)
        hidden = final[r].clone().requires_grad_(True)
        with torch.enable_grad():
            logits = output(hidden)
        probs = torch.softmax(logits.detach(), dim=-1)
        for s in range(1 + n_draw):
            if s == 0:
                at_logits = probs - expected
            else:
                at_logits = probs.clone()
                drawn = torch.multinomial(probs, 1, generator=generator)
                at_logits.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
            (signal[s, r],) = torch.autograd.grad(logits, hidden, at_logits, retain_graph=s < n_draw)
    return signal


class _Backward:
    """One layer, backwards: from the gradient at its output to that at its input."""

    def __init__(self, layers: Layers, incumbent: Assignment, layer: int, wanted: NDArray[np.bool_]) -> None:
        self.layers, self.incumbent, self.layer, self.wanted = layers, incumbent, layer, wanted
        decoder = layers.decoder
        self.added, self.route = decoder.attention_added(layer), decoder.router(layer)
        self.norm, self.unrouted = decoder.ffn_norm(layer), decoder.unrouted(layer)

    def run(self, states: Tensor, signal: Tensor) -> NDArray[np.float32]:
        """Products [1 + draws, segments, E, 3, T].

        `signal` [1 + draws, rows, ctx, n_embd], the gradient at the layer's output, becomes the gradient at
        its input, in place.
        """
        decoder, n_row, ctx = self.layers.decoder, *states.shape[:2]
        entry = states.clone().requires_grad_(True)
        with torch.enable_grad():
            middle = (entry + self.added(entry)).flatten(0, 1)
            routing, x = self.route(middle), decoder.norm(middle, self.norm)
            direct = middle + self.unrouted(middle)
        flat = signal.flatten(1, 2)
        d_x, d_weights = torch.zeros_like(flat), torch.zeros(len(flat), *routing.weights.shape)
        n_segment = -(-ctx // SEGMENT)
        products = np.zeros((len(signal), n_row * n_segment, *self.wanted.shape), dtype=np.float32)
        with torch.no_grad():
            for number in range(decoder.shape.n_expert):
                index, slots = torch.nonzero(routing.experts == number, as_tuple=True)
                names = {p: self.incumbent.name(self.layer, number, i) for i, p in enumerate(PROJECTIONS)}
                expert = self.layers.expert(self.layer, number, names)
                factors = _expert_backward(expert, x[index], routing.weights[index, slots], flat[:, index])
                d_x.index_add_(1, index, factors.d_x)
                d_weights[:, index, slots] = factors.d_weight
                segments = index // ctx * n_segment + index % ctx // SEGMENT
                counts = torch.bincount(segments, minlength=n_row * n_segment).tolist()
                for p, (left, right) in enumerate(factors.matrices):
                    products[:, :, number, p] = self._products(number, p, left, right, counts)
        for s in range(len(signal)):
            (at_entry,) = torch.autograd.grad(
                [direct, x, routing.weights],
                entry,
                [flat[s], d_x[s], d_weights[s]],
                retain_graph=s + 1 < len(signal),
            )
            signal[s] = at_entry
        return products

    def _products(
        self, expert: int, p: int, left: Tensor, right: Tensor, counts: list[int]
    ) -> NDArray[np.float32]:
        """<gradient of the matrix, its change> for every segment and wanted type: [1 + draws, segments, T].

        The gradient of a segment is the sum over its tokens of left [1 + draws, n, out] times right [n, in].
        """
        wanted = np.nonzero(self.wanted[expert, p])[0]
        result = np.zeros((len(left), len(counts), self.wanted.shape[-1]), dtype=np.float32)
        if not len(wanted) or not len(right):
            return result
        get, projection, names = self.layers.matrices.get, PROJECTIONS[p], self.incumbent.types
        source = get(self.layer, projection, expert, None)
        changes = torch.empty(len(wanted), *source.shape)
        for i, t in enumerate(wanted):
            torch.sub(get(self.layer, projection, expert, names[t]), source, out=changes[i])
        ends = np.cumsum([0, *counts])
        each = max(1, GRADIENT_BYTES // (4 * source.numel()))
        for s, first in itertools.product(range(len(left)), range(0, len(counts), each)):
            parts = [slice(ends[r], ends[r + 1]) for r in range(first, min(first + each, len(counts)))]
            gradients = torch.stack([left[s, part].T @ right[part] for part in parts])
            found = gradients.flatten(1) @ changes.flatten(1).T
            result[s, first : first + each, wanted] = found.numpy().T
        return result


@dataclass(frozen=True, eq=False)
class _Factors:
    """Gradients of one expert: d_x [S, n, n_embd], d_weight [S, n], (left, right) of gate, up, down."""

    d_x: Tensor
    d_weight: Tensor
    matrices: tuple[tuple[Tensor, Tensor], ...]


def _expert_backward(expert: Expert, x: Tensor, weight: Tensor, signal: Tensor) -> _Factors:
    """x [n, n_embd], weight [n], signal [S, n, n_embd] at the layer's output."""
    a, b = x @ expert.gate.T, x @ expert.up.T
    sigmoid = torch.sigmoid(a)
    silu = a * sigmoid
    mid = silu * b
    unweighted = signal @ expert.down
    d_weight = (unweighted * mid).sum(-1)
    d_mid = unweighted * weight[:, None]
    d_a, d_b = d_mid * b * (sigmoid * (1 + a * (1 - sigmoid))), d_mid * silu
    d_y = signal * weight[:, None]
    return _Factors(d_a @ expert.gate + d_b @ expert.up, d_weight, ((d_a, x), (d_b, x), (d_y, mid)))
