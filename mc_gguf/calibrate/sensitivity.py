"""What dropping and what quantizing experts does to a model, measured layer by layer during calibration's own
forward pass.

Sensitivity. A branch is what the hidden states would be if one layer alone were changed. Branch 0, the base,
changes nothing. A branch of layer l starts at layer l as the base with the change, and goes through the later
layers together with all the others. Each layer has two branches: one that drops its experts at the median
thresholds, and one whose experts are rounded. The weights of each expert are read once for the
statistics and the branches together. At the end, the sensitivity of a layer is the mean KL divergence (nats
per token) between the next-token distributions of its branch and of the base. For the rounded branch it is
divided by the error that rounding made in the block's output, relative to the hidden states, which gives the
price of a unit of that error.

Rounding. An expert with coarsely rounded weights is a stand-in for a quantized one, because only the size and
the direction of the error matter here, not the type that made it. Every row is rounded to multiples of STEP
times its root mean square, at most LEVELS of them. The error is about 10 % of the weights' energy, as for the
types of 2 bits (IQ2_S 6.5 %, IQ2_XXS 12 %). ggml's quantizers take hours for all rows of Mixtral-8x7B;
rounding takes as long as reading the weights. Hidden units are rounded piece by piece, so that no second
expert is in memory.

Curve. For every layer, computed from the base, this is the squared error of the MoE block's output when every
expert at rank 1 or later with w_j / w_0 below the quantile-q threshold is dropped and the rest are
renormalised. With the changes c_j of the weights and the experts' outputs y_j it is sum_jk c_j c_k <y_j,
y_k>, so that one pass gives it for every quantile.

Cost. A branch takes tokens x n_embd x 4 bytes (34 MB for 2,048 tokens of Mixtral-8x7B). One branch at a time
is in memory, with what the layer adds to it. All of them are in files, up to three times (as the layer found
them, after its attention, and what its experts have added so far): 3 x (2L+1) branches on disk, 6.5 GB for
Mixtral-8x7B. The part of memory that grows with the layers is the router's output, 0.13 MB per branch. The
time is that of (L + 1) x tokens more tokens of calibration text.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import Floats
from mc_gguf.common.arrays import write_array
from mc_gguf.common.files import atomic_write
from mc_gguf.source.decoder import CHUNK, Decoder, Expert, RouterOutput

SENSITIVITY_TOKENS = 2048
Rows = TypeVar("Rows", NDArray[np.int32], Tensor)  # token ids, or their hidden states
# Directory of the layer under way; a killed run does not continue from what is in it.
WORKING = "working"
# Tokens whose logits (vocabulary of 32,000: 65 MB as float64) are in memory at once, for base and branch.
_LOGIT_TOKENS = 256
STEP, LEVELS = 1.05, 2
# Hidden units at a time: 1024 x 4096 weights x 4 bytes, three times.
_UNITS = 1024


def branch_rows(rows: Rows, tokens: int) -> Rows:
    """The rows that the branches run on: whole rows of `rows` [n_rows, ctx, ...], spread evenly over them,
    with up to `tokens` tokens together; the start of the first row if one row alone has more tokens.
    """
    ctx = min(rows.shape[1], tokens)
    n_rows = min(len(rows), tokens // ctx)
    return rows[np.linspace(0, len(rows) - 1, n_rows).round().astype(np.int64), :ctx]


class Branches:
    """Hidden states [n_rows, ctx, n_embd] float32 of the base and of two branches for every layer that is
    done, in files.

        branches-7/0.npy     the base after 7 layers
        branches-7/5.npy     the branch that starts at layer 2 with dropped experts
        branches-7/6.npy     the branch that starts at layer 2 with rounded experts
        working/3.npy        of the layer under way: the branch after attention, then after the layer
        working/added-3.npy  what the experts pushed so far add to it

    For every layer, call `enter`, then `push` for each expert, then `leave`. The files of the layer before
    stay as they are until the caller (CalibrationState) removes them.
    """

    def __init__(self, decoder: Decoder, directory: Path, rows: NDArray[np.int32], done: int = 0) -> None:
        """The branches of `rows` [n_rows, ctx]; `directory` holds their files after `done` layers."""
        self._decoder, self._directory, self._done = decoder, directory, done
        # The branch at hand and what the layer adds to it, in torch's own memory: alignment can change the
        # last bit of a product.
        self._hidden = torch.empty(*rows.shape, decoder.checkpoint.info.n_embd)
        self._added = torch.empty_like(self._hidden)
        self._rounded = torch.empty_like(self._hidden)
        self._error = 0.0
        self._routing: list[RouterOutput]
        self._norm: Tensor
        self._unrouted: Callable[[Tensor], Tensor]
        self._outputs: Tensor
        if done == 0:
            self._hidden.copy_(decoder.embed(rows))
            _write(self._file(0), self._hidden)

    @property
    def count(self) -> int:
        """Number of branches, including the base."""
        return 2 * self._done + 1

    def enter(self, layer: int) -> None:
        """Take all branches through attention and router of `layer`."""
        attention, route = self._decoder.attention_block(layer), self._decoder.router(layer)
        self._routing, self._norm = [], self._decoder.ffn_norm(layer)
        self._unrouted = self._decoder.unrouted(layer)
        self._working("").mkdir()
        self._error = 0.0
        for i in range(self.count):
            _read(self._file(i), self._hidden)
            attention(self._hidden)
            flat = self._hidden.flatten(0, 1)
            self._routing.append(route(flat))
            self._added.copy_(self._unrouted(flat).view_as(self._added))
            if i == 0:
                self._rounded.copy_(self._added)
            _write_working(self._working(f"{i}.npy"), self._hidden)
            _write_working(self._working(f"added-{i}.npy"), self._added)
        n_embd = self._hidden.shape[-1]
        self._outputs = torch.zeros(self._hidden.numel() // n_embd, self._decoder.shape.n_used, n_embd)

    def push(self, number: int, expert: Expert) -> None:
        """Add the output of one expert of the layer to the branches of its tokens."""
        flat, added = self._hidden.flatten(0, 1), self._added.flatten(0, 1)
        for i, routing in enumerate(self._routing):
            index, slots = torch.nonzero(routing.experts == number, as_tuple=True)
            if len(index) == 0:
                continue
            _read(self._working(f"{i}.npy"), self._hidden)
            _read(self._working(f"added-{i}.npy"), self._added)
            for tokens, ranks in zip(torch.split(index, CHUNK), torch.split(slots, CHUNK), strict=True):
                x = self._decoder.norm(flat[tokens], self._norm)
                y = expert.hidden(x) @ expert.down.T
                if i == 0:
                    self._outputs[tokens, ranks] = y
                    changed, weights = rounded_output(expert, x), routing.weights[tokens, ranks, None]
                    self._round(flat[tokens], tokens, y, changed, weights)
                added.index_add_(0, tokens, y.mul_(routing.weights[tokens, ranks, None]))
            _write_working(self._working(f"added-{i}.npy"), self._added)

    def _round(self, hidden: Tensor, tokens: Tensor, y: Tensor, changed: Tensor, weights: Tensor) -> None:
        """Add the error of one rounded expert.

        Args:
            hidden: [n, n_embd] the base's hidden states before the block.
            tokens: [n] numbers of the tokens.
            y: [n, n_embd] the expert's outputs.
            changed: [n, n_embd] the outputs of the rounded expert.
            weights: [n, 1] routing weights.

        Errors are relative to the same quantity as in layer.py: the hidden state plus this expert's share,
        because the shares of the others are not known there.
        """
        self._rounded.flatten(0, 1).index_add_(0, tokens, changed * weights)
        error = ((changed - y) * weights).square().sum(1, dtype=torch.float64)
        size = (hidden + y * weights).square().sum(1, dtype=torch.float64)
        self._error += float((error / size.clamp(min=1e-30)).sum())

    def leave(self, ratio_quantiles: Floats) -> tuple[Floats, float]:
        """End the layer and start its branches; `ratio_quantiles` [K-1, Q] are the layer's.

        Returns the curve [Q], and the relative error per token of the rounded experts, summed over the
        experts.
        """
        probs, flat = self._routing[0].probs, self._hidden.flatten(0, 1)
        _read(self._working("0.npy"), self._hidden)
        kept = self._kept(probs, ratio_quantiles[:, ratio_quantiles.shape[1] // 2])
        flat += torch.einsum("tk,tke->te", kept, self._outputs) + self._unrouted(flat)
        _write(self._working(f"{self.count}.npy"), self._hidden)
        _read(self._working("0.npy"), self._hidden)
        self._hidden += self._rounded
        _write(self._working(f"{self.count + 1}.npy"), self._hidden)
        for i in range(self.count):
            _read(self._working(f"{i}.npy"), self._hidden)
            _read(self._working(f"added-{i}.npy"), self._added)
            self._hidden += self._added
            _write(self._working(f"{i}.npy"), self._hidden)
            self._working(f"added-{i}.npy").unlink()
        self._done += 1
        self._working("").rename(branches_directory(self._directory, self._done))
        curve = self._curve(probs, ratio_quantiles)
        del self._routing, self._outputs, self._unrouted
        return curve, self._error / len(flat)

    def _file(self, branch: int) -> Path:
        return branches_directory(self._directory, self._done) / f"{branch}.npy"

    def _working(self, name: str) -> Path:
        return self._directory / WORKING / name

    def _kept(self, probs: Tensor, thresholds: Floats) -> Tensor:
        """Routing weights [n, K] after dropping the experts below `thresholds` [K-1]."""
        keep = probs[:, 1:] / probs[:, :1] >= torch.from_numpy(thresholds)
        return self._decoder.weights(torch.cat([probs[:, :1], probs[:, 1:] * keep], dim=1))

    def _curve(self, probs: Tensor, ratio_quantiles: Floats) -> Floats:
        """Errors relative to the error at the median. If the median drops nothing they are taken to grow with
        q.
        """
        n_quantile, whole = ratio_quantiles.shape[1], self._decoder.weights(probs)
        parts = torch.split(self._outputs.double(), _LOGIT_TOKENS)
        products = torch.cat([y @ y.mT for y in parts])  # [n, K, K]
        errors = np.zeros(n_quantile)
        for i in range(1, n_quantile):  # quantile 0 drops nothing
            change = (self._kept(probs, ratio_quantiles[:, i]) - whole).double()
            errors[i] = float(torch.einsum("tj,tjk,tk->", change, products, change))
        errors = np.maximum.accumulate(errors)
        middle = errors[n_quantile // 2]
        return np.asarray(errors / middle) if middle > 0 else np.linspace(0, 2, n_quantile)

    def divergences(self) -> Floats:
        """Mean KL(base || branch), in nats per token, of the two branches (dropped, rounded) of each layer:
        [L, 2].
        """
        logits, flat = self._decoder.output(), self._hidden.flatten(0, 1)
        total = np.zeros(self.count - 1)
        for first in range(0, len(flat), _LOGIT_TOKENS):
            part = flat[first : first + _LOGIT_TOKENS]
            _read(self._file(0), part, first)
            expected = torch.log_softmax(logits(part).double(), dim=-1)
            probs = expected.exp()
            for i in range(len(total)):
                _read(self._file(i + 1), part, first)
                found = torch.log_softmax(logits(part).double(), dim=-1)
                total[i] += float((probs * (expected - found)).sum())
        return np.maximum(total / len(flat), 0.0).reshape(self._done, 2)


def branches_directory(directory: Path, done: int) -> Path:
    """Where in `directory` the branches after `done` layers are: files 0.npy to 2 * `done`.npy."""
    return directory / f"branches-{done}"


def _read(path: Path, into: Tensor, first: int = 0) -> None:
    """Fill `into` [..., n_embd] with the hidden states in `path`, from token number `first` on."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(first * into.shape[-1] * into.element_size(), os.SEEK_CUR)
        if file.readinto(into.numpy().data) != into.nbytes:
            raise OSError(f"{path} ends too early; was it changed while calibration ran?")


