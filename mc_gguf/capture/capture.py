"""capture(): a text through the runtime into a spool, resumable.

Per MoE block the spool gets what spool.py lists; per other matrix the mean squares of its inputs over all of
the text, and the inputs of the sampled tokens themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_gguf.artifacts import ModelInfo
from mc_gguf.capture.context import Context, Devices
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.capture.graph import Node
from mc_gguf.capture.observer import Array, Block, Observer, Sink
from mc_gguf.capture.spool import Spool, to_half
from mc_gguf.common.errors import SourceError
from mc_gguf.common.progress import Progress
from mc_gguf.common.units import format_size

SAVE_EVERY = 8  # batches: how much a run that is killed loses
_BATCH_TOKENS, _BATCH_BYTES = 2048, 1 << 30
_MODEL_SHARE = 0.8  # of the memory, in which a model stays once it is read
_MAX_SEQUENCES = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CaptureOptions:
    """What is captured of a text and how.

    Attributes:
        rows: [n_rows, ctx] tokens.
        samples: [n] numbers of the tokens, ascending, whose outputs and inputs of matrices are kept whole.
        matrix_samples: [m] those of them whose inputs of other matrices than experts' are kept.
        n_seq: rows that are computed at once.
    """

    rows: NDArray[np.int32]
    samples: NDArray[np.int64]
    matrix_samples: NDArray[np.int64]
    n_seq: int = 1


def rows_at_once(info: ModelInfo, rows: NDArray[np.int32], n_bytes: int, memory: int) -> int:
    """How many rows [n_rows, ctx] are computed in one batch of a model of `n_bytes` bytes.

    Experts are multiplied faster by many tokens, up to about 2,048. What a batch needs of memory is kept
    below a gigabyte. A model that does not fit into `memory` is read from the disk once per batch: then
    batches take a quarter of the memory.
    """
    n_vocab = next((int(t.shape[-1]) for t in info.tensors if t.name == "token_embd.weight"), 0)
    width = 3 * info.n_expert_used * (info.n_ff + info.expert_width) + 16 * info.n_embd + 2 * n_vocab
    fits = n_bytes < _MODEL_SHARE * memory
    budget, most = (_BATCH_BYTES, _BATCH_TOKENS) if fits else (memory // 4, 8 * _BATCH_TOKENS)
    n_tokens = min(most, budget // (4 * width))
    count = max(1, min(len(rows), n_tokens // int(rows.shape[1]), _MAX_SEQUENCES))
    if not fits:
        log.warning(
            "the model takes %s, more than the memory has room for: it will be read from the disk %d times",
            format_size(n_bytes),
            -(-len(rows) // count),
        )
    return count


def capture(
    path: Path, info: ModelInfo, options: CaptureOptions, devices: Devices, spool: Spool, bar: Progress
) -> None:
    """Evaluate the rows that `spool` does not have yet.

    Raises SourceError when the runtime cannot load the model, or gives values that are not finite.
    """
    n_rows, ctx = options.rows.shape
    if spool.done >= options.rows.size:
        bar.advance(options.rows.size, "captured")
        return
    sink = _Writer(info, options, spool)
    observer = Observer(sink)
    bar.advance(spool.done, "loading the model")
    with Context(path, ctx, min(options.n_seq, n_rows), devices, observer) as context:
        for number, first in enumerate(range(spool.done // ctx, n_rows, options.n_seq)):
            part = options.rows[first : first + options.n_seq]
            sink.begin(first * ctx, part.size)
            observer.begin()
            context.evaluate(part)
            observer.check()
            sink.end()
            done = first * ctx + part.size
            if number % SAVE_EVERY == SAVE_EVERY - 1 or done == options.rows.size:
                spool.save(done)
            bar.advance(part.size, f"{done} of {options.rows.size} tokens")


@dataclass(eq=False)
class _Writer(Sink):
    """Writes into a spool. `begin` and `end` enclose a batch of tokens `first` to `first + n`."""

    info: ModelInfo
    options: CaptureOptions
    spool: Spool
    first: int = 0
    n: int = 0
    _inputs: dict[int, str] = field(default_factory=dict)  # address of an input in this batch -> its name
    _blocks: set[int] = field(default_factory=set)  # layers of this batch
    _before: torch.Tensor | None = None  # hidden states before the feed-forward block

    def __post_init__(self) -> None:
        self._matrices = {t.name: t.shape for t in self.info.tensors if len(t.shape) == 2}

    def begin(self, first: int, n: int) -> None:
        self.first, self.n = first, n
        self._inputs.clear()
        self._blocks.clear()

    def end(self) -> None:
        """Raises SourceError unless every layer with experts was seen."""
        missing = sorted(set(self.info.expert_layers) - self._blocks)
        if missing:
            raise SourceError(
                f"the runtime did not compute the experts of layer {missing[0]} in this text's graph; such a "
                "model is not supported"
            )

    def block_input(self, block: Block, rows: Array, before: Array | None) -> None:
        layer, spool, n = block.layer, self.spool, self.n
        if len(block.experts) != n or layer in self._blocks:
            raise SourceError(
                f"layer {layer} computes {len(block.experts)} tokens of {n}, or is computed twice; such a "
                "model is not supported"
            )
        self._blocks.add(layer)
        each = len(rows) // n
        half, scale = to_half(np.ascontiguousarray(rows))
        facts = spool.facts.setdefault(f"blk.{layer}", {})
        k, n_expert = block.experts.shape[1], block.router.shape[1]
        facts |= {"n_used": k, "rows_per_token": each, "n_router": n_expert, "n_embd": rows.shape[1]}
        spool.rows(f"blk.{layer}.x", np.float16, (each, rows.shape[1])).write(self.first, half)
        spool.rows(f"blk.{layer}.x_scale", np.float32, (each,)).write(self.first, scale)
        spool.rows(f"blk.{layer}.experts", np.int32, (k,)).write(self.first, block.experts)
        spool.rows(f"blk.{layer}.probs", np.float32, (k,)).write(self.first, block.probs)
        fits = before is not None and before.shape == (n, rows.shape[1])
        self._before = torch.from_numpy(before.copy()) if fits and before is not None else None
        # Logits, which some routers have instead of probabilities, can be large.
        router = np.clip(block.router, -60000, 60000)
        spool.rows(f"blk.{layer}.router", np.float16, (n_expert,)).write(self.first, router)

    def block_middle(self, block: Block, rows: Array) -> None:
        """Sums of squares by expert, and the rows of a few tokens, which the function is verified with."""
        layer, n_ff = block.layer, rows.shape[-1]
        flat = torch.from_numpy(np.ascontiguousarray(rows)).reshape(-1, n_ff)
        experts = torch.from_numpy(block.experts.astype(np.int64)).reshape(-1)
        sums = torch.zeros(self.info.n_expert, n_ff)
        sums.index_add_(0, experts, flat.square())
        self.spool.add(f"blk.{layer}.middle_sq", sums.numpy())
        if self.first == 0:
            facts = self.spool.facts[f"blk.{layer}"]
            function = block.function
            facts |= {"unknown": block.unknown, "expression": function.expression if function else None}
            self.spool.sums[f"blk.{layer}.middle"] = rows[:VERIFIED].astype(np.float32)

    def block_output(self, block: Block, node: Node, weights: Array | None) -> None:
        layer, spool = block.layer, self.spool
        outputs = torch.from_numpy(np.ascontiguousarray(node.read()[0]))  # [tokens, K, n_embd]
        n, k = block.experts.shape
        factors = np.ones((n, k), np.float32) if weights is None else weights
        largest = outputs.abs().amax(dim=2).numpy() / np.maximum(np.abs(factors), 1e-20)
        squares = outputs.square().sum(dim=2).numpy()
        spool.rows(f"blk.{layer}.weights", np.float32, (k,)).write(self.first, factors)
        spool.rows(f"blk.{layer}.output_sq", np.float32, (k,)).write(self.first, squares)
        spool.rows(f"blk.{layer}.output_max", np.float32, (k,)).write(self.first, largest)
        local, place = self._sampled(self.options.samples)
        if len(local):
            rows = outputs[local].reshape(len(local), -1).numpy()
            half, scale = to_half(rows)
            n_embd = outputs.shape[-1]
            spool.rows(f"blk.{layer}.sampled", np.float16, (k, n_embd)).write(place, half)
            spool.rows(f"blk.{layer}.sampled_scale", np.float32).write(place, scale)
        if self.first == 0:
            facts = spool.facts[f"blk.{layer}"]
            facts["weighted_input"] = weights is None
            function = block.function
            facts["down"] = [function.down_bias, function.down_scale] if function else ["", ""]

    def layer_output(self, node: Node, layer: int) -> None:
        rows = node.read().reshape(-1, node.shape[0])
        if len(rows) != self.n:
            return
        tensor = torch.from_numpy(np.ascontiguousarray(rows))
        if self._before is not None and self._before.shape == tensor.shape:
            cosines = torch.cosine_similarity(self._before, tensor, dim=1).sum(dtype=torch.float64)
            self.spool.add(f"blk.{layer}.cosine", np.array([float(cosines)]))
        squares = torch.linalg.vector_norm(tensor, dim=1).square().numpy()
        self.spool.rows(f"blk.{layer}.hidden_sq", np.float32).write(self.first, squares)
        self.spool.facts[f"blk.{layer}"]["hidden"] = True
        self.spool.largest(f"blk.{layer}.hidden_max", float(tensor.abs().max()))
        if self.first == 0:
            self.spool.sums[f"blk.{layer}.hidden_median"] = np.array([float(tensor.abs().median())])

    def wants_matrix(self, name: str) -> bool:
        return name in self._matrices

    def matrix_product(self, name: str, node: Node) -> None:
        inputs = node.src(1)
        assert inputs is not None
        if inputs.kind or inputs.shape[0] != self._matrices[name][0]:
            return
        whole = node.rows == self.n and node.shape[0] == self._matrices[name][1]
        self._matrix_input(name, inputs, whole)

    def final_input(self, node: Node) -> None:
        name = "output.weight" if "output.weight" in self._matrices else "token_embd.weight"
        if name in self._matrices and node.shape[0] == self._matrices[name][0]:
            self._matrix_input(name, node, True)

    def _matrix_input(self, name: str, inputs: Node, whole: bool) -> None:
        """Add the rows of `inputs`. With `whole`, which says that the products are rows of tokens, the
        sampled ones are kept.
        """
        facts = self.spool.facts.setdefault("matrices", {})
        known = self._inputs.get(inputs.address)
        if known is not None:
            facts.setdefault(name, known)
            return
        key = self._inputs[inputs.address] = facts.setdefault(name, f"input.{len(facts)}")
        values = inputs.read()
        rows = torch.from_numpy(np.ascontiguousarray(values.reshape(-1, values.shape[-1])))
        self.spool.add(f"{key}.sq", rows.square().sum(dim=0).numpy())
        self.spool.add(f"{key}.n", np.array([len(rows)]))
        if len(rows) != self.n or not whole:
            return
        local, place = self._sampled(self.options.matrix_samples)
        if len(local):
            half, scale = to_half(rows[local].numpy())
            self.spool.rows(key, np.float16, (rows.shape[1],)).write(place, half)
            self.spool.rows(f"{key}.scale", np.float32).write(place, scale)
            self.spool.facts.setdefault("sampled", {})[key] = rows.shape[1]

    def _sampled(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """The samples in this batch: their places in it, and the number of the first among all samples."""
        low, high = np.searchsorted(samples, (self.first, self.first + self.n))
        return samples[low:high] - self.first, int(low)


VERIFIED = 8  # tokens whose inputs of down are kept


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What a spool has of one MoE block; arrays are mapped. See spool.py for their meaning."""

    spool: Spool
    layer: int
    n: int
    n_sampled: int

    def _facts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.spool.facts[f"blk.{self.layer}"]
        return found

    def _rows(self, name: str, dtype: Any, *shape: int) -> NDArray[Any]:
        return self.spool.rows(f"blk.{self.layer}.{name}", dtype, shape).read(self.n)

    @property
    def n_used(self) -> int:
        return int(self._facts()["n_used"])

    @property
    def rows_per_token(self) -> int:
        return int(self._facts()["rows_per_token"])

    @property
    def has_weighted_input(self) -> bool:
        """Whether the router's weights multiply the inputs, so that those of the outputs are ones."""
        return bool(self._facts()["weighted_input"])

    @property
    def function(self) -> ExpertFunction | None:
        facts = self._facts()
        if facts["expression"] is None:
            return None
        return ExpertFunction(facts["expression"], *facts["down"])

    @property
    def unknown(self) -> str:
        """The operation that is not known; empty where there is a function."""
        return str(self._facts()["unknown"])

    @property
    def experts(self) -> NDArray[np.int32]:
        return np.asarray(self._rows("experts", np.int32, self.n_used))

    @property
    def weights(self) -> NDArray[np.float32]:
        return np.asarray(self._rows("weights", np.float32, self.n_used))

    @property
    def probs(self) -> NDArray[np.float32]:
        return np.asarray(self._rows("probs", np.float32, self.n_used))

    @property
    def router(self) -> NDArray[np.float16]:
        return self._rows("router", np.float16, int(self._facts()["n_router"]))

    @property
    def output_sq(self) -> NDArray[np.float32]:
        return np.asarray(self._rows("output_sq", np.float32, self.n_used))

    @property
    def output_max(self) -> NDArray[np.float32]:
        return np.asarray(self._rows("output_max", np.float32, self.n_used))

    @property
    def hidden_sq(self) -> NDArray[np.float32]:
        """Ones where the graph does not name the hidden states."""
        if not self._facts().get("hidden"):
            return np.ones(self.n, np.float32)
        return np.asarray(self._rows("hidden_sq", np.float32))

    def inputs(self, tokens: NDArray[np.int64], slots: NDArray[np.int64]) -> torch.Tensor:
        """Rows [n, n_embd] of the block's input for tokens; `slots` count where inputs are weighted."""
        each, n_embd = self.rows_per_token, int(self._facts()["n_embd"])
        rows, scale = self._rows("x", np.float16, each, n_embd), self._rows("x_scale", np.float32, each)
        at = (tokens, slots if each > 1 else np.zeros_like(slots))
        from mc_gguf.capture.spool import from_half

        return from_half(rows[at], scale[at])

    def sampled_outputs(self) -> torch.Tensor:
        """Weighted outputs [samples, K, n_embd] of the sampled tokens."""
        from mc_gguf.capture.spool import from_half

        n_embd, name = int(self._facts()["n_embd"]), f"blk.{self.layer}.sampled"
        rows = self.spool.rows(name, np.float16, (self.n_used * n_embd,)).read(self.n_sampled)
        scale = self.spool.rows(f"{name}_scale", np.float32).read(self.n_sampled)
        return from_half(rows, scale).view(self.n_sampled, self.n_used, n_embd)

    @property
    def middle(self) -> NDArray[np.float32]:
        """Inputs of down [tokens, K, n_ff] of the first few tokens."""
        return self.spool.sums[f"blk.{self.layer}.middle"]

    def sum(self, name: str, default: float = 0.0) -> NDArray[np.float64]:
        return self.spool.sums.get(f"blk.{self.layer}.{name}", np.array([default]))


def sampled_tokens(n_rows: int, ctx: int, count: int, most: int) -> NDArray[np.int64]:
    """Numbers of the first `most` tokens of rows that are spread evenly, about `count` tokens together."""
    length = min(ctx, most, count)
    n = max(1, min(n_rows, count // length))
    rows = np.linspace(0, n_rows - 1, n).round().astype(np.int64)
    return (np.unique(rows)[:, None] * ctx + np.arange(length)).reshape(-1)


def spool_bytes(info: ModelInfo, n_tokens: int, n_sampled: int, n_matrix_sampled: int) -> int:
    """About the most bytes that a spool takes on the disk."""
    per_token = 2 * info.expert_width + 4 + 16 * info.n_expert_used + 2 * info.n_expert + 8
    per_sample = 2 * info.expert_width * info.n_expert_used
    columns: Sequence[int] = [t.shape[0] for t in info.tensors if len(t.shape) == 2]
    layers = len(info.expert_layers)
    return layers * (n_tokens * per_token + n_sampled * per_sample) + 2 * n_matrix_sampled * sum(columns)
