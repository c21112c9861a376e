"""One decoder layer at a time in torch float32, from a checkpoint in GGUF conventions.

It follows llama.cpp's graphs (src/models/ARCHITECTURE.cpp, build_moe_ffn): RMSNorm, grouped-query attention
with rotary embedding, router softmax over all experts, top-k. architecture.py has what differs between them;
norms of Q and K, biases and a shared expert are used when the model has their tensors. Where the runtime and
the model's authors differ (llama.cpp ignores norm_topk_prob and clip_qkv of a Hugging Face model), this
follows the runtime, because the runtime is what will run the file.

Weights are read when they are needed and dropped afterwards: the attention of one layer, then one expert
after another. So memory does not depend on the number of layers, and hardly on the number of experts. Tests
compare with two other implementations: transformers' models and the runtime itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import ATTENTION, PROJECTIONS
from mc_gguf.common.errors import SourceError
from mc_gguf.source.architecture import Shape

if TYPE_CHECKING:
    from mc_gguf.source import Checkpoint

# Tokens that go through attention or an expert at once: large enough for full matmul speed, small enough that
# the activations of an expert (n_ff 14336: 3 x 117 MB) stay below its weights.
CHUNK = 2048
# llama.cpp divides by at least the smallest F16 normal when it renormalises the routing weights.
MIN_WEIGHT_SUM = 6.103515625e-5


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """Tokens of one expert.

    Attributes:
        index: [n] int64, numbers of the tokens.
        probs: [n] the router's probability of the expert (softmax over all experts).
        weights: [n] what multiplies the expert's output.
    """

    index: Tensor
    probs: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """What the router makes of N tokens: K of E experts for each, best first.

    Attributes:
        experts: [N, K] int64, the chosen experts.
        probs: [N, K] their probabilities (softmax over all experts).
        weights: [N, K] what multiplies their outputs.
        all_probs: [N, E] the probabilities of all experts.
    """

    experts: Tensor
    probs: Tensor
    weights: Tensor
    all_probs: Tensor

    def tokens_of(self, expert: int) -> RoutedTokens:
        """The tokens that are routed to `expert`."""
        index, ranks = torch.nonzero(self.experts == expert, as_tuple=True)
        return RoutedTokens(index, self.probs[index, ranks], self.weights[index, ranks])


@dataclass(frozen=True, eq=False)
class Expert:
    """The float32 matrices of one expert: gate and up [n_ff, n_embd], down [n_embd, n_ff]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def hidden(self, x: Tensor) -> Tensor:
        """silu(x gate') * (x up') [n, n_ff] of x [n, n_embd]."""
        return F.silu(x @ self.gate.T).mul_(x @ self.up.T)


