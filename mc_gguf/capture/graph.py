"""ggml's graph as the eval callback sees it: nodes with their sources, and the numbers in them.

The callback (ggml_backend_sched_eval_callback) gets the address of a ggml_tensor. The struct is declared here
a second time, from ggml.h of the pinned llama.cpp with our GGML_MAX_SRC; `check_layout` compares it with the
library's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import McError, RuntimeBuildError
from mc_gguf.runtime.locate import load_ggml_base

MAX_SRC = 16  # GGML_MAX_SRC of the patched ggml
_OBJECT_BYTES = 32  # GGML_OBJECT_SIZE, which ggml_tensor_overhead() counts too
_NUMPY_TYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 26: np.int32}  # enum ggml_type


class _Tensor(ctypes.Structure):
    """struct ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


@cache
def _ggml() -> Any:
    """ggml's base library with the types of its functions."""
    library: Any = load_ggml_base()
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.ggml_op_name.argtypes, library.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    for name in ("ggml_unary_op_name", "ggml_glu_op_name"):
        getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_int], ctypes.c_char_p
    for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
        getattr(library, name).argtypes, getattr(library, name).restype = [pointer, pointer, size, size], None
    library.ggml_nbytes.argtypes, library.ggml_nbytes.restype = [pointer], size
    library.ggml_backend_buffer_is_host.argtypes = [pointer]
    library.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    library.ggml_tensor_overhead.restype = size
    if library.ggml_tensor_overhead() != ctypes.sizeof(_Tensor) + _OBJECT_BYTES:
        raise RuntimeBuildError(
            "the runtime's ggml_tensor is not the one that this mc_gguf was made for; run: mc-gguf runtime "
            "build"
        )
    return library


def check_layout() -> None:
    """Raises RuntimeBuildError when the library's ggml_tensor is not the one declared here."""
    _ggml()


@cache
def _op_name(op: int) -> str:
    name: bytes = _ggml().ggml_op_name(op)
    return name.decode()


class Node:
    """One tensor of the graph that is being computed; valid inside the callback only.

    `shape` is in ggml's order, fastest first, always with four sizes.
    """

    __slots__ = ("_raw", "address")

    def __init__(self, address: int) -> None:
        self.address = address
        self._raw = _Tensor.from_address(address)

    @property
    def name(self) -> str:
        name: bytes = self._raw.name
        return name.decode("utf-8", "replace")

    @property
    def op(self) -> str:
        """As in enum ggml_op, without its prefix; "UNARY" and "GLU" come with their kind: "GLU.SWIGLU"."""
        name = _op_name(self._raw.op)
        if name == "UNARY":
            return f"UNARY.{_ggml().ggml_unary_op_name(self._raw.op_params[0]).decode().upper()}"
        if name == "GLU":
            return f"GLU.{_ggml().ggml_glu_op_name(self._raw.op_params[0]).decode().upper()}"
        return name

    @property
    def op_code(self) -> int:
        """The number of the op, without its kind: cheap to compare."""
        return int(self._raw.op)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        a, b, c, d = self._raw.ne
        return a, b, c, d

    @property
    def rows(self) -> int:
        """Number of its rows."""
        _, b, c, d = self._raw.ne
        return int(b * c * d)

    @property
    def offset(self) -> int:
        """Of a view in its source, in bytes."""
        return int(self._raw.view_offs)

    @property
    def kind(self) -> int:
        """enum ggml_type."""
        return int(self._raw.type)

    def param(self, index: int) -> float:
        """One of the op's parameters, a float32."""
        return float(ctypes.c_float.from_buffer_copy(ctypes.c_int32(self._raw.op_params[index])).value)

    def int_param(self, index: int) -> int:
        return int(self._raw.op_params[index])

    def src(self, index: int) -> Node | None:
        address = self._raw.src[index]
        return Node(address) if address else None

    def sources(self) -> Iterator[Node]:
        for address in self._raw.src:
            if address:
                yield Node(address)

    def read(self) -> NDArray[Any]:
        """The numbers, in numpy's order of dimensions: without a copy where they lie in the host's memory, so
        only valid until the callback returns.
        """
        raw = self._raw
        n_bytes = _ggml().ggml_nbytes(self.address)
        buffer = _owner(raw).buffer
        if buffer and _ggml().ggml_backend_buffer_is_host(buffer):
            data: Any = (ctypes.c_uint8 * n_bytes).from_address(raw.data)
        else:
            data = np.empty(n_bytes, dtype=np.uint8)
            _ggml().ggml_backend_tensor_get(self.address, data.ctypes.data, 0, n_bytes)
        shape, strides = tuple(raw.ne)[::-1], tuple(raw.nb)[::-1]
        return np.ndarray(shape, _NUMPY_TYPES[raw.type], data, strides=strides)

    def add(self, first: int, values: NDArray[np.float32], *, slots: bool) -> None:
        """Add `values` [n, width] to the float32 rows of tokens `first` to `first + n`; with `slots`, where
        each token has several rows, to the first of them.
        """
        array = self.read()
        tokens = array[0, :, 0] if slots else array.reshape(-1, array.shape[-1])
        if not slots and not np.shares_memory(tokens, array):
            raise McError(f"the products {self.name} are not contiguous")
        tokens[first : first + len(values)] += values
        buffer = _owner(self._raw).buffer
        if not (buffer and _ggml().ggml_backend_buffer_is_host(buffer)):
            whole = np.ascontiguousarray(array)
            _ggml().ggml_backend_tensor_set(self.address, whole.ctypes.data, 0, whole.nbytes)


def _owner(raw: _Tensor) -> _Tensor:
    """The tensor that has the buffer: a view has none before it is allocated."""
    while not raw.buffer and raw.view_src:
        raw = _Tensor.from_address(raw.view_src)
    return raw
