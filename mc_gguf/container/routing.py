"""The routing keys of a GGUF (docs/reference/format.md, "Routing"): read, validated and encoded.

Any GGUF of a model with experts may carry them, ours or plain. Nothing here looks at a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration
from mc_gguf.common.errors import ArtifactError, FormatError
from mc_gguf.container.keys import (
    FINGERPRINT,
    KEY_ACTIVE,
    KEY_CURVE,
    KEY_LAYERS,
    KEY_PROTECT,
    KEY_RATIO_QUANTILES,
    KEY_ROUTING_CALIBRATION,
    KEY_ROUTING_MODEL,
    KEY_ROUTING_VERSION,
    KEY_SENSITIVITY,
    KEY_THRESHOLDS,
    ROUTING_PREFIX,
    ROUTING_VERSION,
)
from mc_gguf.ggml.gguf_file import ARRAY, FLOAT32, FLOAT64, STRING, UINT32, GgufHeader, Value, encode_kv
from mc_gguf.ggml.shards import read_first
from mc_gguf.routing.metadata import RoutingMetadata, default_metadata
from mc_gguf.routing.profile import RoutingProfile

_PROFILE_KEYS = (KEY_LAYERS, KEY_RATIO_QUANTILES, KEY_SENSITIVITY, KEY_CURVE)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that routing depends on, as a GGUF's metadata gives them."""

    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int

    def __str__(self) -> str:
        return f"{self.n_layer} layers, {self.n_expert_used} of {self.n_expert} experts, {self.n_embd} wide"


def read_routing(path: Path) -> RoutingMetadata | None:
    """The routing metadata of a GGUF, ours or plain; None when it carries none.

    Only the header is read, of a split GGUF that of the first shard. Raises FormatError that names the key
    when it violates docs/reference/format.md.
    """
    return parse_routing(read_first(path))


def parse_routing(header: GgufHeader) -> RoutingMetadata | None:
    """read_routing() for a header that has been read already."""
    if not any(key.startswith(ROUTING_PREFIX) for key in header.kv):
        return None
    return _Reader(header).metadata()


def model_shape(header: GgufHeader) -> ModelShape:
    """The sizes in `header`. Raises FormatError when the model has no experts, or no choice among them."""
    architecture = header.get("general.architecture", "")

    def count(name: str) -> int:
        key = f"{architecture}.{name}"
        value = header.get(key)
        if isinstance(value, list) and value and all(isinstance(x, int) for x in value):
            value = max(value)  # layers may differ
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = "missing" if value is None else f"{value!r}"
            raise FormatError(f"{header.path}: key {key}: is {what}; this is no model with experts")
        return value

    n_expert, n_used = count("expert_count"), count("expert_used_count")
    n_predict = header.get(f"{architecture}.nextn_predict_layers", 0)  # blocks that predict further tokens
    n_layer = count("block_count") - (n_predict if isinstance(n_predict, int) else 0)
    shape = ModelShape(n_layer, n_expert, n_used, count("embedding_length"))
    if shape.n_expert_used < 2:
        raise FormatError(
            f"{header.path}: key {architecture}.expert_used_count: every token uses one expert, and that one "
            "cannot be dropped"
        )
    return shape


def routing_kv(metadata: RoutingMetadata) -> dict[str, Value]:
    """The keys of `metadata`, in the order in which they are written."""
    kv = {
        KEY_ROUTING_VERSION: Value(UINT32, ROUTING_VERSION),
        KEY_THRESHOLDS: _array(metadata.thresholds, FLOAT32),
        KEY_ACTIVE: _array(np.asarray(metadata.active), UINT32),
        KEY_PROTECT: Value(FLOAT64, metadata.protect),
    }
    if metadata.profile is not None:
        kv |= {
            KEY_LAYERS: _array(np.asarray(metadata.profile.layers), UINT32),
            KEY_RATIO_QUANTILES: _array(metadata.profile.ratio_quantiles, FLOAT64),
            KEY_SENSITIVITY: _array(metadata.profile.sensitivity, FLOAT64),
            KEY_CURVE: _array(metadata.profile.curve, FLOAT64),
        }
    if metadata.calibration:
        kv[KEY_ROUTING_CALIBRATION] = Value(STRING, metadata.calibration)
    if metadata.model:
        kv[KEY_ROUTING_MODEL] = Value(STRING, metadata.model)
    return kv


def _array(values: NDArray[Any], item_type: int) -> Value:
    return Value(ARRAY, values.reshape(-1).tolist(), item_type)


@lru_cache(maxsize=1)  # planning asks for the size of many files with the same routing
def routing_bytes(metadata: RoutingMetadata | None) -> int:
    """Bytes that the keys of `metadata` take in a header; 0 for None."""
    return 0 if metadata is None else len(encode_metadata(routing_kv(metadata)))


def encode_metadata(kv: Mapping[str, Value]) -> bytes:
    """The entries of `kv` as they stand in a header, one after the other."""
    return b"".join(encode_kv(key, value) for key, value in kv.items())


