"""Small graphs of ggml, made and computed with the runtime's own libraries:

with Graph() as graph:
    x = graph.leaf(np.ones((3, 4), np.float32), "x")
    y = graph("ggml_scale", x, 2.0)
    graph.compute(y)
    graph.node(y).read()
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mc_gguf.capture.graph import Node
from mc_gguf.runtime.locate import library_path, load_ggml_base

_KINDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int32): 26}  # enum ggml_type


class Address(int):
    """Of a tensor, to tell it from a number."""


class _Parameters(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Graph:
    """Tensors and operations, all of whose results stay in memory; a context manager. Calling it adds an
    operation.
    """

    def __enter__(self) -> Self:
        self._base: Any = load_ggml_base()
        self._cpu: Any = ctypes.CDLL(str(library_path("ggml-cpu")))
        self._leaves: list[tuple[Address, NDArray[Any]]] = []
        self._base.ggml_init.argtypes, self._base.ggml_init.restype = [_Parameters], ctypes.c_void_p
        self._context = ctypes.c_void_p(self._base.ggml_init(_Parameters(1 << 20, None, True)))
        self._backend = ctypes.c_void_p(self._pointer(self._cpu.ggml_backend_cpu_init))
        self._buffer: ctypes.c_void_p | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._buffer is not None:
            self._base.ggml_backend_buffer_free(self._buffer)
        self._base.ggml_backend_free(self._backend)
        self._base.ggml_free(self._context)

    def leaf(self, values: NDArray[Any], name: str = "") -> Address:
        """A tensor with these numbers; `values` has numpy's order of dimensions."""
        sizes = (ctypes.c_int64 * 4)(*values.shape[::-1], *[1] * (4 - values.ndim))
        kind = ctypes.c_int(_KINDS[values.dtype])
        found = self._pointer(
            self._base.ggml_new_tensor, self._context, kind, ctypes.c_int(values.ndim), sizes
        )
        self._leaves.append((Address(found), np.ascontiguousarray(values)))
        return self.named(Address(found), name)

    def named(self, tensor: Address, name: str) -> Address:
        self._base.ggml_set_name(ctypes.c_void_p(tensor), name.encode())
        return tensor

    def __call__(self, function: str, *arguments: float) -> Address:
        """ggml's `function` with this context and tensors, whole numbers or (float) real ones."""
        converted = [
            ctypes.c_void_p(a) if isinstance(a, Address)
            else ctypes.c_float(a) if isinstance(a, float)
            else ctypes.c_int64(int(a))
            for a in arguments
        ]  # fmt: skip
        return Address(self._pointer(getattr(self._base, function), self._context, *converted))

    def compute(self, result: Address) -> NDArray[Any]:
        """The numbers of `result`, in numpy's order, after computing all that it needs. Once per graph."""
        base = self._base
        kind = ctypes.c_void_p(self._pointer(base.ggml_backend_cpu_buffer_type))
        graph = ctypes.c_void_p(self._pointer(base.ggml_new_graph, self._context))
        base.ggml_build_forward_expand(graph, ctypes.c_void_p(result))
        self._buffer = ctypes.c_void_p(
            self._pointer(base.ggml_backend_alloc_ctx_tensors_from_buft, self._context, kind)
        )
        for tensor, values in self._leaves:
            data, size = ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes)
            base.ggml_backend_tensor_set(ctypes.c_void_p(tensor), data, ctypes.c_size_t(0), size)
        assert base.ggml_backend_graph_compute(self._backend, graph) == 0
        return self.node(result).read().copy()

    @staticmethod
    def node(tensor: Address) -> Node:
        return Node(tensor)

    @staticmethod
    def _pointer(function: Any, *arguments: Any) -> int:
        function.restype = ctypes.c_void_p
        found: int | None = function(*arguments)
        assert found, "ggml gave no result"
        return found
