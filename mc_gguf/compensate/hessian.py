"""What error compensation has to know about one expert: the second moments of its routed inputs, and held-out
inputs.

Per expert there are x [tokens, n_embd], the inputs of gate and up, and h [tokens, n_ff], the inputs of down,
which the expert makes of them (capture/function.py). Each is multiplied by the token's routing weight g,
because the error of the block's output is proportional to g^2. (The error of gate and up goes through down as
well, differently for every row; but the weight of a row does not change what is best for it.) Every
HELD_OUT_EVERY-th row of the text is kept aside, and up to HELD_OUT of its tokens judge the result. Whole rows
are kept aside because a token has near copies among the tokens of its own row, so that a solution that is bad
on other text would pass.

The Hessian of an expert with few tokens has directions in which nothing was seen, and a solution that puts
its error there is worthless on other text. The Hessian is therefore shrunk towards the layer's: the tokens
that come nearest to being routed to the expert are added, with the weight that the runtime would give the
expert in the last place (Routing.nearest) times the root of SHRINKAGE, until there are ENOUGH tokens
per column. This is defined for down as well, whose inputs no other expert shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.calibrate.routed import Routing
from mc_gguf.capture.expert import Expert
from mc_gguf.compensate.products import add_squares, mirror

CHUNK = 2048  # tokens at once
HELD_OUT_EVERY = 8
HELD_OUT = 512
ENOUGH = 4  # tokens per column
SHRINKAGE = 0.1  # weight of a token that is not routed to the expert, relative to one that is


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs x [n] of one matrix, weighted by g.

    Attributes:
        hessian: [n, n] the sum of g^2 x x'.
        held_out: [tokens, n] g x of other tokens.
        n_tokens: number of tokens in `hessian`.
    """

    hessian: Tensor
    held_out: Tensor
    n_tokens: int


@dataclass(frozen=True, eq=False)
class HessianTokens:
    """The tokens that the Hessians of one expert are estimated from, and those that judge the result.

    Attributes:
        index: [n] numbers of the tokens.
        slots: [n] the slots in which they have the expert.
        weights: [n] float32, what their inputs are multiplied by.
        held_out: [n] bool, those that judge the result.
        n_routed: how many are routed to the expert: the first ones. The rest are the nearest others.
    """

    index: NDArray[np.int64]
    slots: NDArray[np.int64]
    weights: Tensor
    held_out: Tensor
    n_routed: int

    @classmethod
    def routed(cls, routing: Routing, expert: int, held_out: Tensor) -> HessianTokens:
        """The tokens that are routed to the expert; `held_out` [N] marks those of all tokens that are kept
        aside.
        """
        tokens = routing.tokens_of(expert)
        weights = torch.from_numpy(tokens.weights).float()
        return cls(tokens.index, tokens.slots, weights, held_out[torch.from_numpy(tokens.index)], len(tokens))

    @classmethod
    def enough(cls, routing: Routing, expert: int, n_cols: int, held_out: Tensor) -> HessianTokens:
        """The routed tokens and, if they are fewer than ENOUGH per column, the nearest others that are not
        held out.
        """
        own = cls.routed(routing, expert, held_out)
        missing = ENOUGH * n_cols - len(own.index)
        if missing <= 0:
            return own
        others = routing.nearest(expert, missing, excluded=held_out.numpy())
        weights = torch.from_numpy(others.weights * SHRINKAGE**0.5).float()
        return cls(
            np.concatenate([own.index, others.index]),
            np.concatenate([own.slots, others.slots]),
            torch.cat([own.weights, weights]),
            torch.cat([own.held_out, torch.zeros(len(others), dtype=torch.bool)]),
            own.n_routed,
        )


def held_out_tokens(n_rows: int, ctx: int) -> Tensor:
    """[n_rows * ctx] bool: the tokens that are kept aside. A single row keeps none aside."""
    every = min(HELD_OUT_EVERY, max(2, n_rows))
    return (torch.arange(n_rows) % every == every - 1).repeat_interleave(ctx)


class Collector:
    """Collects the inputs of one expert's matrices: of gate and up (if `inner`), and of down (if `down`)."""

    def __init__(self, expert: Expert, inner: bool, down: bool) -> None:
        n_embd, n_ff = expert.down.shape
        self._sums = [torch.zeros(n, n) if wanted else None for n, wanted in ((n_embd, inner), (n_ff, down))]
        self._aside: list[list[Tensor]] = [[], []]
        self._n_tokens = 0

    def add(self, inputs: tuple[Tensor, Tensor], weight: Tensor, held_out: Tensor) -> None:
        """Add x [tokens, n_embd] and h [tokens, n_ff] of some tokens."""
        self._n_tokens += int((~held_out).sum())
        for total, aside, values in zip(self._sums, self._aside, inputs, strict=True):
            if total is not None:
                weighted = values * weight[:, None]
                aside.append(weighted[held_out])
                weighted[held_out] = 0
                add_squares(total, weighted)

    def inputs(self, down: bool) -> Inputs:
        """What was collected for down, or for gate and up."""
        position = 1 if down else 0  # of x and h in add()
        total, aside = self._sums[position], self._aside[position]
        assert total is not None
        mirror(total)
        held_out = torch.cat([torch.zeros(0, len(total)), *aside])[:HELD_OUT]
        return Inputs(total, held_out, self._n_tokens)


def collect(expert: Expert, routing: Routing, tokens: HessianTokens, collector: Collector) -> None:
    """Give the inputs of the expert's matrices for `tokens` to `collector`."""
    for first in range(0, len(tokens.index), CHUNK):
        part = slice(first, first + CHUNK)
        x = routing.rows.inputs(tokens.index[part], tokens.slots[part])
        collector.add((x, expert.hidden(x)), tokens.weights[part], tokens.held_out[part])
