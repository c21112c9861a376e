"""What dropping experts does to a model, measured layer by layer beside calibration's own forward pass.

Sensitivity. A branch is what the hidden states would be if one layer had dropped its experts at the median
thresholds and no other any: branch 0, the base, drops nothing; layer l's branch starts at layer l as the base
with its dropped experts, and goes through the later layers with all the others. Each expert's weights are
read once for the statistics and the branches together. At the end the sensitivity of a layer is the mean KL
divergence (nats a token) of its branch's next-token distribution from the base's.

Curve. At every layer, from the base, the squared error of the MoE block's output when all slots of the ranks
from 1 on with w_j / w_0 below the quantile-q thresholds are dropped and the rest renormalised. With the
weights c_j that change by it and the experts' outputs y_j it is sum_jk c_j c_k <y_j, y_k>, so that one pass
gives it for every quantile.

Cost. The branches are (L+1) x tokens x n_embd x 4 bytes, and as much again for what a layer adds to them:
1.1 GB each for the 2,048 tokens on Mixtral-8x7B, and the time of (L/2 + 1) x tokens more tokens of
calibration text. Larger models get fewer tokens (BRANCH_BYTES), down to MIN_TOKENS.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import Floats
from mc_gguf.forward import CHUNK, Decoder, Expert, Routing

SENSITIVITY_TOKENS = 2048
MIN_TOKENS = 256
BRANCH_BYTES = 1_200_000_000
# Tokens whose logits (vocabulary of 32,000: 65 MB as float64) are in memory at once, for base and branch.
_LOGIT_TOKENS = 256


def branch_rows(rows: NDArray[np.int32], n_layer: int, n_embd: int, tokens: int) -> NDArray[np.int32]:
    """The rows that the branches run on: about `tokens` of `rows` [n_rows, ctx], spread evenly over them.

    Fewer where BRANCH_BYTES would not hold them, and the start of the rows where one alone is too long.
    """
    tokens = max(MIN_TOKENS, min(tokens, BRANCH_BYTES // ((n_layer + 1) * n_embd * 4)))
    ctx = min(rows.shape[1], tokens)
    n_rows = min(len(rows), tokens // ctx)
    return rows[np.linspace(0, len(rows) - 1, n_rows).round().astype(np.int64), :ctx]


class Branches:
    """Hidden states of the base and of one branch for every layer passed: [1 + layers, n_rows, ctx, n_embd].

    For every layer: enter, push each expert, leave.
    """

    def __init__(self, decoder: Decoder, hidden: Tensor) -> None:
        self.hidden = hidden
        self._decoder = decoder
        self._routing: Routing
        self._x: Tensor
        self._added: Tensor
        self._outputs: Tensor

    def enter(self, layer: int) -> None:
        """Attention and router of `layer`."""
        self._decoder.attention(layer, self.hidden.flatten(0, 1))
        flat = self.hidden.view(-1, self.hidden.shape[-1])
        self._routing, self._norm = self._decoder.route(layer, flat), self._decoder.ffn_norm(layer)
        self._added = torch.zeros_like(flat)
        n_base = len(flat) // len(self.hidden)
        self._outputs = torch.zeros(n_base, self._decoder.shape.n_used, flat.shape[1])

    def push(self, number: int, expert: Expert) -> None:
        """The tokens of one expert of the layer."""
        flat, n_base = self.hidden.view(-1, self.hidden.shape[-1]), len(self._outputs)
        index, slots = torch.nonzero(self._routing.experts == number, as_tuple=True)
        for tokens, ranks in zip(torch.split(index, CHUNK), torch.split(slots, CHUNK), strict=True):
            y = expert.hidden(self._decoder.norm(flat[tokens], self._norm)) @ expert.down.T
            base = int((tokens < n_base).sum())  # tokens ascend, the base's come first
            self._outputs[tokens[:base], ranks[:base]] = y[:base]
            self._added.index_add_(0, tokens, y.mul_(self._routing.weights[tokens, ranks, None]))

    def leave(self, ratio_quantiles: Floats) -> Floats:
        """Ends the layer and starts its branch; `ratio_quantiles` [K-1, Q] are the layer's. The curve [Q]."""
        n_base, n_quantile = len(self._outputs), ratio_quantiles.shape[1]
        probs = self._routing.probs[:n_base]
        kept = self._kept(probs, ratio_quantiles[:, n_quantile // 2])
        flat = self.hidden.view(-1, self.hidden.shape[-1])
        branch = flat[:n_base] + torch.einsum("tk,tke->te", kept, self._outputs)
        flat += self._added
        del self._added
        self.hidden = torch.cat([self.hidden, branch.view(1, *self.hidden.shape[1:])])
        return self._curve(probs, ratio_quantiles)

    def _kept(self, probs: Tensor, thresholds: Floats) -> Tensor:
        """Routing weights [n, K] after dropping what is below `thresholds` [K-1]."""
        keep = probs[:, 1:] / probs[:, :1] >= torch.from_numpy(thresholds)
        return self._decoder.weights(torch.cat([probs[:, :1], probs[:, 1:] * keep], dim=1))

    def _curve(self, probs: Tensor, ratio_quantiles: Floats) -> Floats:
        """Errors relative to the median's. Where the median drops nothing, as if they grew with q."""
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

    def sensitivity(self) -> Floats:
        """Mean KL(base || branch) in nats a token, of every layer [L]."""
        logits = self._decoder.output()
        base, *branches = self.hidden.flatten(1, 2)
        total = np.zeros(len(branches))
        for part in torch.split(torch.arange(len(base)), _LOGIT_TOKENS):
            expected = torch.log_softmax(logits(base[part]).double(), dim=-1)
            probs = expected.exp()
            for i, branch in enumerate(branches):
                found = torch.log_softmax(logits(branch[part]).double(), dim=-1)
                total[i] += float((probs * (expected - found)).sum())
        return np.maximum(total / len(base), 0.0)
