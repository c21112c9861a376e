"""An expert with coarsely rounded weights: a stand-in for a quantized one where only the size and the
direction of the error matter, not the type that made it.

Every row is rounded to multiples of STEP times its root mean square, at most LEVELS of them. The error is
about 10 % of the weights' energy, as for the types of 2 bits (IQ2_S 6.5 %, IQ2_XXS 12 %). ggml's quantizers
take hours for all rows of Mixtral-8x7B; rounding takes as long as reading the weights. Hidden units are
rounded piece by piece, so that no second expert is in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_gguf.source.decoder import Expert

STEP, LEVELS = 1.05, 2
# Hidden units at a time: 1024 x 4096 weights x 4 bytes, three times.
_UNITS = 1024


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
