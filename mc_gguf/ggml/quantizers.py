"""ggml's own quantizers for numpy arrays: from rows to blocks, and back.

Every row is quantized by itself, so the bytes do not depend on how the rows are spread over threads; ctypes
releases the GIL while ggml works.

Whatever makes ggml call abort(), or write zeros without a word, is refused here first: weights that are not
finite or beyond F16 (ggml squares them, and multiplies the squares, in float32: from 1e15 on, IQ2 and IQ3
abort, and IQ1, Q3_K and IQ4_XS give zeros), a missing importance matrix, rows that are not whole blocks.
Importance matrices with very large or small values are scaled: only their ratios count.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from mc_gguf import runtime
from mc_gguf.common.errors import McError
from mc_gguf.ggml.types import MAX_WEIGHT, TYPES, TYPES_BY_NAME, GgmlType, ggml_type

# Rows are handed to a thread in pieces of about this many weights: small enough to balance the threads, large
# enough to make the overhead negligible.
_PIECE_WEIGHTS = 1 << 20
# The largest importance is scaled into this range unless it lies there. A power of two changes no result.
_MAX_EXPONENT = 10
# Where a matrix has no larger weight, ggml's scales, which are F16, become coarse and at last zero.
_SMALL = 2.0**-10
_UNLIMITED = ("F32", "BF16")  # types that hold all that float32 does

log = logging.getLogger(__name__)
_initialised: set[str] = set()
_init_lock = threading.Lock()


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _ggml() -> ctypes.CDLL:
    library = runtime.load_ggml_base()
    runtime.check_struct("ggml_type_traits", _TypeTraits)
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


@cache
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """The thread pool that the quantizers share."""
    return ThreadPoolExecutor(threads, thread_name_prefix="quantize")


def init(types: Iterable[str]) -> None:
    """Build ggml's lookup tables for `types`, which takes seconds for some IQ types. May be called repeatedly
    and from several threads.
    """
    with _init_lock:
        for name in types:
            kind = ggml_type(name)
            if kind.name not in _initialised:
                _ggml().ggml_quantize_init(kind.id)
                _initialised.add(kind.name)


def quantize_rows(
    weights: NDArray[np.float32], type_name: str, imatrix: NDArray[np.float32] | None, threads: int
) -> NDArray[np.uint8]:
    """Quantize `weights`; returns uint8 blocks (rows, bytes per row), the same for any number of threads.

    Args:
        weights: (rows, cols) float32.
        type_name: a ggml type.
        imatrix: (cols,) importance matrix: the mean squared input of each column. All zeros (no token came)
            count as ones, as in llama-quantize. None: ggml's default; refused for types that need one.
        threads: number of threads.

    Raises McError when a row is not a whole number of blocks, a weight is not finite or too large for the
    type, or the importance matrix is missing or not valid.
    """
    kind = ggml_type(type_name)
    rows, cols = weights.shape
    if cols == 0:
        raise McError(f"rows without weights cannot be {kind.name}; the source is damaged")
    source = np.ascontiguousarray(weights, dtype=np.float32)
    output = np.empty((rows, kind.row_bytes(cols)), dtype=np.uint8)
    importance = _checked_imatrix(kind.name, kind.needs_imatrix, imatrix, cols)
    init([kind.name])
    step = max(1, min(_PIECE_WEIGHTS // cols, -(-rows // max(1, threads))))
    work = partial(_quantize_piece, kind, source, output, importance, step)
    starts = range(0, rows, step)
    if threads <= 1 or len(starts) == 1:
        for start in starts:
            work(start)
    else:
        list(thread_pool(threads).map(work, starts))
    return output


def _quantize_piece(
    kind: GgmlType,
    source: NDArray[np.float32],
    output: NDArray[np.uint8],
    importance: NDArray[np.float32] | None,
    step: int,
    start: int,
) -> None:
    piece, target = source[start : start + step], output[start : start + step]
    check_rows(piece, kind.name, start)
    if kind.id == 0:
        target[:] = piece.view(np.uint8)
        return
    written = _ggml().ggml_quantize_chunk(
        kind.id,
        piece.ctypes.data,
        target.ctypes.data,
        0,
        len(piece),
        piece.shape[1],
        None if importance is None else importance.ctypes.data,
    )
    if written != target.nbytes:
        raise McError(f"ggml wrote {written} bytes of {kind.name} where {target.nbytes} were expected")
    if not _ggml().ggml_validate_row_data(kind.id, target.ctypes.data, target.nbytes):
        raise McError(f"weights in rows {start} to {start + len(piece) - 1} are too large for {kind.name}")


def check_rows(piece: NDArray[np.float32], type_name: str, start: int = 0) -> None:
    """Raises McError, with the row (`start` is the number of the first) and the weight, for weights that the
    type cannot take.
    """
    limit = np.finfo(np.float32).max if type_name in _UNLIMITED else MAX_WEIGHT
    if piece.size == 0 or (piece.max() <= limit and piece.min() >= -limit):  # neither holds with a NaN
        return
    row, column = np.argwhere(~(np.abs(piece) <= limit))[0]
    value = piece[row, column]
    what = f"larger than {type_name} can take" if np.isfinite(value) else "not finite"
    raise McError(f"row {start + row} has the weight {value:g}, which is {what}; the source is damaged")


def warn_if_lost(
    matrix: str, weights: NDArray[np.float32], blocks: NDArray[np.uint8], type_name: str
) -> None:
    """Warns where most of `weights` (rows, cols) is lost in their `blocks` because they are too small for the
    type: the squared error is more than half of the squared weights. `matrix` is its name for the message.
    """
    largest = max(weights.max(), -weights.min())
    if not 0 < largest < _SMALL:
        return
    off = dequantize_rows(blocks, type_name, weights.shape[1], len(weights)) - weights
    if np.square(off, dtype=np.float64).sum() > 0.5 * np.square(weights, dtype=np.float64).sum():
        log.warning(
            "%s: its weights, at most %.2g, are too small for the scales of %s and are lost; "
            "if they matter, choose another type for them",
            matrix,
            largest,
            type_name,
        )


def _checked_imatrix(
    name: str, needed: bool, imatrix: NDArray[np.float32] | None, cols: int
) -> NDArray[np.float32] | None:
    if imatrix is None:
        if needed:
            raise McError(f"{name} needs an importance matrix; run: mc-gguf calibrate")
        return None
    values = np.ascontiguousarray(imatrix, dtype=np.float32)
    if values.shape != (cols,):
        raise McError(f"the importance matrix has shape {values.shape}, the rows have {cols} columns")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise McError("the importance matrix has negative or non-finite values; calibrate again")
    if not values.any():
        return np.ones_like(values)
    exponent = int(np.frexp(values.max())[1])
    return np.ldexp(values, -exponent) if abs(exponent) > _MAX_EXPONENT else values


def dequantize_rows(data: NDArray[np.uint8], type_name: str, cols: int, rows: int) -> NDArray[np.float32]:
    """The float32 weights (rows, cols) that blocks of `type_name` stand for, by ggml's to_float.

    Raises McError when `data` has the wrong size.
    """
    kind = TYPES_BY_NAME[type_name]
    source = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if source.nbytes != rows * kind.row_bytes(cols):
        raise McError(f"{rows} x {cols} weights of {kind.name} do not take {source.nbytes} bytes")
    if kind.id == 0:
        return source.view(np.float32).reshape(rows, cols).copy()
    if kind.name in TYPES:
        init([kind.name])
    output = np.empty((rows, cols), dtype=np.float32)
    traits = _ggml().ggml_get_type_traits(kind.id).contents
    traits.to_float(source.ctypes.data, output.ctypes.data, rows * cols)
    return output
