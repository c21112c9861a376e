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
from mc_gguf.ggml.types import MAX_WEIGHT, TYPES_BY_NAME

# As integers, IEEE numbers without their signs have the same order, and infinity and what is no number come
# last. By type: how its bits are read, the largest weight, and the largest finite number.
_MAX_BITS = int(np.float32(MAX_WEIGHT).view(np.uint32))
_BITS: dict[str, tuple[Any, int, int]] = {
    "F32": (np.uint32, _MAX_BITS, 0x7F7FFFFF),
    "BF16": (np.uint16, _MAX_BITS >> 16, 0x7F7F),
    "F16": (np.uint16, 0x7BFF, 0x7BFF),
}
# Types of what is no weight.
NUMBERS: dict[str, Any] = {
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    "F64": np.float64,
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


def as_float32(raw: NDArray[np.uint8], type_name: str, cols: int) -> NDArray[np.float32]:
    """The flat weights that bytes of a ggml type stand for, in rows of `cols`."""
    if type_name == "BF16":
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    kind = NUMBERS.get(type_name, {"F32": np.float32, "F16": np.float16}.get(type_name))
    if kind is not None:
        plain: NDArray[np.float32] = raw.view(kind).astype(np.float32, copy=False)
        return plain
    from mc_gguf.ggml.quantizers import dequantize_rows

    return dequantize_rows(raw, type_name, cols, len(raw) // TYPES_BY_NAME[type_name].row_bytes(cols))
