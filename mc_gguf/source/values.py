"""Weights that no model has: not a number, infinite, or beyond what can be computed with them.

Every tensor is checked whenever it is read: experts, router, attention, norms and embeddings alike. ggml's
quantizers square weights, and multiply the squares, in float32; F16 ends at 65,504. No trained model comes
near that, so one limit serves for all that is done with weights afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import SourceError
from mc_gguf.ggml.types import MAX_WEIGHT

# As integers, IEEE numbers without their signs have the same order, and infinity and what is no number come
# last. By type: how its bits are read, the largest weight, and the largest finite number.
_MAX_BITS = int(np.float32(MAX_WEIGHT).view(np.uint32))
_BITS: dict[str, tuple[Any, int, int]] = {
    "F32": (np.uint32, _MAX_BITS, 0x7F7FFFFF),
    "BF16": (np.uint16, _MAX_BITS >> 16, 0x7F7F),
    "F16": (np.uint16, 0x7BFF, 0x7BFF),
}
# Divisors of rotary frequencies. Some switch a frequency off with a huge one, and they are never rounded.
_FREQUENCIES = ("rope_freqs", "rope_factors")


def check_weights(
    path: Path, name: str, data: NDArray[Any], type_name: str, expert: int | None = None
) -> None:
    """Raises SourceError, which names the tensor, the expert and the worst weight, unless all weights are
    finite and at most MAX_WEIGHT.

    Args:
        path: the model, for the message.
        name: GGUF name of the tensor.
        data: the weights, or their bytes.
        type_name: F32, F16 or BF16.
        expert: which expert of a stack they belong to.
    """
    kind, limit, largest_finite = _BITS[type_name]
    if any(part in name for part in _FREQUENCIES):
        limit = largest_finite
    bits = data.reshape(-1).view(kind)
    if not bits.size or _largest(bits) <= limit:
        return
    magnitude = bits & ((1 << 8 * bits.itemsize - 1) - 1)
    n_bad, worst = int((magnitude > limit).sum()), bits[int(magnitude.argmax())]
    where = name if expert is None else f"{name}, expert {expert}"
    more = f", and {n_bad - 1} more weights like it" if n_bad > 1 else ""
    raise SourceError(
        f"{path}: {where}: {_number(worst, type_name):g}{more}; the source is damaged (weights are finite, "
        f"and at most {MAX_WEIGHT:.0f}): download it again"
    )


def _largest(bits: NDArray[Any]) -> int:
    """The largest of `bits` without their signs, in two passes that need no memory."""
    sign = 1 << 8 * bits.itemsize - 1
    positive, negative = int(bits.view(f"i{bits.itemsize}").max()), int(bits.max())
    return max(positive, negative - sign if negative >= sign else 0)


def _number(bits: Any, type_name: str) -> float:
    if type_name == "F16":
        return float(bits.view(np.float16))
    wide = np.uint32(int(bits) << 16) if type_name == "BF16" else bits
    return float(wide.view(np.float32))
