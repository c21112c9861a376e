"""What a change of one layer or matrix does to the model's output: the mean KL divergence of its next-token
distributions, measured with the runtime itself.

One batch holds a row of text several times, each time as a sequence of its own. The eval callback adds to
the products of one layer or matrix in each of them; nothing else differs. So one pass over the weights serves
for many changes, and every architecture that the runtime knows is measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import EXPERT_STACK, Floats
from mc_gguf.capture.context import Context, Devices
from mc_gguf.capture.graph import Node
from mc_gguf.capture.listener import Listener
from mc_gguf.capture.observer import MATMUL_ID, is_weighted_input
from mc_gguf.common.progress import Progress

_TOKENS = 2048  # in one batch
_LOGIT_BYTES = 1 << 30  # of the logits of one batch
_PART = 128  # tokens whose distributions are compared at once


@dataclass(frozen=True, eq=False)
class Change:
    """One change: `values()` gives what is added, float32 [n_rows * length, width], to the products with the
    matrix `target`, or to the sum of the experts of layer N where `target` is "blk.N".
    """

    target: str
    values: Callable[[], Tensor]


def divergences(
    path: Path, rows: NDArray[np.int32], changes: Sequence[Change], devices: Devices, bar: Progress
) -> Floats:
    """Mean KL(unchanged || changed), in nats per token, of each change, on `rows` [n_rows, length]."""
    n_rows, length = rows.shape
    total = np.zeros(len(changes))
    if not changes:
        return total
    adder = _Adder()
    n_vocab = _vocabulary(path)
    most = max(1, min(_TOKENS, _LOGIT_BYTES // (4 * n_vocab)) // length)
    n_seq = min(most, len(changes))
    with Context(path, length, n_seq, devices, adder) as context:
        bases = []
        for row in rows:  # all of the base first: the changed rows of one change follow each other
            adder.begin({})
            context.evaluate(row[None])
            adder.check()
            bases.append(_log_probs(torch.from_numpy(context.logits(length))).float())
        for first in range(0, len(changes), n_seq):
            group = changes[first : first + n_seq]
            values = [change.values().view(n_rows, length, -1) for change in group]
            for r, row in enumerate(rows):
                places: dict[str, list[tuple[int, Tensor]]] = {}
                for s, change in enumerate(group):
                    places.setdefault(change.target, []).append((s * length, values[s][r]))
                adder.begin(places)
                context.evaluate(np.repeat(row[None], len(group), axis=0))
                adder.check()
                logits = torch.from_numpy(context.logits(len(group) * length)).view(len(group), length, -1)
                for s in range(len(group)):
                    total[first + s] += _divergence(bases[r], logits[s])
                bar.advance(len(group) * length, "sensitivity")
    return np.asarray(np.maximum(total / (n_rows * length), 0.0))


def _vocabulary(path: Path) -> int:
    from mc_gguf.ggml.shards import joined, read_shards

    shape = joined(read_shards(path)).tensors["token_embd.weight"].shape
    return int(shape[-1])


def _log_probs(logits: Tensor) -> Tensor:
    return torch.cat([torch.log_softmax(part.double(), dim=-1) for part in torch.split(logits, _PART)])


def _divergence(base: Tensor, logits: Tensor) -> float:
    total = 0.0
    for expected, part in zip(torch.split(base, _PART), torch.split(logits, _PART), strict=True):
        log_probs = torch.log_softmax(part.double(), dim=-1)
        wide = expected.double()
        total += float((wide.exp() * (wide - log_probs)).sum())
    return total


class _Adder(Listener):
    """Adds to the rows of the products that have changes in this batch."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, list[tuple[int, Tensor]]] = {}
        self._block, self._has_down, self._is_weighted = "", False, False

    def begin(self, places: dict[str, list[tuple[int, Tensor]]]) -> None:
        """From now on add, by target, each tensor [n, width] to the rows from a number on."""
        self._places = places

    def wants(self, node: Node) -> bool:
        return bool(self._places) and self._target(node) in self._places

    def computed(self, node: Node) -> None:
        for first, values in self._places[self._target(node)]:
            node.add(first, values.numpy(), slots=node.op != "MUL_MAT")

    def _target(self, node: Node) -> str:
        """What the node's rows are: products with a matrix, weighted outputs of a block, or neither."""
        op = node.op
        if op == "MUL_MAT":
            weights = node.src(0)
            return weights.name if weights is not None and weights.op == "NONE" else ""
        if op in MATMUL_ID:
            weights, inputs = node.src(0), node.src(1)
            found = EXPERT_STACK.fullmatch(weights.name) if weights is not None else None
            if found is None or inputs is None:
                return ""
            if self._block != f"blk.{found[1]}":
                self._block, self._is_weighted = f"blk.{found[1]}", is_weighted_input(inputs)
            self._has_down = found[2] == "down"
            return self._block if self._has_down and self._is_weighted else ""
        if op == "MUL" and self._has_down and node.name.startswith("ffn_moe_weighted-"):
            return self._block
        return ""
