"""The routing calls of the patched libllama (patches/src/include/mc.h) through ctypes.

`context` is a llama_context pointer as llama_cpp hands it out. Arrays are numpy, layers first.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.errors import McError

POLICIES = ("off", "odp", "threshold", "keep_min", "top_p", "random")  # enum ggml_mc_policy
IMPORTANCES = ("attention", "l1", "mean", "variance", "kurtosis", "last")  # enum ggml_mc_measure


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


@dataclass(frozen=True)
class RoutingShape:
    """Sizes of a model's routing arrays: layers, most experts a token uses, experts in a layer; 0 without."""

    n_layer: int
    n_rank: int
    n_expert: int


@dataclass(frozen=True, eq=False)
class RoutingParams:
    """What mc_routing_set takes. `thresholds` float32 [n_layer, n_rank] (rank 0 is not looked at), `active`
    bool [n_layer]; None: no thresholds, all layers.
    """

    policy: str
    importance: str = "attention"
    keep_min: int = 1
    seed: int = 0
    ratio: float = 0.0
    top_p: float = 1.0
    rate: float = 0.0
    protect: float = 0.02
    thresholds: NDArray[np.float32] | None = None
    active: NDArray[np.bool_] | None = None


def routing_shape(context: Any) -> RoutingShape:
    library = _library()
    return RoutingShape(
        library.mc_routing_n_layer(context),
        library.mc_routing_n_rank(context),
        library.mc_routing_n_expert(context),
    )


def set_routing(context: Any, params: RoutingParams) -> None:
    """From the next decode on. McError when the runtime refuses; the caller's arrays are copied."""
    shape = routing_shape(context)
    raw = _Params(
        policy=POLICIES.index(params.policy),
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
    if _library().mc_routing_set(context, ctypes.byref(raw)) != 0:
        raise McError("the runtime refuses this routing; its log says why (Llama(..., verbose=True))")


def read_counters(context: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Slots [n_layer, 3, n_rank] (kept, dropped, protected) and experts [n_layer, 2, n_expert] (ubatches that
    would have read the expert, that did), since the last reset.
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
        raise McError(f"routing {name} must have the shape {list(wanted)}, they have {list(found)}")


@cache
def _library() -> ctypes.CDLL:
    from mc_gguf.runtime.locate import check_struct, library_path

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
