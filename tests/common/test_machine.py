"""How many threads are worth starting."""

from __future__ import annotations

import os

import pytest

from mc_gguf.common.machine import usable_cores


def test_no_more_than_the_process_may_use() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_follows_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    first = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {first})
    assert usable_cores() == 1


def test_without_affinity_counts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4096)  # more than any /sys lists
    assert usable_cores() == 4096
