"""RoutingStats on counts small enough to check by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mc_gguf.routing import RoutingStats

SLOTS = np.array([[[10, 4], [0, 6], [0, 1]], [[10, 10], [0, 0], [0, 0]]])  # two layers, two ranks
EXPERTS = np.array([[[3, 5, 0], [2, 1, 0]], [[4, 0, 4], [4, 0, 4]]])
BYTES = np.array([[100, 10, 1000], [1, 1, 1]])


def stats(**changes: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> RoutingStats:
    return RoutingStats.of(
        changes.get("slots", SLOTS), changes.get("experts", EXPERTS), changes.get("expert_bytes", BYTES)
    )


def test_shares() -> None:
    found = stats()
    assert found.kept.tolist() == [[10, 4], [10, 10]]
    assert found.dropped.tolist() == [[0, 6], [0, 0]]
    assert found.protected.tolist() == [[0, 1], [0, 0]]
    assert found.n_slots == 40
    assert found.dropped_share == 6 / 40
    assert found.protected_share == 1 / 40
    assert found.dropped_share_by_layer.tolist() == [0.3, 0.0]
    assert found.expert_bytes_not_read == pytest.approx((100 + 4 * 10) / (350 + 8))


def test_text_and_json() -> None:
    assert str(stats()) == (
        "15.0% of expert activations dropped, 2.5% protected, 39.1% of expert bytes not read"
    )
    found = json.loads(json.dumps(stats().to_json()))
    assert found["kept"] == [[10, 4], [10, 10]]
    assert found["slots"] == 40
    assert found["dropped_share"] == 0.15
    assert found["dropped_share_by_layer"] == [0.3, 0.0]
    assert found["expert_bytes_not_read"] == pytest.approx(140 / 358)


def test_unknown_sizes_are_said_to_be_unknown() -> None:
    found = stats(expert_bytes=np.zeros_like(BYTES))
    assert found.expert_bytes_not_read is None
    assert str(found) == "15.0% of expert activations dropped, 2.5% protected"


@pytest.mark.parametrize("n_layer", [0, 2])
def test_nothing_counted(n_layer: int) -> None:
    found = RoutingStats.of(SLOTS[:n_layer] * 0, EXPERTS[:n_layer] * 0, BYTES[:n_layer])
    assert found.n_slots == 0
    assert found.dropped_share == found.protected_share == found.expert_bytes_not_read == 0
    assert found.dropped_share_by_layer.tolist() == [0.0] * n_layer
    assert str(found) == "nothing was routed"
