"""Routing: what a user asks of dynamic expert routing, in Python or as text, and what the runtime is told.

    Routing("odp", quantile=0.3)    Routing.parse("odp:quantile=0.3")    "auto"    "off"

A token's selected experts are ranked by routing weight, w_0 >= w_1 >= ...; rank 0 is never dropped, the rest
by policy:

    off        nothing is dropped
    auto       odp with the thresholds that the file carries; off when it carries none
    odp        rank r where w_r < threshold * w_0, except for the `protect` most important tokens of a prompt
    threshold  the same without protection
    keep_min   ranks from keep_min on where w_r < ratio * w_0 (ik_llama.cpp's -ser)
    top_p      all but the fewest ranks that hold the share top_p of the selected experts' weight
    random     every rank with probability `rate`: the control

patches/src/include/mc.h has the exact definitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.common.units import parse_layers, parse_share
from mc_gguf.routing.metadata import DEFAULT_PROTECT, RoutingMetadata, routing_metadata_from
from mc_gguf.routing.params import IMPORTANCES, RoutingParams, RoutingShape
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.thresholds import at_quantiles, for_target_drop, tolerant_layers

_THRESHOLDS = ("quantile", "threshold", "target_drop")  # where thresholds come from; at most one of them
_WITH_THRESHOLDS = (*_THRESHOLDS, "calibration", "layers")
OPTIONS = {  # of each policy
    "auto": (),
    "off": (),
    "odp": (*_WITH_THRESHOLDS, "protect", "importance"),
    "threshold": _WITH_THRESHOLDS,
    "keep_min": ("keep_min", "ratio", "layers"),
    "top_p": ("top_p", "layers"),
    "random": ("rate", "seed", "layers"),
}
_SHARES = ("quantile", "target_drop", "protect", "top_p", "rate")  # from 0 to 1
_INTEGERS = {"keep_min": (1, 2**31 - 1), "seed": (0, 2**32 - 1)}  # least and largest value
_LAYER_WORDS = ("all", "auto")

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Routing:
    """A policy with its options. Options of other policies must keep their defaults: McError says so.

    policy       auto, off, odp, threshold, keep_min, top_p or random
    quantile     thresholds at this quantile of the w_r/w_0 seen in calibration: 0.5 drops half of a rank
    threshold    thresholds as numbers: one for all, one a layer (of all layers, or of those with experts
                 where the file or the calibration says which these are), or rows [layer][rank - 1]
    target_drop  share of all expert activations to drop, with the least predicted damage. Chooses among all
                 layers unless `layers` names some
    protect      share of a prompt's tokens that keep all experts; None: what the file says, else 0.02
    importance   which tokens those are: attention, l1, mean, variance, kurtosis or last
    layers       layers in which experts may be dropped: numbers, "all" or "auto" (those that tolerate it);
                 None: what the file says, else all
    keep_min, ratio, top_p, rate, seed    of the policies of that name, keep_min and random
    calibration  a file of mc-gguf calibrate to take thresholds and layers from instead of the GGUF

    Without quantile, threshold and target_drop, odp and threshold use the thresholds that the file carries.
    """

    policy: str = "odp"
    quantile: float | None = None
    threshold: float | Sequence[float] | Sequence[Sequence[float]] | None = None
    target_drop: float | None = None
    protect: float | None = None
    importance: str = "attention"
    layers: Sequence[int] | str | None = None
    keep_min: int = 1
    ratio: float = 0.0
    top_p: float = 1.0
    rate: float = 0.0
    seed: int = 0
    calibration: Path | str | None = None

    def __post_init__(self) -> None:
        if self.policy not in OPTIONS:
            raise McError(f"there is no routing policy {self.policy!r}; choose from {', '.join(OPTIONS)}")
        object.__setattr__(self, "threshold", _checked_threshold(self.threshold))
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        _check_options(self)
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise McError(f"routing {name} must be from 0 to 1, it is {value}")
        for name, (least, largest) in _INTEGERS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= largest:
                raise McError(f"routing {name} must be an integer from {least} to {largest}, it is {value}")
        if not 0 <= self.ratio < math.inf:
            raise McError(f"routing ratio must not be negative, it is {self.ratio}")
        if self.importance not in IMPORTANCES:
            raise McError(
                f"there is no importance measure {self.importance!r}; choose from {', '.join(IMPORTANCES)}"
            )

    @classmethod
    def parse(cls, text: str) -> Routing:
        """A routing from text: POLICY or POLICY:option=value,option=value. Shares may be percentages, several
        numbers are separated by commas: "odp:target_drop=15%,layers=0,1,5". McError for anything else.
        """
        policy, _, rest = text.strip().partition(":")
        if policy not in OPTIONS:
            raise McError(f"there is no routing policy {policy!r}; choose from {', '.join(OPTIONS)}")
        given: dict[str, str] = {}
        for piece in rest.split(",") if rest else []:
            name, has_value, value = piece.partition("=")
            name = name.strip()
            if has_value and name in given:
                raise McError(f"routing {text!r} gives {name} twice")
            if has_value:
                given[name] = value.strip()
            elif given:  # one more number of a list
                given[[*given][-1]] += f",{piece.strip()}"
            else:
                raise McError(f"routing {text!r}: {piece!r} is not option=value")
        for name in given:
            _check_name(policy, name)
        return cls(policy, **{name: _value(name, value) for name, value in given.items()})

    @classmethod
    def of(cls, routing: Routing | str) -> Routing:
        """`routing` itself, or parsed."""
        return cls.parse(routing) if isinstance(routing, str) else routing

    def settled(self, metadata: RoutingMetadata | None) -> Routing:
        """With policy auto replaced by what it means for a file that carries `metadata`."""
        if self.policy != "auto":
            return self
        return replace(self, policy="off" if metadata is None else "odp")


def resolve(routing: Routing, metadata: RoutingMetadata | None, shape: RoutingShape) -> RoutingParams:
    """What to tell the runtime, for a model of this shape whose file carries `metadata`.

    Reads the calibration file if one is given. Raises McError when the policy needs what the file does not
    carry, or when numbers, file or calibration do not fit the model; ArtifactError for a calibration that
    cannot be read.
    """
    routing = routing.settled(metadata)
    if routing.policy == "off":
        return RoutingParams("off")
    if not shape.n_expert:
        raise McError(
            f"this model has no experts to drop, so routing {routing.policy!r} is impossible; use 'off'"
        )
    if routing.calibration is not None:
        metadata = _of_calibration(Path(routing.calibration), metadata, shape)
    protect = routing.protect
    if protect is None:
        protect = DEFAULT_PROTECT if metadata is None else metadata.protect
    thresholds, layers = None, _layers(routing, metadata, shape)
    if routing.policy in ("odp", "threshold"):
        thresholds, layers = _thresholds(routing, metadata, shape, layers)
    return RoutingParams(
        routing.policy,
        routing.importance,
        routing.keep_min,
        routing.seed,
        routing.ratio,
        routing.top_p,
        routing.rate,
        protect,
        thresholds,
        _mask(layers, shape.n_layer),
    )


def _of_calibration(path: Path, file: RoutingMetadata | None, shape: RoutingShape) -> RoutingMetadata:
    """What quantize would have written from this calibration. It must be of this model."""
    calibration = Calibration.load(path)
    metadata, model = routing_metadata_from(calibration), calibration.model
    if metadata is None or model is None:
        raise ArtifactError(
            f"{path} measured nothing of routing (published statistics, or one expert a token); "
            "give threshold=NUMBER or another policy"
        )
    if file is not None and file.model not in ("", model.fingerprint):
        raise ArtifactError(f"{path} is of another model than this file; calibrate this one")
    if (model.n_layer, model.n_expert) != (shape.n_layer, shape.n_expert):
        raise ArtifactError(
            f"{path} is of a model with {model.n_layer} layers of {model.n_expert} experts, this one has "
            f"{shape.n_layer} of {shape.n_expert}; calibrate this one"
        )
    return metadata


def _fitted(thresholds: NDArray[np.float32], shape: RoutingShape) -> NDArray[np.float32]:
    """[n_layer, n_rank]: a file may have layers that only speculative decoding uses, and a model may be run
    with fewer experts a token than it has thresholds for.
    """
    n_layer, n_rank = thresholds.shape
    if n_layer < shape.n_layer or n_rank < shape.n_rank:
        raise McError(
            f"there are thresholds for {n_layer} layers and {n_rank} experts a token, but the model runs "
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


def _thresholds(
    routing: Routing, metadata: RoutingMetadata | None, shape: RoutingShape, layers: Sequence[int] | None
) -> tuple[NDArray[np.float32], Sequence[int] | None]:
    """Thresholds [n_layer, n_rank] and the layers that may drop."""
    if routing.threshold is not None:
        return _explicit(routing.threshold, metadata, shape), layers
    if routing.quantile is None and routing.target_drop is None:
        if metadata is None:
            raise McError(
                f"the file carries no thresholds for routing {routing.policy!r}; give threshold=NUMBER or "
                "calibration=FILE, or write them into the file: mc-gguf routing set FILE --calibration CALIB"
            )
        return _fitted(metadata.thresholds, shape), layers
    if routing.quantile is not None:
        profile = _profile(metadata, "quantile")
        quantiles = np.full(len(profile.layers), routing.quantile)
    else:
        assert routing.target_drop is not None
        profile = _profile(metadata, "target_drop")
        quantiles = for_target_drop(profile, routing.target_drop, None if routing.layers is None else layers)
        layers = [layer for layer, q in zip(profile.layers, quantiles, strict=True) if q > 0]
    return _fitted(at_quantiles(profile, quantiles), shape), layers


def _profile(metadata: RoutingMetadata | None, wanted_by: str) -> RoutingProfile:
    if metadata is None or metadata.profile is None:
        raise McError(
            f"routing {wanted_by} needs what a calibration measured, and the file does not carry it; give "
            "calibration=FILE, or write it into the file: mc-gguf routing set FILE --calibration CALIB"
        )
    return metadata.profile


def _explicit(
    given: float | Sequence[float] | Sequence[Sequence[float]],
    metadata: RoutingMetadata | None,
    shape: RoutingShape,
) -> NDArray[np.float32]:
    """One number, one a layer or one a layer and rank, as [n_layer, n_rank]; rank 0 has 0."""
    values = np.asarray(given, dtype=np.float32)
    if values.ndim == 2 and values.shape[1] != shape.n_rank - 1:
        raise McError(
            f"routing threshold has rows of {values.shape[1]}; this model uses {shape.n_rank} experts a "
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


def _mask(layers: Sequence[int] | None, n_layer: int) -> NDArray[np.bool_] | None:
    return None if layers is None else np.isin(np.arange(n_layer), np.asarray(layers, dtype=int))


def _check_options(routing: Routing) -> None:
    for field in fields(routing):
        if field.name != "policy" and getattr(routing, field.name) != field.default:
            _check_name(routing.policy, field.name)
    given = [name for name in _THRESHOLDS if getattr(routing, name) is not None]
    if len(given) > 1:
        raise McError(f"routing takes one of {' and '.join(given)}, not both")


def _check_name(policy: str, name: str) -> None:
    if name not in OPTIONS[policy]:
        allowed = ", ".join(OPTIONS[policy]) or "none"
        raise McError(f"routing {policy!r} has no option {name!r}; its options: {allowed}")


def _checked_threshold(given: Any) -> float | tuple[float, ...] | Rows | None:
    """As hashable Python numbers."""
    if given is None:
        return None
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise McError(f"routing threshold must be numbers, in rows of equal length: {given!r}") from error
    if values.ndim > 2 or not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise McError(
            "routing threshold must be a number not below 0, one a layer, or rows [layer][rank - 1]; "
            f"it is {given!r}"
        )
    if values.ndim == 2:
        return tuple(tuple(row) for row in values.tolist())
    return tuple(values.tolist()) if values.ndim else float(values)


def _checked_layers(given: Any) -> tuple[int, ...] | str | None:
    if given is None or (isinstance(given, str) and given in _LAYER_WORDS):
        word: str | None = given
        return word
    numbers = [] if isinstance(given, str) else list(given)
    if not numbers or any(int(n) != n or n < 0 for n in numbers):
        raise McError(f"routing layers must be numbers from 0, or one of all and auto; they are {given!r}")
    return tuple(sorted({int(n) for n in numbers}))


def _value(name: str, text: str) -> Any:
    """The value of an option that was given as text."""
    if name in ("importance", "calibration"):
        return text
    if name == "layers":
        return parse_layers(text)
    if name in _SHARES:
        return parse_share(text)
    try:
        if name in _INTEGERS:
            return int(text)
        if name != "threshold":
            return float(text)
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise McError(f"routing {name}={text} is not a number") from error
    return numbers if len(numbers) > 1 else numbers[0]
