"""What the expansions of all rounds together say about the current incumbent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Floats
from mc_gguf.common.files import atomic_write
from mc_gguf.refine.expansion import Expansion, Ints, Singles

# A gradient counts half as much with every round that has passed, because carrying it over is an estimate.
DECAY = 0.5
# Beyond this, draws are dropped, the oldest first.
MAX_BYTES = 1 << 28


class Memory:
    """Draws of all rounds, and the gradient carried along with the incumbent."""

    def __init__(self, n_matrix: int, n_type: int) -> None:
        self.draws: Singles = np.zeros((0, n_matrix, n_type), dtype=np.float32)
        self.gradient: Floats = np.zeros((n_matrix, n_type))
        self.weight = 0.0
        self.choice: Ints = np.zeros(n_matrix, dtype=np.int64)

    def scaled(self) -> Singles:
        """Draws [S, N, T] such that the curvature is 1/2 sum_s (...)^2."""
        return self.draws / np.float32(max(1, len(self.draws)) ** 0.5)

    def add(self, expansion: Expansion) -> None:
        """Add the expansion of one more round."""
        draws = np.concatenate([self.draws, expansion.draws])
        most = max(len(expansion.draws), MAX_BYTES // max(1, draws[0].nbytes)) if len(draws) else 0
        self.draws = draws[-most:] if most else draws
        self.move(expansion.choice)
        before = self.weight * DECAY
        share = before / (1 + before)
        unknown = np.isinf(expansion.gradient)
        self.gradient = np.where(
            unknown, np.inf, share * np.where(unknown, 0, self.gradient) + (1 - share) * expansion.gradient
        )
        self.weight = 1 + before

    def move(self, choice: Ints) -> None:
        """Carry the gradient over to another incumbent."""
        if self.weight and (choice != self.choice).any():
            items, draws = np.arange(len(choice)), self.scaled()
            shift = (draws[:, items, choice] - draws[:, items, self.choice]).sum(axis=1)
            self.gradient = self.gradient + np.tensordot(shift, draws, axes=1)
        self.choice = choice.copy()

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            np.savez(file, draws=self.draws, gradient=self.gradient, weight=self.weight, choice=self.choice)

    @classmethod
    def load(cls, path: Path, shape: tuple[int, int]) -> Memory:
        """What save() wrote; empty when there is nothing, or when it has another shape."""
        memory = cls(*shape)
        if not path.is_file():
            return memory
        with np.load(path, allow_pickle=False) as found:
            if found["gradient"].shape == shape:
                memory.draws, memory.gradient = found["draws"], found["gradient"]
                memory.weight, memory.choice = float(found["weight"]), found["choice"]
        return memory


def wanted_types(size: NDArray[np.int64], columns: Ints, reach: int) -> NDArray[np.bool_]:
    """Which types [L, E, 3, T] are worth measuring: those at most `reach` sizes away from the incumbent's."""
    result = np.zeros((*columns.shape, size.shape[1]), dtype=bool)
    for p in range(size.shape[0]):
        rank = np.unique(size[p], return_inverse=True)[1]
        near = abs(rank[None, None] - rank[columns[..., p]][..., None]) <= reach
        result[:, :, p] = near & (size[p] > 0)
    return result
