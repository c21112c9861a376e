"""The error of every attention matrix under every type, measured during calibration's own forward pass.

For each of q, k, v and output of a layer, this is the squared error of what the attention block adds to the
hidden states, relative to the hidden state after it, per token on average, when this matrix alone has the
type. It has the same unit as the relative errors of experts, so the price of the layer (sensitivity.py)
serves for both; docs/explanation/allocation.md says what that is worth. Biases and norms stay as they are.

Whole matrices are measured on a few whole rows of text: the outputs of q and k go through a softmax, so the
errors of single rows of a matrix do not add up. The importance matrices come from all of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import ATTENTION, Floats, ModelInfo
from mc_gguf.calibrate.expert_errors import quantization_error
from mc_gguf.calibrate.finite import check_finite
from mc_gguf.calibrate.sensitivity import branch_rows
from mc_gguf.ggml.types import ATTENTION_CANDIDATES, TYPES
from mc_gguf.source.decoder import Decoder


def attention_types(info: ModelInfo) -> tuple[str, ...]:
    """Those of ATTENTION_CANDIDATES that fit the rows of some attention matrix, by size."""
    widths = {t.shape[0] for t in info.tensors if t.name in _names(info)}
    return tuple(name for name in ATTENTION_CANDIDATES if any(TYPES[name].fits(width) for width in widths))


def _names(info: ModelInfo) -> set[str]:
    return {f"blk.{layer}.attn_{part}.weight" for layer in range(info.n_layer) for part in ATTENTION}


@dataclass(eq=False)
class InputSquares:
    """Sums of squared inputs of the attention matrices, float64.

    Attributes:
        into: [n_embd] of q, k and v.
        mid: [attention_width] of the output matrix.
        tokens: number of tokens in the sums.
    """

    into: Tensor | float = 0.0
    mid: Tensor | float = 0.0
    tokens: int = 0

    def add(self, x: Tensor, mixed: Tensor) -> None:
        """Add the inputs x [rows, ctx, n_embd] and mixed [rows, ctx, attention_width] of some rows."""
        self.into = self.into + x.flatten(0, 1).square().sum(0, dtype=torch.float64)
        self.mid = self.mid + mixed.flatten(0, 1).square().sum(0, dtype=torch.float64)
        self.tokens += x.shape[0] * x.shape[1]

    def means(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean squared inputs: (`into`, `mid`)."""
        return _float32(self.into, self.tokens), _float32(self.mid, self.tokens)


def _float32(total: Tensor | float, tokens: int) -> NDArray[np.float32]:
    return (torch.as_tensor(total) / max(1, tokens)).float().numpy()


@dataclass(frozen=True, eq=False)
class AttentionMeasurement:
    """What was measured of one layer's attention.

    Attributes:
        errors: [4, A] of each matrix (ATTENTION) under each type, as `attention_errors` returns them.
        into: [n_embd] mean squared input of q, k and v.
        mid: [attention_width] mean squared input of the output matrix.
    """

    errors: Floats
    into: NDArray[np.float32]
    mid: NDArray[np.float32]


def run_attention(
    decoder: Decoder, layer: int, hidden: Tensor, tokens: int, threads: int = 1
) -> AttentionMeasurement:
    """Advance `hidden` [n_rows, ctx, n_embd] by the attention block, in place, and measure; the errors are
    measured on up to `tokens` tokens. Raises McError for values that are not finite.
    """
    few, squares = branch_rows(hidden, tokens).clone(), InputSquares()
    decoder.attention_block(layer, squares.add)(hidden)
    check_finite(hidden, "hidden states")
    into, mid = squares.means()
    for means in (into, mid):
        check_finite(torch.from_numpy(means), "squared inputs")
    types = attention_types(decoder.checkpoint.info)
    errors = attention_errors(decoder, layer, few, into, mid, types, threads)
    check_finite(errors[errors != np.inf], "errors of the types")  # infinite: the type does not fit
    return AttentionMeasurement(errors, into, mid)


def attention_errors(
    decoder: Decoder,
    layer: int,
    hidden: Tensor,
    into: NDArray[np.float32],
    mid: NDArray[np.float32],
    types: Sequence[str],
    threads: int = 1,
) -> Floats:
    """Mean relative errors [4, A] of the matrices (ATTENTION) under `types`; infinite where a row is not a
    whole number of blocks.

    Args:
        hidden: [n_rows, ctx, n_embd] the hidden states before the attention block.
        into: [n_embd] importance matrix of q, k and v.
        mid: [attention_width] importance matrix of output.
    """
    exact = decoder.attention_added(layer)(hidden)
    after_sq = (hidden + exact).square().sum(-1, dtype=torch.float64).clamp(min=1e-30)
    errors = np.full((len(ATTENTION), len(types)), np.inf)
    matrices = {part: decoder.attention_matrix(layer, part) for part in ATTENTION}
    for p, (part, matrix) in enumerate(matrices.items()):
        importance = mid if part == "output" else into
        for t, name in enumerate(types):
            if TYPES[name].fits(matrix.shape[1]):
                changed = matrix + quantization_error(matrix, name, importance, threads)
                added = decoder.attention_added(layer, {**matrices, part: changed})(hidden)
                error = (added - exact).square().sum(-1, dtype=torch.float64)
                errors[p, t] = float((error / after_sq).mean())
    return errors
