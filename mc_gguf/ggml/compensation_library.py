"""libmc-quantize by ctypes: blocks that minimise a quadratic form of the error (patches/src/quantize).

The library works on up to BLOCK columns at once and on any number of rows, each by itself: the result does
not depend on how rows are spread over threads. ctypes releases the GIL meanwhile.
"""

from __future__ import annotations

import ctypes
from functools import cache
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mc_gguf import runtime
from mc_gguf.common.errors import McError
from mc_gguf.ggml.quantizers import check_rows, thread_pool
from mc_gguf.ggml.types import ggml_type

BLOCK = 256
_PIECE_ROWS = 32  # rows that a thread takes at once


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime.library_path("mc-quantize")))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.mc_quantize_supports.argtypes = [number]
    library.mc_quantize_supports.restype = number
    library.mc_metric_create.argtypes = [number, number, pointer]
    library.mc_metric_create.restype = pointer
    library.mc_metric_free.argtypes = [pointer]
    library.mc_metric_free.restype = None
    library.mc_quantize_rows.argtypes = [
        pointer,
        size,
        pointer,
        size,
        pointer,
        size,
        pointer,
        size,
        number,
        number,
    ]
    library.mc_quantize_rows.restype = None
    library.mc_scale_rows.argtypes = [number, size, size, pointer, size, pointer]
    library.mc_scale_rows.restype = None
    return library


def supports(type_name: str) -> bool:
    """Whether weights of this type can be chosen with error compensation."""
    return bool(_library().mc_quantize_supports(ggml_type(type_name).id))


def scale_rows(blocks: NDArray[np.uint8], type_name: str, cols: int, factors: NDArray[np.float32]) -> None:
    """Multiply what every row of `blocks` stands for by its factor, in place, through the blocks' scales."""
    values = np.ascontiguousarray(factors, dtype=np.float32)
    assert blocks.flags.c_contiguous
    assert values.shape == (len(blocks),)
    if not np.isfinite(values).all():
        raise McError("a factor of a row's scales is not a number")
    _library().mc_scale_rows(
        ggml_type(type_name).id, len(blocks), cols, blocks.ctypes.data, blocks.strides[0], values.ctypes.data
    )


class Metric:
    """The form e s e' of the error of n <= BLOCK columns, prepared for a type: a context manager."""

    def __init__(self, type_name: str, s: NDArray[np.float32]) -> None:
        """s [n, n]. Raises McError unless it is positive definite and n a whole number of blocks."""
        self.kind = ggml_type(type_name)
        self.n = len(s)
        matrix = np.ascontiguousarray(s, dtype=np.float32)
        # The library factors the matrix: what is infinite there, or no number, is not positive definite.
        is_finite = bool(np.isfinite(matrix).all())
        self._handle = is_finite and _library().mc_metric_create(self.kind.id, self.n, matrix.ctypes.data)
        if not self._handle:
            raise McError(
                f"no metric of {self.n} columns for {self.kind.name}: the Hessian is not positive definite, "
                "or the type is not supported; do without error compensation",
                parameter="compensate",
            )

    def __enter__(self) -> Metric:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _library().mc_metric_free(self._handle)
        self._handle = None

    def quantize(
        self,
        target: NDArray[np.float32],
        blocks: NDArray[np.uint8],
        values: NDArray[np.float32],
        passes: int,
        threads: int,
        greedy: bool = True,
    ) -> None:
        """Minimise the form of target - values over what `blocks` can hold, row by row.

        target [rows, n]; blocks [rows, bytes of n columns], in: where to start (its scales; its codes too
        unless `greedy`), out: the result; values [rows, n], out: the weights that the blocks stand for. All
        may be column ranges of wider arrays. `passes` of coordinate descent follow. Raises McError for
        targets that the type cannot take.
        """
        for array in (target, blocks, values):
            assert array.strides[1] == array.itemsize
        check_rows(target, self.kind.name)

        def work(start: int) -> None:
            end = min(start + _PIECE_ROWS, len(target))
            _library().mc_quantize_rows(
                self._handle,
                end - start,
                target[start:end].ctypes.data,
                target.strides[0] // 4,
                blocks[start:end].ctypes.data,
                blocks.strides[0],
                values[start:end].ctypes.data,
                values.strides[0] // 4,
                int(greedy),
                passes,
            )

        starts = range(0, len(target), _PIECE_ROWS)
        if threads <= 1:
            for start in starts:
                work(start)
        else:
            list(thread_pool(threads).map(work, starts))
