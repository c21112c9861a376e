"""What a change of one layer or matrix does, measured with the runtime itself: to the model's output, as mean
KL divergence of its next-token distributions, or to the hidden states of its own layer.

One batch holds a row of text several times, each time as a sequence of its own. The eval callback adds to
the products of one layer or matrix in each of them; nothing else differs. So one pass over the weights serves
for many changes, and every architecture that the runtime knows is measured alike.
"""

from __future__ import annotations

import re
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
from mc_gguf.capture.observer import MATMUL_ID, before_norm, is_weighted_input
from mc_gguf.common.progress import Progress

_TOKENS = 2048  # in one batch
_OUTPUT, _BLOCK = re.compile(r"l_out-(\d+)"), re.compile(r"blk\.(\d+)\.")
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


def relative_changes(
    path: Path, rows: NDArray[np.int32], changes: Sequence[Change], devices: Devices, bar: Progress
) -> Floats:
    """Mean squared change of the hidden states of a matrix's own layer, relative to their squared norm, that
    each change makes, on `rows` [n_rows, length]; nan where the graph does not name the hidden states.

    The targets are matrices of blocks. The change is measured where it comes first: in the hidden states
    before the norm of the layer's experts, if it reaches them, else in those after the layer. So a change of
    attention is measured before it makes the router choose other experts.
    """
    n_rows, length = rows.shape
    total = np.zeros(len(changes))
    if not changes:
        return total
    n_seq = min(max(2, _TOKENS // length), len(changes) + 1)  # the first is not changed
    meter = _Meter(length)
    with Context(path, length, n_seq, devices, meter) as context:
        for first in range(0, len(changes), n_seq - 1):
            group = changes[first : first + n_seq - 1]
            values = [change.values().view(n_rows, length, -1) for change in group]
            for r, row in enumerate(rows):
                meter.begin([(change.target, values[s][r]) for s, change in enumerate(group)])
                context.evaluate(np.repeat(row[None], len(group) + 1, axis=0))
                meter.check()
                total[first : first + len(group)] += meter.found(len(group))
                bar.advance(len(group) * length, "sensitivity of matrices")
    return np.asarray(total / n_rows)


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


class _Meter(Listener):
    """Adds to the products with matrices, and measures how far the hidden states of their layers change.

    Sequence 0 is not changed; sequence s + 1 is by the change number s of begin().
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._places: dict[str, list[tuple[int, Tensor]]] = {}
        self._waiting: dict[int, set[int]] = {}  # layer -> changes that are made and not yet measured
        self._changes: dict[int, Tensor] = {}  # by number: relative squared changes [length]
        self._left = 0

    def begin(self, changes: Sequence[tuple[str, Tensor]]) -> None:
        """From now on, each target with the tensor [length, width] that is added to its products."""
        self._places = {}
        for number, (target, values) in enumerate(changes):
            self._places.setdefault(target, []).append((number, values))
        self._waiting, self._changes, self._left = {}, {}, len(changes)
        self.is_finished = False

    def found(self, count: int) -> Floats:
        """The mean relative squared changes; nan for those that could not be measured."""
        return np.array(
            [float(self._changes[n].mean()) if n in self._changes else np.nan for n in range(count)]
        )

    def wants(self, node: Node) -> bool:
        return self._target(node) in self._places or self._layer(node) in self._waiting

    def computed(self, node: Node) -> None:
        target, layer = self._target(node), self._layer(node)
        for number, values in self._places.get(target, ()):
            node.add((number + 1) * self._length, values.numpy(), slots=False)
            self._waiting.setdefault(_layer_of(target), set()).add(number)
        if layer in self._waiting:
            is_output = node.op not in MATMUL_ID
            hidden = node.read().reshape(-1, node.shape[0]) if is_output else _inputs_before(node)
            if hidden is not None:
                self._measure(layer, torch.from_numpy(np.ascontiguousarray(hidden)), is_output)
        self.is_finished = self._left == 0

    def _measure(self, layer: int, hidden: Tensor, is_output: bool) -> None:
        length, waiting = self._length, self._waiting[layer]
        if len(hidden) % length or len(hidden) // length <= max(waiting) + 1:
            return
        base = hidden[:length].double()
        size = base.square().sum(1).clamp(min=1e-30)
        for number in sorted(waiting):
            rows = hidden[(number + 1) * length : (number + 2) * length].double()
            change = (rows - base).square().sum(1)
            if is_output or float(change.sum()) > 0:
                self._changes[number] = change / size
                waiting.discard(number)
                self._left -= 1
        if not waiting:
            del self._waiting[layer]

    @staticmethod
    def _target(node: Node) -> str:
        weights = node.src(0) if node.op == "MUL_MAT" else None
        return weights.name if weights is not None and weights.op == "NONE" else ""

    @staticmethod
    def _layer(node: Node) -> int:
        """The layer whose hidden states can be read at the node; -1: none."""
        weights = node.src(0) if node.op in MATMUL_ID else None
        found = EXPERT_STACK.fullmatch(weights.name) if weights is not None else None
        if found is not None and found[2] != "down":
            return int(found[1])
        output = _OUTPUT.fullmatch(node.name)
        return int(output[1]) if output else -1


def _layer_of(name: str) -> int:
    found = _BLOCK.match(name)
    assert found is not None
    return int(found[1])


def _inputs_before(node: Node) -> NDArray[np.float32] | None:
    inputs = node.src(1)
    return None if inputs is None else before_norm(inputs)
