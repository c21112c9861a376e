"""Whether what the graph shows of the experts' function is what the runtime computed: for a few tokens, the
products that the function is evaluated for must give the captured inputs of down.
"""

from __future__ import annotations

import numpy as np
import torch

from mc_gguf.calibrate.routed import Routing
from mc_gguf.capture.expert import read_expert
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.source import Checkpoint

# How far a right function's values may be from the runtime's, which multiplies in 16 bits, or in 8.
TOLERANCE = 0.05


def verified_function(checkpoint: Checkpoint, routing: Routing) -> tuple[ExpertFunction | None, str]:
    """The function of a layer's experts, or None and the reason."""
    rows = routing.rows
    function, middle = rows.function, torch.from_numpy(rows.middle)
    if function is None:
        return None, f"the operation {rows.unknown} is not known"
    error = total = 0.0
    for number in np.unique(routing.experts[: len(middle)]):
        tokens, slots = np.nonzero(routing.experts[: len(middle)] == number)
        expert = read_expert(checkpoint, rows.layer, int(number), function)
        expected = middle[tokens, slots]
        found = expert.hidden(rows.inputs(tokens, slots))
        error += float((found - expected).square().sum(dtype=torch.float64))
        total += float(expected.square().sum(dtype=torch.float64))
    if error <= TOLERANCE**2 * total:
        return function, ""
    return None, f"{function.text} differs from what the runtime computes by {(error / total) ** 0.5:.2g}"
