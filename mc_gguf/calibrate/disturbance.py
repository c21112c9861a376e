"""What quantizing and dropping experts changes in a layer's output, token by token, for the tokens that the
price of the layer is measured with (capture/price.py).

Rounding. An expert with coarsely rounded weights is a stand-in for a quantized one, because only the size and
the direction of the error matter here, not the type that made it. Every row is rounded to multiples of STEP
times its root mean square, at most LEVELS of them. The error is about 10 % of the weights' energy, as for the
types of 2 bits (IQ2_S 6.5 %, IQ2_XXS 12 %). ggml's quantizers take hours for all rows of Mixtral-8x7B;
rounding takes as long as reading the weights. Hidden units are rounded piece by piece, so that no second
expert is in memory.

Dropping. Of the outputs y_j of a token's experts, which the runtime computed, and the changes c_j of their
weights, it is the sum of c_j y_j. Curve: for every quantile of w_j / w_0, the squared error of the block's
output when all experts at rank 1 or later below that threshold are dropped. It is sum_jk c_j c_k <y_j, y_k>,
so that one pass gives it for every quantile.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import Floats
from mc_gguf.calibrate.routed import Routing
from mc_gguf.capture.expert import Expert

SENSITIVITY_TOKENS = 2048
STEP, LEVELS = 1.05, 2
# Hidden units at a time: 1024 x 4096 weights x 4 bytes, three times.
_UNITS = 1024
_PART = 256  # tokens whose outputs are multiplied with each other at once


class Disturbance:
    """The changes of one layer's output, for the sampled tokens `samples` [S].

    Attributes:
        rounded: [S, n_embd] when all experts are rounded.
        error: its squared size relative to the hidden states, summed over tokens and experts.
    """

    def __init__(self, routing: Routing, samples: NDArray[np.int64], n_embd: int) -> None:
        self.routing, self.samples = routing, samples
        self.rounded = torch.zeros(len(samples), n_embd)
        self.error = 0.0
        self._place = np.full(len(routing.experts), -1, dtype=np.int64)
        self._place[samples] = np.arange(len(samples))

    def add_rounded(self, number: int, expert: Expert) -> None:
        """Add the error of one expert."""
        tokens = self.routing.tokens_of(number)
        place = self._place[tokens.index]
        mine = place >= 0
        if not mine.any():
            return
        index, slots, place = tokens.index[mine], tokens.slots[mine], place[mine]
        rows = self.routing.rows
        x = rows.inputs(index, slots)
        change = rounded_output(expert, x) - expert.output(expert.hidden(x))
        change *= torch.from_numpy(tokens.weights[mine]).float()[:, None]
        size = torch.from_numpy(rows.hidden_sq[index].astype(np.float64)).clamp(min=1e-30)
        self.error += float((change.square().sum(1, dtype=torch.float64) / size).sum())
        self.rounded.index_add_(0, torch.from_numpy(place), change)

    def dropped(self, thresholds: Floats) -> Tensor:
        """[S, n_embd] when the experts below `thresholds` [K-1] are dropped."""
        changes = torch.from_numpy(self.routing.changes(thresholds)[self.samples]).float()
        return torch.einsum("tk,tke->te", changes, self.routing.rows.sampled_outputs())

    def curve(self, ratio_quantiles: Floats) -> Floats:
        """[Q] errors relative to the error at the median, for the thresholds `ratio_quantiles` [K-1, Q]. If
        the median drops nothing they are taken to grow with q.
        """
        n_quantile = ratio_quantiles.shape[1]
        outputs = self.routing.rows.sampled_outputs()
        parts = (part.double() for part in torch.split(outputs, _PART))
        products = torch.cat([y @ y.mT for y in parts])  # [S, K, K]
        part = _of_samples(self.routing, self.samples)
        errors = np.zeros(n_quantile)
        for i in range(1, n_quantile):  # quantile 0 drops nothing
            change = torch.from_numpy(part.changes(ratio_quantiles[:, i]))
            errors[i] = float(torch.einsum("tj,tjk,tk->", change, products, change))
        errors = np.maximum.accumulate(errors)
        middle = errors[n_quantile // 2]
        return np.asarray(errors / middle) if middle > 0 else np.linspace(0, 2, n_quantile)


class _of_samples(Routing):
    """The routing of some tokens alone, without their rows."""

    def __init__(self, routing: Routing, samples: NDArray[np.int64]) -> None:
        self.experts = routing.experts[samples]
        self.probs, self.weights = routing.probs[samples], routing.weights[samples]
        self.renormalises = routing.renormalises


def rounded_output(expert: Expert, x: Tensor) -> Tensor:
    """Output [n, n_embd] of the expert with rounded weights for x [n, n_embd]."""
    output = torch.zeros(len(x), len(expert.down))
    down_step = _step(expert.down)
    for first in range(0, expert.n_ff, _UNITS):
        units = torch.arange(first, min(expert.n_ff, first + _UNITS))
        products = {}
        for projection in expert.inner:
            rows = expert.matrices[projection][expert.rows_of(projection, units)]
            products[projection] = x @ rounded(rows).T
        output += expert.hidden_of(products, units) @ _rounded(expert.down[:, units], down_step).T
    return output.mul_(expert.output_scale)


def rounded(matrix: Tensor) -> Tensor:
    """The matrix with every row rounded."""
    return _rounded(matrix, _step(matrix))


def _step(matrix: Tensor) -> Tensor:
    """[rows, 1] step whose multiples the weights of each row are rounded to."""
    mean_square = matrix.square().mean(dim=1, keepdim=True)
    return mean_square.sqrt().mul(STEP).clamp(min=1e-30)


def _rounded(matrix: Tensor, step: Tensor) -> Tensor:
    return (matrix / step).round_().clamp_(-LEVELS, LEVELS).mul_(step)
