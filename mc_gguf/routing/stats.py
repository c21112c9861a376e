"""RoutingStats: how much dynamic expert routing has saved, by the runtime's counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Counts since the model was loaded or the counters were reset, while a policy other than off was set.

    A slot is one of the K experts that the router selected for a token in one layer; rank 0 has the largest
    weight. Layers without experts have zeros, and a model without experts has empty arrays.

    kept, dropped [n_layer, K]     slots
    protected [n_layer, K]         the part of `kept` that would have been dropped without protection
    expert_wanted [n_layer, E]     ubatches in which the expert would have been read without routing
    expert_read [n_layer, E]       ubatches in which the expert was read
    expert_bytes [n_layer, E]      bytes of the expert's matrices in the file; zeros when they are unknown
    """

    kept: Counts
    dropped: Counts
    protected: Counts
    expert_wanted: Counts
    expert_read: Counts
    expert_bytes: Counts

    @classmethod
    def of(cls, slots: Counts, experts: Counts, expert_bytes: Counts) -> RoutingStats:
        """From the arrays that run.routing_api.read_counters returns."""
        kept, dropped, protected = slots.swapaxes(0, 1)
        wanted, read = experts.swapaxes(0, 1)
        return cls(kept, dropped, protected, wanted, read, expert_bytes)

    @property
    def n_slots(self) -> int:
        """Slots that were routed, including those that were dropped."""
        return int(self.kept.sum() + self.dropped.sum())

    @property
    def dropped_share(self) -> float:
        """Share of all slots that were dropped; 0 when nothing was counted."""
        return _share(self.dropped, self.kept + self.dropped)

    @property
    def protected_share(self) -> float:
        """Share of all slots that were kept only because their token was protected."""
        return _share(self.protected, self.kept + self.dropped)

    @property
    def dropped_share_by_layer(self) -> NDArray[np.float64]:
        """[n_layer]"""
        total = (self.kept + self.dropped).sum(axis=1)
        return np.asarray(self.dropped.sum(axis=1) / np.maximum(total, 1), dtype=np.float64)

    @property
    def expert_bytes_not_read(self) -> float | None:
        """Share of the experts' bytes that would have been read from memory but were not.

        None when the sizes are unknown. In a prompt, an expert is read unless every token drops it, so there
        this is less than the share of dropped slots; with one token at a time it is the saving.
        """
        wanted = self.expert_wanted * self.expert_bytes
        if self.expert_wanted.any() and not wanted.any():
            return None
        return _share(wanted - self.expert_read * self.expert_bytes, wanted)

    def to_json(self) -> dict[str, Any]:
        """Shares, and the counts as lists with one entry per layer."""
        counts = {name: getattr(self, name).tolist() for name in ("kept", "dropped", "protected")}
        return {
            "slots": self.n_slots,
            "dropped_share": self.dropped_share,
            "protected_share": self.protected_share,
            "expert_bytes_not_read": self.expert_bytes_not_read,
            "dropped_share_by_layer": self.dropped_share_by_layer.tolist(),
            **counts,
        }

    def __str__(self) -> str:
        if not self.n_slots:
            return "nothing was routed"
        bytes_not_read = self.expert_bytes_not_read
        parts = [
            f"{self.dropped_share:.1%} of expert activations dropped",
            f"{self.protected_share:.1%} protected",
        ]
        if bytes_not_read is not None:
            parts.append(f"{bytes_not_read:.1%} of expert bytes not read")
        return ", ".join(parts)


def _share(part: Counts, whole: Counts) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else 0.0
