"""Strategy `mc`: the published allocation (Mixture Compressor, arXiv 2410.06270), solved exactly.

For every layer: minimise sum_i phi_i^a * w_i^b * eps_ij^g over the nominal bits j in {1, 2, 3} of expert i,
subject to sum_i j_i <= N, at least one expert of 3 bits and one of 2. phi is the expert's share of the
layer's routed tokens, w its share of the routing weight, eps the Frobenius norm of the change of the
block's output. The published allocations come from (a, b, g) = (1, 1.5, 1). The best and the second-best
allocation may differ by as little as 2e-6 of their cost, so only an exact solution reproduces them: a
dynamic program over (bits left, has a 3-bit expert, has a 2-bit expert).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import NOMINAL_BITS, NOMINAL_TYPES, Calibration
from mc_gguf.common.errors import ArtifactError, BudgetError
from mc_gguf.plan.solver import Floats, Ints

EXPONENTS = (1.0, 1.5, 1.0)  # of phi, w and eps
# The bit of the state that an expert of 1, 2 or 3 bits sets.
_FLAGS = (0, 1, 2)


def bits_range(n_expert: int) -> tuple[int, int]:
    """Least and greatest sum of bits in a layer: (one 3, one 2, the rest 1) and (one 2, the rest 3)."""
    return n_expert + 3, 3 * n_expert - 1


def published_cost(calibration: Calibration) -> Floats:
    """Cost [L, E, 3] of giving an expert 1, 2 or 3 bits. Raises ArtifactError when it was not measured."""
    if not calibration.has("nominal_error") or not np.isfinite(calibration.nominal_error).all():
        raise ArtifactError(
            "this calibration has no errors for nominal 1, 2 and 3 bits, which strategy mc needs: "
            f"calibrate again with {', '.join(NOMINAL_TYPES)} among the types"
        )
    token_share = share(calibration.frequency)
    weight_share = share(calibration.routing_weight)
    a, b, g = EXPONENTS
    return np.asarray((token_share**a * weight_share**b)[..., None] * calibration.nominal_error**g)


def share(values: Floats) -> Floats:
    """Each expert's share [L, E] of its layer's sum."""
    total = values.sum(axis=1, keepdims=True)
    return np.asarray(values / np.maximum(total, np.finfo(np.float64).tiny))


def check_bits(n_expert: int, bits_per_layer: int) -> None:
    """Raise BudgetError outside the feasible range. One bit more than can be used is accepted, too."""
    if n_expert < 2:
        raise BudgetError(
            "strategy mc gives one expert 3 bits and another 2: it needs at least 2 experts per layer"
        )
    low, high = bits_range(n_expert)
    if not low <= bits_per_layer <= high + 1:
        raise BudgetError(
            f"{bits_per_layer} bits per layer of {n_expert} experts is not feasible: with one expert of "
            f"3 bits, one of 2 and the others of 1 to 3, the range is {low} to {high}"
        )


def solve_layers(cost: Floats, bits_per_layer: int) -> Ints:
    """Bits [L, E] of least cost with at most `bits_per_layer` in every layer."""
    check_bits(cost.shape[1], bits_per_layer)
    return _walk_back(_tables(cost, bits_per_layer), bits_per_layer)


def solve_all(cost: Floats) -> Iterator[Ints]:
    """Bits [L, E] for every feasible budget, the largest first; one table serves them all."""
    low, high = bits_range(cost.shape[1])
    check_bits(cost.shape[1], high)
    tables = _tables(cost, high)
    return (_walk_back(tables, budget) for budget in range(high, low - 1, -1))


def _tables(cost: Floats, budget: int) -> NDArray[np.int8]:
    """The best last step [E, L, budget + 1, 4], by expert, layer, bits used up to this expert, and state.

    A step is 4 * bits + the state before it.
    """
    n_layer, n_expert, _ = cost.shape
    best = np.full((n_layer, budget + 1, 4), np.inf)
    best[:, :, 0] = 0.0
    picked = np.zeros((n_expert, n_layer, budget + 1, 4), dtype=np.int8)
    for i in range(n_expert):
        following = np.full_like(best, np.inf)
        for bits, flag, price in zip(NOMINAL_BITS, _FLAGS, cost[:, i].T, strict=True):
            reached = best[:, : budget + 1 - bits] + price[:, None, None]
            for state in range(4):
                target = following[:, bits:, state | flag]
                better = reached[:, :, state] < target
                target[better] = reached[:, :, state][better]
                picked[i, :, bits:, state | flag][better] = bits * 4 + state
        best = following
    return picked


def _walk_back(picked: NDArray[np.int8], budget: int) -> Ints:
    n_expert, n_layer = picked.shape[:2]
    layers = np.arange(n_layer)
    left, state = np.full(n_layer, budget), np.full(n_layer, 3)
    bits = np.zeros((n_layer, n_expert), dtype=np.int64)
    for i in reversed(range(n_expert)):
        bits[:, i], state = np.divmod(picked[i, layers, left, state], 4)
        left = left - bits[:, i]
    return bits
