"""Fixtures of the tests of quantize."""

from __future__ import annotations

import pytest

from tests.support.gguf_models import RandomCheckpoint


@pytest.fixture(scope="module")
def wide() -> RandomCheckpoint:
    """Rows of 256, so that every type fits."""
    return RandomCheckpoint(2, 5, n_embd=256, n_ff=256)