class Decoder:
    """The layers of one checkpoint. Hidden states are float32 [n_rows, ctx, n_embd]."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shape = Shape.of(checkpoint)
        self._names = {t.name for t in checkpoint.info.tensors}

    def embed(self, rows: NDArray[np.int32]) -> Tensor:
        """The hidden states of token rows [n_rows, ctx] before the first layer."""
        table = self.checkpoint.tensor("token_embd.weight")
        if rows.min() < 0 or rows.max() >= table.shape[0]:
            raise SourceError(f"a token id is outside the model's vocabulary of {table.shape[0]}")
        return _aligned(table[rows])

    def attention(self, layer: int, hidden: Tensor) -> None:
        """Add the attention block of `layer` to `hidden`, in place."""
        self.attention_block(layer)(hidden)

    def attention_block(
        self, layer: int, seen: Callable[[Tensor, Tensor], None] | None = None
    ) -> Callable[[Tensor], None]:
        """attention() of `layer` as a function; its weights are read now. `seen` as in attention_added."""
        added = self.attention_added(layer, seen=seen)

        @torch.inference_mode()
        def block(hidden: Tensor) -> None:
            for rows in _row_chunks(hidden):
                rows += added(rows)

        return block

    def attention_added(
        self,
        layer: int,
        matrices: Mapping[str, Tensor] | None = None,
        seen: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """A function that returns what the attention block of `layer` adds to a few rows of hidden states. It
        is differentiable; the weights are read now.

        Args:
            layer: number of the layer.
            matrices: by part (ATTENTION), used instead of the model's matrices.
            seen: called with the input of q, k and v and the input of the output matrix.
        """
        norm = self._tensor(f"blk.{layer}.attn_norm.weight")
        linears = (self._linear(f"blk.{layer}.attn_{part}", (matrices or {}).get(part)) for part in ATTENTION)
        q, k, v, out = linears
        q_norm, k_norm = (self._optional(f"blk.{layer}.attn_{part}_norm.weight") for part in ("q", "k"))
        shared, neox = self.shape.n_head // self.shape.n_head_kv, self.shape.architecture.neox

        def added(rows: Tensor) -> Tensor:
            cos, sin = self._rotation(rows.shape[1])
            x = self.norm(rows, norm)
            queries = _rotate(self._heads(_apply(x, q), q_norm), cos, sin, neox)
            keys = _rotate(self._heads(_apply(x, k), k_norm), cos, sin, neox)
            values = self._heads(_apply(x, v))
            keys, values = (t.repeat_interleave(shared, dim=1) for t in (keys, values))
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self.shape.attn_scale
            )
            mixed = mixed.transpose(1, 2).flatten(2)
            if seen is not None:
                seen(x, mixed)
            return _apply(mixed, out)

        return added

    def attention_matrix(self, layer: int, part: str) -> Tensor:
        """One matrix [outputs, inputs] of the attention block; `part` is one of ATTENTION."""
        return self._tensor(f"blk.{layer}.attn_{part}.weight")

    def route(self, layer: int, hidden: Tensor) -> RouterOutput:
        """The output of the router of `layer` for `hidden` [N, n_embd] as it is after attention, not
        normalised.
        """
        return self.router(layer)(hidden)

    def router(self, layer: int) -> Callable[[Tensor], RouterOutput]:
        """route() of `layer` as a function; its weights are read now. It is differentiable; the choice of
        experts is constant.
        """
        norm, matrix = self.ffn_norm(layer), self._tensor(f"blk.{layer}.ffn_gate_inp.weight")

        def route(hidden: Tensor) -> RouterOutput:
            logits = torch.cat([self.norm(part, norm) @ matrix.T for part in torch.split(hidden, CHUNK)])
            all_probs = torch.softmax(logits, dim=-1)
            probs, experts = torch.topk(all_probs, self.shape.n_used, dim=-1)
            return RouterOutput(experts, probs, self.weights(probs), all_probs)

        return route

    def weights(self, probs: Tensor) -> Tensor:
        """Routing weights [N, K] of chosen experts with these probabilities; 0 means a dropped expert."""
        if self.shape.architecture.renormalise:
            probs = probs / probs.sum(-1, keepdim=True).clamp_(min=MIN_WEIGHT_SUM)
        return probs * self.shape.weight_scale

    def nearest_tokens(
        self, output: RouterOutput, expert: int, count: int, excluded: Tensor | None = None
    ) -> RoutedTokens:
        """Up to `count` tokens that are not routed to `expert` but come nearest to it, by its probability.

        Their weights are what the runtime would compute if the expert took the place of the last one that the
        token uses. `excluded` [N] bool marks tokens that are left out.
        """
        probs = output.all_probs[:, expert].clone()
        probs[output.tokens_of(expert).index] = -1
        if excluded is not None:
            probs[excluded] = -1
        probs, index = torch.topk(probs, min(count, int((probs >= 0).sum())))
        chosen = torch.cat([output.probs[index, :-1], probs[:, None]], dim=1)
        return RoutedTokens(index, probs, self.weights(chosen)[:, -1])

    def ffn_norm(self, layer: int) -> Tensor:
        """Weight [n_embd] of the norm before the feed-forward block."""
        return self._tensor(f"blk.{layer}.ffn_norm.weight")

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), weight, self.shape.eps)

    def expert(self, layer: int, expert: int) -> Expert:
        """The matrices of one expert, read now."""
        return Expert(*(_aligned(self.checkpoint.expert(layer, p, expert)) for p in PROJECTIONS))

    def unrouted(self, layer: int) -> Callable[[Tensor], Tensor]:
        """A function that returns what the MoE block of `layer` adds to `hidden` [N, n_embd] independently of
        the router: the output of the shared expert times its own gate where the model has one, else zeros. It
        is differentiable; the weights are read now.
        """
        prefix = f"blk.{layer}.ffn_"
        if f"{prefix}gate_inp_shexp.weight" not in self._names:
            return torch.zeros_like
        norm, gate = self.ffn_norm(layer), self._tensor(f"{prefix}gate_inp_shexp.weight").view(-1)
        expert = Expert(*(self._tensor(f"{prefix}{p}_shexp.weight") for p in PROJECTIONS))

        def block(hidden: Tensor) -> Tensor:
            parts = [self.norm(part, norm) for part in torch.split(hidden, CHUNK)]
            gated = [(x, torch.sigmoid(x @ gate)[:, None]) for x in parts]
            return torch.cat([expert.hidden(x) @ expert.down.T * g for x, g in gated])

        return block

    @torch.inference_mode()
    def feed_forward(self, layer: int, hidden: Tensor) -> None:
        """Add the MoE block of `layer` to `hidden`, in place, without collecting anything."""
        flat = hidden.flatten(0, 1)
        output, norm, added = self.route(layer, flat), self.ffn_norm(layer), self.unrouted(layer)(flat)
        for number in range(self.shape.n_expert):
            tokens, expert = output.tokens_of(number), self.expert(layer, number)
            parts = zip(torch.split(tokens.index, CHUNK), torch.split(tokens.weights, CHUNK), strict=True)
            for index, weights in parts:
                y = expert.hidden(self.norm(flat[index], norm)) @ expert.down.T
                added.index_add_(0, index, y * weights[:, None])
        flat += added

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., n_vocab]: final norm and output matrix."""
        return self.output()(hidden)

    def output(self) -> Callable[[Tensor], Tensor]:
        """logits() as a function; its weights are read now. The output matrix may be the embeddings."""
        name = "output.weight" if "output.weight" in self._names else "token_embd.weight"
        norm, matrix = self._tensor("output_norm.weight"), self._tensor(name)
        return lambda hidden: self.norm(hidden, norm) @ matrix.T

    def _tensor(self, name: str) -> Tensor:
        return _aligned(self.checkpoint.tensor(name))

    def _optional(self, name: str) -> Tensor | None:
        return self._tensor(name) if name in self._names else None

    def _linear(self, name: str, matrix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        weight = self._tensor(f"{name}.weight") if matrix is None else matrix
        return weight, self._optional(f"{name}.bias")

    def _heads(self, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """[rows, ctx, heads * head_dim] -> [rows, heads, ctx, head_dim], normalised over each head or over
        all heads together, depending on the length of `norm`.
        """
        if norm is not None:
            x = self.norm(x.view(*x.shape[:2], -1, len(norm)), norm).flatten(-2)
        return x.view(*x.shape[:2], -1, self.shape.head_dim).transpose(1, 2)

    def _rotation(self, ctx: int) -> tuple[Tensor, Tensor]:
        """cos and sin [ctx, head_dim / 2]; computed in float64, as positions times small frequencies lose
        bits.
        """
        half = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float64) / self.shape.head_dim
        frequency = self.shape.rope_base**-half * self.shape.rope_scale
        if "rope_freqs.weight" in self._names:
            frequency = frequency / self._tensor("rope_freqs.weight").double()
        angle = torch.outer(torch.arange(ctx, dtype=torch.float64), frequency)
        return angle.cos().float(), angle.sin().float()


def _aligned(array: NDArray[np.float32]) -> Tensor:
    """The array as a tensor on a 64-byte boundary; elsewhere the last bits of a product depend on the
    address.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _apply(x: Tensor, linear: tuple[Tensor, Tensor | None]) -> Tensor:
    return F.linear(x, *linear)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, neox: bool) -> Tensor:
    """Rotary embedding of the pairs (i, i + d/2), or of the pairs (2i, 2i + 1), for which the converter
    permutes Q and K.
    """
    first, second = x.chunk(2, dim=-1) if neox else (x[..., 0::2], x[..., 1::2])
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat(turned, dim=-1) if neox else torch.stack(turned, dim=-1).flatten(-2)


def _row_chunks(hidden: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(hidden, max(1, CHUNK // hidden.shape[1])))
