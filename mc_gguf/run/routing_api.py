"""The routing calls of the patched libllama (patches/src/include/mc.h) through ctypes.

`context` is a llama_context pointer as llama_cpp hands it out. Arrays are numpy, layers first.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import McError
from mc_gguf.routing.params import IMPORTANCES, RUNTIME_POLICIES, RoutingParams, RoutingShape
from mc_gguf.runtime.llama_library import listen, reason
from mc_gguf.runtime.locate import check_struct, library_path


class _Params(ctypes.Structure):
    """struct mc_routing_params."""

    _fields_ = (
        ("policy", ctypes.c_int32),
        ("importance", ctypes.c_int32),
        ("keep_min", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("ratio", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("rate", ctypes.c_float),
        ("protect", ctypes.c_double),
        ("thresholds", ctypes.POINTER(ctypes.c_float)),
        ("active", ctypes.POINTER(ctypes.c_int8)),
    )


def routing_shape(context: Any) -> RoutingShape:
    library = _library()
    return RoutingShape(
        library.mc_routing_n_layer(context),
        library.mc_routing_n_rank(context),
        library.mc_routing_n_expert(context),
    )


def set_routing(context: Any, params: RoutingParams) -> None:
    """Set the routing from the next decode on. The runtime copies the arrays.

    Raises McError when the runtime refuses, or when an array has another shape than the model needs.
    """
    shape = routing_shape(context)
    raw = _Params(
        policy=RUNTIME_POLICIES.index(params.policy),
        importance=IMPORTANCES.index(params.importance),
        keep_min=params.keep_min,
        seed=params.seed,
        ratio=params.ratio,
        top_p=params.top_p,
        rate=params.rate,
        protect=params.protect,
    )
    if params.thresholds is not None:
        thresholds = np.ascontiguousarray(params.thresholds, dtype=np.float32)
        _check_shape("thresholds", thresholds.shape, (shape.n_layer, shape.n_rank))
        raw.thresholds = thresholds.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if params.active is not None:
        active = np.ascontiguousarray(params.active, dtype=np.int8)
        _check_shape("active", active.shape, (shape.n_layer,))
        raw.active = active.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    listen()
    if _library().mc_routing_set(context, ctypes.byref(raw)) != 0:
        raise McError(f"the runtime refuses this routing: {reason()}")


def read_counters(context: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The counts since the last reset.

    Slots [n_layer, 3, n_rank]: kept, dropped, protected. Experts [n_layer, 2, n_expert]: ubatches that would
    have read the expert without routing, and ubatches that did read it.
    """
    shape = routing_shape(context)
    slots = np.zeros((shape.n_layer, 3, shape.n_rank), dtype=np.int64)
    experts = np.zeros((shape.n_layer, 2, shape.n_expert), dtype=np.int64)
    as_int64 = ctypes.POINTER(ctypes.c_int64)
    _library().mc_routing_get_counters(
        context, slots.ctypes.data_as(as_int64), experts.ctypes.data_as(as_int64)
    )
    return slots, experts


def reset_counters(context: Any) -> None:
    _library().mc_routing_reset_counters(context)


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise McError(f"routing {name} must have the shape {list(wanted)}, not {list(found)}")


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path("llama")))
    check_struct("mc_routing_params", _Params, library)
    for name in ("n_layer", "n_rank", "n_expert"):
        function = getattr(library, f"mc_routing_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int32
    library.mc_routing_set.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Params)]
    library.mc_routing_set.restype = ctypes.c_int32
    library.mc_routing_get_counters.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_int64)] * 2]
    library.mc_routing_get_counters.restype = None
    library.mc_routing_reset_counters.argtypes = [ctypes.c_void_p]
    library.mc_routing_reset_counters.restype = None
    return library
