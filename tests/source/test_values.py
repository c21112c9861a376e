"""Weights that no model has are found in every format, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf.common.errors import SourceError
from mc_gguf.source.values import check_weights

HERE = Path("model")


def _stored(values: Any, kind: str) -> np.ndarray:
    wide = np.asarray(values, dtype=np.float32)
    if kind == "BF16":
        return (wide.view(np.uint32) >> 16).astype(np.uint16)
    return wide.astype(np.float16) if kind == "F16" else wide


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 1e20, -1e30, 66000.0, -3.4e38])
def test_what_is_refused(kind: str, value: float) -> None:
    data = _stored(np.zeros(300), kind)
    check_weights(HERE, "t", data, kind)
    data[[17, 200]] = _stored([value, value], kind)
    with pytest.raises(SourceError, match=r"model: blk\.3\.up, expert 5: .*, and 1 more weights like it"):
        check_weights(HERE, "blk.3.up", data, kind, 5)
    with pytest.raises(SourceError):
        check_weights(HERE, "t", data.view(np.uint8), kind)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_what_is_fine(kind: str) -> None:
    fine = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 65280.0, -65280.0, 1.0]
    check_weights(HERE, "t", _stored(fine, kind), kind)
    check_weights(HERE, "t", _stored([], kind), kind)
    check_weights(HERE, "t", _stored([-1.0], kind), kind)


def test_the_worst_is_shown() -> None:
    data = np.array([1, 7e4, -1e30, 9e4], dtype=np.float32)
    with pytest.raises(SourceError, match=r"t: -1e\+30, and 2 more weights like it; the source is damaged"):
        check_weights(HERE, "t", data, "F32")


def test_frequencies_may_be_switched_off() -> None:
    check_weights(HERE, "rope_freqs.weight", np.array([1e30], dtype=np.float32), "F32")
    with pytest.raises(SourceError):
        check_weights(HERE, "rope_freqs.weight", np.array([np.inf], dtype=np.float32), "F32")