class _Reader:
    """Applies the rules of the specification to one header, in their order; `fail` names file and key."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header

    def fail(self, key: str, what: str) -> FormatError:
        return FormatError(f"{self.header.path}: key {key}: {what}")

    def metadata(self) -> RoutingMetadata:
        version = self.scalar(KEY_ROUTING_VERSION, UINT32)
        if version != ROUTING_VERSION:
            raise self.fail(
                KEY_ROUTING_VERSION, f"version {version} is not known; this mc_gguf reads {ROUTING_VERSION}"
            )
        shape = model_shape(self.header)
        thresholds = self.numbers(KEY_THRESHOLDS, FLOAT32, shape.n_layer, shape.n_expert_used)
        if thresholds[:, 0].any():
            raise self.fail(KEY_THRESHOLDS, "rank 0 has a threshold other than 0; it is never dropped")
        active = self.layers(KEY_ACTIVE, shape.n_layer)
        protect = self.scalar(KEY_PROTECT, FLOAT64)
        if not 0 <= protect <= 1:
            raise self.fail(KEY_PROTECT, f"is {protect}, not a share from 0 to 1")
        profile = self.profile(shape)
        if profile is not None and (extra := set(active) - set(profile.layers)):
            raise self.fail(KEY_ACTIVE, f"layer {min(extra)} is not among the layers of {KEY_LAYERS}")
        return RoutingMetadata(
            thresholds.astype(np.float32),
            active,
            protect,
            profile,
            self.fingerprint(KEY_ROUTING_CALIBRATION),
            self.fingerprint(KEY_ROUTING_MODEL),
        )

    def profile(self, shape: ModelShape) -> RoutingProfile | None:
        present = [key for key in _PROFILE_KEYS if key in self.header.kv]
        if not present:
            return None
        layers = self.layers(KEY_LAYERS, shape.n_layer)
        sensitivity = self.numbers(KEY_SENSITIVITY, FLOAT64, len(layers))
        curve = self.numbers(KEY_CURVE, FLOAT64, len(layers), -1)
        n_quantile = curve.shape[1]
        if n_quantile < 3 or n_quantile % 2 == 0:
            raise self.fail(KEY_CURVE, f"{n_quantile} quantiles; an odd number from 3 on has the median")
        ratios = self.numbers(KEY_RATIO_QUANTILES, FLOAT64, len(layers), shape.n_expert_used - 1, n_quantile)
        for key, rows in ((KEY_CURVE, curve), (KEY_RATIO_QUANTILES, ratios)):
            if (np.diff(rows, axis=-1) < 0).any():
                raise self.fail(key, "descends from one quantile to the next")
        return RoutingProfile(layers, shape.n_layer, ratios, sensitivity, curve)

    def value(self, key: str, type_id: int, item_type: int | None = None) -> Any:
        found = self.header.kv.get(key)
        if found is None:
            raise self.fail(key, "is missing")
        if (found.type, found.item_type) != (type_id, item_type):
            given = f"array of type {found.item_type}" if found.type == ARRAY else f"type {found.type}"
            wanted = f"array of type {item_type}" if type_id == ARRAY else f"type {type_id}"
            raise self.fail(key, f"has value {given}, not {wanted}")
        return found.value

    def scalar(self, key: str, type_id: int) -> Any:
        return self.value(key, type_id)

    def numbers(self, key: str, item_type: int, *shape: int) -> NDArray[np.float64]:
        """An array of finite numbers that are not negative, in this shape; one dimension may be -1, which
        follows from the length.
        """
        values = np.array(self.value(key, ARRAY, item_type), dtype=np.float64)
        step = int(np.prod([n for n in shape if n > 0]))
        if values.size % step or not values.size or (-1 not in shape and values.size != step):
            raise self.fail(key, f"has {values.size} numbers, which do not fit the shape {list(shape)}")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self.fail(key, "has a number that is negative or not finite")
        return values.reshape(shape)

    def layers(self, key: str, n_layer: int) -> tuple[int, ...]:
        found = tuple(self.value(key, ARRAY, UINT32))
        if not found:
            raise self.fail(key, "names no layer")
        if any(b <= a for a, b in pairwise(found)) or found[-1] >= n_layer:
            raise self.fail(key, f"must be ascending numbers of layers below {n_layer}")
        return found

    def fingerprint(self, key: str) -> str:
        if key not in self.header.kv:
            return ""
        text: str = self.value(key, STRING)
        if not FINGERPRINT.fullmatch(text):
            raise self.fail(key, f"{text!r} is not a SHA-256 fingerprint")
        return text


def base_metadata(header: GgufHeader, calibration: Calibration | None) -> RoutingMetadata:
    """What thresholds for this file can be computed from: `calibration`, else what the file itself carries.

    Raises FormatError when the model has no experts, ArtifactError when the calibration is of another model
    or measured no routing, or when there is neither a calibration nor a profile inside.
    """
    shape = model_shape(header)
    if calibration is None:
        carried = parse_routing(header)
        if carried is None or carried.profile is None:
            raise ArtifactError(
                f"{header.path} carries no routing profile to compute thresholds from; "
                "give a calibration of this model",
                parameter="calibration",
            )
        return carried
    profile, info = RoutingProfile.of(calibration), calibration.model
    assert info is not None  # RoutingProfile.of has checked that
    model = header.get(KEY_ROUTING_MODEL, "")
    if model and model != info.fingerprint:
        raise ArtifactError(
            f"the calibration was made with another model than {header.path}; run: mc-gguf calibrate"
        )
    calibrated = ModelShape(info.n_layer, info.n_expert, info.n_expert_used, info.n_embd)
    if shape != calibrated:
        raise ArtifactError(
            f"the calibration was made with another model ({calibrated}) than {header.path} ({shape}); "
            "run: mc-gguf calibrate"
        )
    return default_metadata(profile, calibration.fingerprint, model)