def _write_working(path: Path, hidden: Tensor) -> None:
    """Write a file of a layer that is not done, which a killed run makes again."""
    with path.open("wb") as file:
        write_array(file, hidden.numpy())


def _write(path: Path, hidden: Tensor) -> None:
    """Write a file that a killed run continues from."""
    with atomic_write(path) as file:
        write_array(file, hidden.numpy())


def rounded_output(expert: Expert, x: Tensor) -> Tensor:
    """Output [n, n_embd] of the expert with rounded weights for x [n, n_embd]."""
    n_ff = len(expert.gate)
    output = torch.zeros(len(x), len(expert.down))
    down_step = _step(expert.down)
    for first in range(0, n_ff, _UNITS):
        part = slice(first, first + _UNITS)
        gate, up = (_rounded(m[part], _step(m[part])) for m in (expert.gate, expert.up))
        hidden = F.silu(x @ gate.T).mul_(x @ up.T)
        output += hidden @ _rounded(expert.down[:, part], down_step).T
    return output


def _step(matrix: Tensor) -> Tensor:
    """[rows, 1] step whose multiples the weights of each row are rounded to."""
    mean_square = matrix.square().mean(dim=1, keepdim=True)
    return mean_square.sqrt().mul(STEP).clamp(min=1e-30)


def _rounded(matrix: Tensor, step: Tensor) -> Tensor:
    return (matrix / step).round_().clamp_(-LEVELS, LEVELS).mul_(step)
