"""The tokens of a layer as its router sent them to experts, from a spool.

The runtime's thresholds (ODP) compare the router's weights before they are renormalised (`probs`), and then
renormalise what is left where the model does so. Whether it does is not written in every file's metadata: it
follows from the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Floats
from mc_gguf.capture.capture import LayerRows

Numbers = NDArray[np.int64]
_SAME = 1e-3  # relative: what float32 leaves of equal numbers


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """Tokens of one expert: their numbers, the slots in which they have it, and float64 arrays [n]: the
    router's weight of the expert before it is renormalised, and what multiplies the expert's output.
    """

    index: Numbers
    slots: Numbers
    probs: Floats
    weights: Floats

    def __len__(self) -> int:
        return len(self.index)


class Routing:
    """Which tokens of a layer go to which experts.

    Attributes:
        rows: the layer's part of the spool.
        experts: [N, K] the selected experts, in the runtime's order.
        probs: [N, K] their weights before they are renormalised, float64.
        weights: [N, K] what multiplies their outputs, float64; where inputs are weighted, ones.
    """

    def __init__(self, rows: LayerRows) -> None:
        self.rows = rows
        self.experts = rows.experts
        self.probs: Floats = rows.probs.astype(np.float64)
        self.weights: Floats = rows.weights.astype(np.float64)
        order = np.argsort(self.experts.reshape(-1), kind="stable")
        self._slots = order
        self._starts = np.searchsorted(
            self.experts.reshape(-1)[order], np.arange(int(self.experts.max(initial=0)) + 2)
        )

    def tokens_of(self, expert: int) -> RoutedTokens:
        """The tokens that are routed to `expert`, ascending."""
        starts = self._starts
        flat = (
            self._slots[starts[expert] : starts[expert + 1]] if expert + 1 < len(starts) else self._slots[:0]
        )
        index, slots = np.divmod(flat, self.experts.shape[1])
        return RoutedTokens(index, slots, self.probs[index, slots], self.weights[index, slots])

    @cached_property
    def renormalises(self) -> bool:
        """Whether the routing weights of a token are made to sum up to a constant, also when some of its
        experts are dropped. Of weighted inputs it is not known; the models that have them do not.
        """
        positive = self.probs > 0
        if self.rows.has_weighted_input or not positive.any():
            return False
        if self._has_logits:
            return True
        ratio = self.weights[positive] / self.probs[positive]
        return bool(np.ptp(ratio) > _SAME * np.abs(ratio).max(initial=0.0))

    @cached_property
    def sorted_probs(self) -> Floats:
        """[N, K] largest first."""
        return np.asarray(-np.sort(-self.probs, axis=1))

    def changes(self, thresholds: Floats) -> Floats:
        """[N, K] relative change of the routing weights when the experts below `thresholds` [K-1] are dropped
        and what is left is renormalised as the model does.
        """
        order = np.argsort(-self.probs, axis=1, kind="stable")
        ranked = np.take_along_axis(self.probs, order, axis=1)
        keep = np.ones(ranked.shape)
        keep[:, 1:] = ranked[:, 1:] >= thresholds * ranked[:, :1]
        if self.renormalises:
            total = ranked.sum(axis=1, keepdims=True)
            keep *= total / np.maximum((ranked * keep).sum(axis=1, keepdims=True), 1e-30)
        changes = np.empty_like(keep)
        np.put_along_axis(changes, order, keep - 1, axis=1)
        return changes

    def nearest(self, expert: int, count: int, excluded: NDArray[np.bool_] | None = None) -> RoutedTokens:
        """Up to `count` tokens that are not routed to `expert` but come nearest to it, by the router's
        probability, nearest first.

        Their weights are what the runtime would compute if the expert took the place of the last one that the
        token uses. `excluded` [N] marks tokens that are left out.
        """
        router = self.rows.router
        all_probs = router[:, expert].astype(np.float64)
        possible = ~(self.experts == expert).any(axis=1)
        if excluded is not None:
            possible &= ~excluded
        candidates = np.flatnonzero(possible)
        order = np.argsort(-all_probs[candidates], kind="stable")[:count]
        index = candidates[order]
        last = self.probs[index].argmin(axis=1)
        taken = self.probs[index, last]
        probs = all_probs[index]
        if self._has_logits:
            selected = router[index, self.experts[index, last]].astype(np.float64)
            probs = taken * np.exp(np.minimum(probs - selected, 0.0))
        probs = np.clip(probs, 0.0, None)
        weights = self.weights[index, last]
        factor = np.divide(probs, taken, out=np.zeros_like(probs), where=taken > 0)
        if self.renormalises:
            total = self.probs[index].sum(axis=1)
            factor = factor * total / np.maximum(total - taken + probs, 1e-30)
        return RoutedTokens(index, last, probs, weights * factor)

    @cached_property
    def _has_logits(self) -> bool:
        """Whether the router's numbers are logits: a softmax over the selected ones gives the weights."""
        few = slice(0, 64)
        found = np.take_along_axis(
            np.asarray(self.rows.router[few], dtype=np.float64), self.experts[few].astype(np.int64), axis=1
        )
        return not np.allclose(found, self.probs[few], rtol=0.02, atol=1e-3)
