"""Measured values that float32 cannot hold, said with the layer, the expert and the step that made them.

Weights are checked when they are read (source/values.py), but activations are products of many of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.common.errors import McError, SourceError

_LARGEST = float(np.finfo(np.float32).max)


@contextmanager
def place(layer: int, step: str) -> Iterator[None]:
    """Errors raised in the block begin with the layer and the step, "layer 3, expert 5"."""
    try:
        yield
    except SourceError:
        raise  # of a tensor, which it names
    except McError as error:
        raise SourceError(f"layer {layer}, {step}: {error}", parameter=error.parameters) from error


def check_finite(values: Tensor | NDArray[np.float64] | float, what: str) -> None:
    """Raises McError unless all `values` are numbers that float32 can hold; `what` says what they are."""
    largest = _largest(values)
    if not largest <= _LARGEST:  # neither is what is no number
        raise McError(
            f"{what} reach {largest:g}, which float32 cannot hold, although no single weight is too large; "
            "the source is damaged: download it again"
        )


def _largest(values: Tensor | NDArray[np.float64] | float) -> float:
    if isinstance(values, Tensor):
        return float(torch.linalg.vector_norm(values, ord=torch.inf)) if values.numel() else 0.0
    return float(np.abs(values).max(initial=0.0))
