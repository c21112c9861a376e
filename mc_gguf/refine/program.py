"""The types that minimise an Expansion within a budget of bytes: local search by single and paired steps.

    minimise  sum_i g[i, t_i] + (1 + damping - coupling)/2 sum_i sum_s d[s, i, t_i]^2
              + coupling/2 sum_s (sum_i d[s, i, t_i])^2,      d[s, i, t] = v[s, i, t] - v[s, i, c_i]

c is the incumbent. Products between different matrices are estimated from few draws, so they count with a
weight of at most 1. Damping, as in the Levenberg-Marquardt method, keeps the step where the expansion holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Floats

Ints = NDArray[np.int64]
# Steps up and down that are paired with each other.
N_PAIRED = 256
MAX_STEPS = 10_000


@dataclass(frozen=True, eq=False)
class Program:
    """N matrices, T types, S draws.

    `linear` [N, T]    gradient times change, nats per token; inf: not allowed
    `draws` [S, N, T]  samples whose products estimate the curvature
    `size` [N, T]      bytes; 0: not allowed
    """

    linear: Floats
    draws: NDArray[np.float32]
    size: Ints
    coupling: float
    damping: float

    def minimise(self, start: Ints, capacity: int) -> Ints:
        """The choice [N] that is reached from `start`, within `capacity` bytes, where no step or pair of
        steps helps.
        """
        descent = _Descent(self, start.copy(), capacity)
        for _ in range(MAX_STEPS):
            if not descent.step():
                break
        return descent.choice


class _Descent:
    """The choice [N] on its way down, and the tables that every step needs."""

    def __init__(self, program: Program, choice: Ints, capacity: int) -> None:
        self.program, self.choice, self.capacity = program, choice, capacity
        self.items = np.arange(len(choice))
        self.linear = np.where(program.size > 0, program.linear, np.inf)
        self.draws = program.draws - program.draws[:, self.items, choice][..., None]
        self.own = np.square(self.draws, dtype=np.float64).sum(axis=0)
        self.fixed = self.linear + (1 - program.coupling + program.damping) / 2 * self.own
        # These are products of float32: below this tolerance a step and its reverse could both seem to help.
        self.tolerance = 1e-5 * float(self.own[np.isfinite(self.linear)].max(initial=0.0))

    def step(self) -> bool:
        """Take the best single step or pair of steps; False when none helps."""
        size, coupling, now = self.program.size, self.program.coupling, (self.items, self.choice)
        here = self.draws[:, self.items, self.choice]
        cross = np.tensordot(here.sum(axis=1), self.draws, axes=1).astype(np.float64)
        product = np.matmul(here.T[:, None], self.draws.transpose(1, 0, 2))[:, 0]
        distance = self.own - 2 * product + self.own[now][:, None]
        cost = self.fixed - self.fixed[now][:, None]
        cost = cost + coupling * (cross - cross[now][:, None] + distance / 2)
        added = size - size[now][:, None]
        room = self.capacity - int(size[now].sum())
        single, pair = self._best_single(cost, added, room), self._best_pair(cost, added, room, here)
        value, steps = min(single, pair, key=lambda found: found[0])
        if value >= -self.tolerance:
            return False
        for item, option in steps:
            self.choice[item] = option
        return True

    def _best_single(self, cost: Floats, added: Ints, room: int) -> tuple[float, list[tuple[int, int]]]:
        fitting = np.where(added <= room, cost, np.inf)
        item, option = divmod(int(fitting.argmin()), cost.shape[1])
        return float(fitting[item, option]), [(item, option)]

    def _best_pair(
        self, cost: Floats, added: Ints, room: int, here: NDArray[np.float32]
    ) -> tuple[float, list[tuple[int, int]]]:
        finite = np.isfinite(cost)
        up = _first(np.where(finite & (cost < 0), cost, np.inf))
        per_byte = np.maximum(cost, 0.0) / np.maximum(-added, 1)
        down = _first(np.where(finite & (added < 0), per_byte, np.inf))
        if not len(up[0]) or not len(down[0]):
            return np.inf, []
        changes = [self.draws[:, i, t] - here[:, i] for i, t in (up, down)]
        value = cost[up][:, None] + cost[down][None] + self.program.coupling * (changes[0].T @ changes[1])
        allowed = (added[up][:, None] + added[down][None] <= room) & (up[0][:, None] != down[0][None])
        value = np.where(allowed, value, np.inf)
        i, j = divmod(int(value.argmin()), value.shape[1])
        return float(value[i, j]), [(int(up[0][i]), int(up[1][i])), (int(down[0][j]), int(down[1][j]))]


def _first(order: Floats) -> tuple[Ints, Ints]:
    """The (item, option) of the N_PAIRED least finite values."""
    best = np.argsort(order, axis=None, kind="stable")[:N_PAIRED]
    best = best[np.isfinite(order.reshape(-1)[best])]
    items, options = np.divmod(best, order.shape[1])
    return items, options
