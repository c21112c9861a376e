"""From a Routing to what the runtime is told: thresholds and layers of the model that runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.routing.metadata import DEFAULT_PROTECT, RoutingMetadata, routing_metadata_from
from mc_gguf.routing.params import RoutingParams, RoutingShape
from mc_gguf.routing.policy import POLICIES
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.request import Routing
from mc_gguf.routing.thresholds import quantiles_for_drop, thresholds_at, tolerant_layers

Thresholds = NDArray[np.float32]


def resolve(
    routing: Routing,
    metadata: RoutingMetadata | None,
    shape: RoutingShape,
    calibration: Calibration | None = None,
) -> RoutingParams:
    """What to tell the runtime, for a model of this shape whose file carries `metadata`.

    `calibration` is what the file `routing.calibration` holds; the caller reads it. Raises McError when the
    policy needs what the file does not carry, or when its numbers do not fit the model, and ArtifactError
    when the calibration does not.
    """
    routing = routing.settled(metadata)
    policy = POLICIES[routing.policy]
    if not policy.options:
        return RoutingParams(routing.policy)
    if not shape.n_expert:
        raise McError(
            f"this model has no experts to drop, so routing {routing.policy!r} is impossible; use 'off'"
        )
    if routing.calibration is not None:
        metadata = _metadata_from(calibration, str(routing.calibration), metadata, shape)
    thresholds, layers = None, _layers(routing, metadata, shape)
    if policy.has_thresholds:
        thresholds, layers = _thresholds(routing, metadata, shape, layers)
    protect = routing.protect
    if protect is None:
        protect = DEFAULT_PROTECT if metadata is None else metadata.protect
    return RoutingParams(
        policy=routing.policy,
        importance=routing.importance,
        keep_min=routing.keep_min,
        seed=routing.seed,
        ratio=routing.ratio,
        top_p=routing.top_p,
        rate=routing.rate,
        protect=protect,
        thresholds=thresholds,
        active=None if layers is None else np.isin(np.arange(shape.n_layer), np.asarray(layers, dtype=int)),
    )


def _thresholds(
    routing: Routing, metadata: RoutingMetadata | None, shape: RoutingShape, layers: Sequence[int] | None
) -> tuple[Thresholds, Sequence[int] | None]:
    """Thresholds [n_layer, n_rank], and the layers that may drop (None: all)."""
    if routing.threshold is not None:
        return _explicit_thresholds(routing.threshold, metadata, shape), layers
    if routing.quantile is not None:
        profile = _profile(metadata, "quantile")
        quantiles = np.full(len(profile.layers), routing.quantile)
        return _fitted(thresholds_at(profile, quantiles), shape), layers
    if routing.target_drop is not None:
        profile = _profile(metadata, "target_drop")
        allowed = None if routing.layers is None else layers
        quantiles = quantiles_for_drop(profile, routing.target_drop, allowed)
        layers = [layer for layer, q in zip(profile.layers, quantiles, strict=True) if q > 0]
        return _fitted(thresholds_at(profile, quantiles), shape), layers
    if metadata is None:
        raise McError(
            f"the file carries no thresholds for routing {routing.policy!r}; give threshold=NUMBER or "
            "calibration=FILE, or write them into the file: mc-gguf routing set FILE --calibration CALIB"
        )
    return _fitted(metadata.thresholds, shape), layers


def _metadata_from(
    calibration: Calibration | None, name: str, file: RoutingMetadata | None, shape: RoutingShape
) -> RoutingMetadata:
    """What quantize would have written from this calibration, which must be of this model."""
    if calibration is None:
        raise McError(f"resolve() needs the calibration that {name} holds: Calibration.load(Path(...))")
    metadata, model = routing_metadata_from(calibration), calibration.model
    if metadata is None or model is None:
        raise ArtifactError(
            f"{name} measured nothing about routing (published statistics, or a model with one expert per "
            "token); give threshold=NUMBER, or use another policy"
        )
    if file is not None and file.model not in ("", model.fingerprint):
        raise ArtifactError(f"{name} is of another model than this file; calibrate this one")
    if (model.n_layer, model.n_expert) != (shape.n_layer, shape.n_expert):
        raise ArtifactError(
            f"{name} is of a model with {model.n_layer} layers of {model.n_expert} experts, but this one has "
            f"{shape.n_layer} layers of {shape.n_expert}; calibrate this one"
        )
    return metadata


def _fitted(thresholds: Thresholds, shape: RoutingShape) -> Thresholds:
    """[n_layer, n_rank] of the model that runs.

    A file may have layers that only speculative decoding uses, and a model may run with fewer experts per
    token than it has thresholds for.
    """
    n_layer, n_rank = thresholds.shape
    if n_layer < shape.n_layer or n_rank < shape.n_rank:
        raise McError(
            f"there are thresholds for {n_layer} layers and {n_rank} experts per token, but the model runs "
            f"with {shape.n_layer} and {shape.n_rank}; give threshold=NUMBER, or use routing 'off'"
        )
    return thresholds[: shape.n_layer, : shape.n_rank]


def _layers(routing: Routing, metadata: RoutingMetadata | None, shape: RoutingShape) -> Sequence[int] | None:
    """The layers that may drop; None: all."""
    if routing.layers == "all":
        return None
    if routing.layers == "auto":
        return tolerant_layers(_profile(metadata, "layers='auto'"))
    if routing.layers is None:
        return None if metadata is None else metadata.active
    layers = [int(layer) for layer in routing.layers]
    if layers[-1] >= shape.n_layer:
        raise McError(f"there is no layer {layers[-1]}; this model has the layers 0 to {shape.n_layer - 1}")
    return layers


def _profile(metadata: RoutingMetadata | None, wanted_by: str) -> RoutingProfile:
    if metadata is None or metadata.profile is None:
        raise McError(
            f"routing {wanted_by} needs what a calibration measured, and the file does not carry it; give "
            "calibration=FILE, or write it into the file: mc-gguf routing set FILE --calibration CALIB"
        )
    return metadata.profile


def _explicit_thresholds(
    given: float | Sequence[float] | Sequence[Sequence[float]],
    metadata: RoutingMetadata | None,
    shape: RoutingShape,
) -> Thresholds:
    """One number, one per layer, or one per layer and rank, as [n_layer, n_rank]; rank 0 has 0."""
    values = np.asarray(given, dtype=np.float32)
    if values.ndim == 2 and values.shape[1] != shape.n_rank - 1:
        raise McError(
            f"routing threshold has rows of {values.shape[1]}; this model uses {shape.n_rank} experts per "
            f"token, so a row has {shape.n_rank - 1}"
        )
    known = None if metadata is None or metadata.profile is None else metadata.profile.layers
    layers: Sequence[int] = range(shape.n_layer)
    if values.ndim and known is not None and len(values) == len(known):
        layers = known
    if values.ndim and len(values) != len(layers):
        also = f" or {len(known)}, those with experts" if known and len(known) != shape.n_layer else ""
        raise McError(
            f"routing threshold is given for {len(values)} layers; this model has {shape.n_layer}{also}"
        )
    result = np.zeros((shape.n_layer, shape.n_rank), dtype=np.float32)
    result[np.asarray(layers), 1:] = values[:, np.newaxis] if values.ndim == 1 else values
    return result
