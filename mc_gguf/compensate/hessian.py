"""What error compensation has to know of one expert: the second moments of its routed inputs, and held-out
inputs.

Per expert: x [tokens, n_embd], the normalised inputs of gate and up, and h = silu(gate x) * (up x) [tokens,
n_ff], that of down, each times the token's final routing weight g: the error of the block's output goes
with g^2. (For gate and up it goes through down as well, differently for every row; the weight of a row does
not change what is best for it.) Every HELD_OUT_EVERY-th row of the text is kept aside; up to HELD_OUT of its
tokens judge the result. Whole rows: a token has near copies among those of its own row, and a solution that
is bad on other text would pass.

An expert with few tokens has a Hessian with directions that nothing was seen of; a solution that puts its
error there is worthless on other text. It is therefore shrunk towards the layer's: the tokens of the layer
that come nearest to being routed to the expert are added, with the weight that they would give it, times
SHRINKAGE, until there are ENOUGH tokens a column. That is defined for down as well, whose inputs no other
expert shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mc_gguf.compensate.products import add_squares, mirror
from mc_gguf.source.decoder import CHUNK, Decoder, Expert, Routing

HELD_OUT_EVERY = 8
HELD_OUT = 512
ENOUGH = 4  # tokens a column
SHRINKAGE = 0.1


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of one matrix: `hessian` [n, n], the sum of g^2 x x'; `held_out` [tokens, n], g x of other
    tokens.
    """

    hessian: Tensor
    held_out: Tensor
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of one expert: numbers [n], final routing weights [n], which are held out, and how many are
    routed to it (the first ones; the rest are the nearest others).
    """

    index: Tensor
    weight: Tensor
    held_out: Tensor
    n_routed: int

    @classmethod
    def of(cls, routing: Routing, expert: int, held_out: Tensor) -> Tokens:
        """Those that are routed there; `held_out` [N]: which of all tokens are kept aside."""
        index, slots = torch.nonzero(routing.experts == expert, as_tuple=True)
        return cls(index, routing.weights[index, slots], held_out[index], len(index))

    def enough(self, routing: Routing, expert: int, n_cols: int, held_out: Tensor) -> Tokens:
        """These and, if they are fewer than ENOUGH * n_cols, the nearest others that are not held out."""
        prob = routing.all_probs[:, expert].clone()
        prob[self.index] = -1
        prob[held_out] = -1
        missing = min(ENOUGH * n_cols - len(self.index), int((prob >= 0).sum()))
        if missing <= 0 or SHRINKAGE <= 0:
            return self
        prob, index = torch.topk(prob, missing)
        others = routing.probs[index, :-1].sum(1)  # the expert would take the last place
        weight = prob / (others + prob).clamp(min=1e-30) * routing.weights[index].sum(1)
        nothing = torch.zeros(missing, dtype=torch.bool)
        return Tokens(
            torch.cat([self.index, index]),
            torch.cat([self.weight, weight * SHRINKAGE**0.5]),
            torch.cat([self.held_out, nothing]),
            self.n_routed,
        )


def held_out_tokens(n_rows: int, ctx: int) -> Tensor:
    """[n_rows * ctx]: which tokens are kept aside; none of a single row."""
    every = min(HELD_OUT_EVERY, max(2, n_rows))
    return (torch.arange(n_rows) % every == every - 1).repeat_interleave(ctx)


class Collector:
    """The inputs of one expert's matrices, in chunks: of gate and up (if `inner`), of down (if `down`)."""

    def __init__(self, expert: Expert, inner: bool, down: bool) -> None:
        n_ff, n_embd = expert.gate.shape
        self._sums = [torch.zeros(n, n) if wanted else None for n, wanted in ((n_embd, inner), (n_ff, down))]
        self._aside: list[list[Tensor]] = [[], []]
        self._n_tokens = 0

    def add(self, inputs: tuple[Tensor, Tensor], weight: Tensor, held_out: Tensor) -> None:
        """x and h of some tokens, [tokens, n_embd] and [tokens, n_ff]."""
        self._n_tokens += int((~held_out).sum())
        for total, aside, values in zip(self._sums, self._aside, inputs, strict=True):
            if total is not None:
                weighted = values * weight[:, None]
                aside.append(weighted[held_out])
                weighted[held_out] = 0
                add_squares(total, weighted)

    def inputs(self, down: bool) -> Inputs:
        """What was collected."""
        total, aside = self._sums[down], self._aside[down]
        assert total is not None
        mirror(total)
        held_out = torch.cat([torch.zeros(0, len(total)), *aside])[:HELD_OUT]
        return Inputs(total, held_out, self._n_tokens)


def run_expert(
    decoder: Decoder,
    expert: Expert,
    flat: Tensor,
    norm: Tensor,
    tokens: Tokens,
    added: Tensor,
    collector: Collector | None,
) -> None:
    """Add the expert's output for its routed tokens to `added`, and collect the inputs of its matrices."""
    if not len(tokens.index):
        return
    for part in torch.split(torch.arange(len(tokens.index)), CHUNK):
        x = decoder.norm(flat[tokens.index[part]], norm)
        h = expert.hidden(x)
        if collector is not None:
            collector.add((x, h), tokens.weight[part], tokens.held_out[part])
        routed = max(0, min(len(part), tokens.n_routed - int(part[0])))
        if routed:
            part = part[:routed]
            y = (h[:routed] @ expert.down.T).mul_(tokens.weight[part, None])
            added.index_add_(0, tokens.index[part], y)
