"""Calibration: the statistics of every expert that calibrate measured, from which plan and quantize work.

A safetensors file (arrays) whose header holds one JSON document (everything else).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf import __version__
from mc_gguf.artifacts.header import check_header
from mc_gguf.artifacts.model import Floats, ModelInfo
from mc_gguf.artifacts.published import PublishedStatistics, is_published
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import atomic_write, sha256_of

CALIBRATION_VERSION = 3
NO_CALIBRATION = hashlib.sha256(b"").hexdigest()  # fingerprint where nothing had to be measured: 16-bit files


def _nothing() -> Floats:
    return np.zeros(0)


def _nothing32() -> NDArray[np.float32]:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of every expert on a calibration text. L layers with experts, E experts, T candidate types.

    frequency [L, E]            tokens routed to the expert
    routing_weight [L, E]       sum of the routing weights (softmax over all experts, before renormalisation)
    sq_error [L, E, 3, T]       squared error of the gate-weighted block output, summed over all its tokens,
                                when only this projection (gate, up, down) of only this expert has this type
    output_sq [L, E]            squared norm of the gate-weighted expert output, summed over its tokens
    imatrix_in [L, E, n_embd]   mean squared input of gate and up; zeros when no token came
    imatrix_mid [L, E, n_ff]    mean squared input of down
    ratio_quantiles [L, K-1, Q] quantiles 0..1 of w_j / w_0 for the ranks j = 1..K-1 (K = n_expert_used)
    routing_sensitivity [L]     increase of the mean KL divergence (nats a token) of the model's output when
                                only this layer drops the experts with w_j / w_0 below its medians
    routing_curve [L, Q]        squared error of the MoE block's output when all below quantile q is dropped,
                                relative to that at the median
    nominal_error [L, E, 3]     Frobenius norm at nominal 1, 2, 3 bits; published statistics have only this
    relative_error [L, E, 3, T] as sq_error, but every token's error divided by the squared norm of its hidden
                                state after the expert
    weight_error [L, E, 3, T]   squared change of the matrix's own weights under this type
    hessian_trace [L, E, 3]     trace of half the Hessian of the relative error with respect to the matrix, a
                                weight on average
    kld_per_error [L]           increase of the mean KL divergence (nats a token) of the model's output for a
                                unit of relative error a token, when all experts of this layer are rounded
    block_score [L]             1 - mean cosine of the hidden states before and after the feed-forward block
    hidden_max [L]              largest magnitude in the hidden states after the layer
    hidden_median [L]           median magnitude in them
    down_max [L, E]             largest magnitude in the outputs of the expert's down projection
    attention_error [L, 4, A]   squared error of the attention block's output, relative to the squared norm of
                                the hidden state after it, a token on average, when only this matrix
                                (ATTENTION) has this one of `attention_types`
    attention_in [L, n_embd]    mean squared input of q, k and v
    attention_mid [L, n]        mean squared input of the attention's output matrix

    The attention's arrays are empty in files made before they were measured.
    Published statistics have `model` None and empty arrays for what they do not carry.
    """

    model: ModelInfo | None
    layers: tuple[int, ...]
    types: tuple[str, ...]
    corpus: dict[str, Any]
    frequency: Floats
    routing_weight: Floats
    sq_error: Floats
    output_sq: Floats
    imatrix_in: NDArray[np.float32]
    imatrix_mid: NDArray[np.float32]
    ratio_quantiles: Floats
    routing_sensitivity: Floats
    routing_curve: Floats
    nominal_error: Floats
    relative_error: Floats = field(default_factory=_nothing)
    weight_error: Floats = field(default_factory=_nothing)
    hessian_trace: Floats = field(default_factory=_nothing)
    kld_per_error: Floats = field(default_factory=_nothing)
    block_score: Floats = field(default_factory=_nothing)
    hidden_max: Floats = field(default_factory=_nothing)
    hidden_median: Floats = field(default_factory=_nothing)
    down_max: Floats = field(default_factory=_nothing)
    attention_types: tuple[str, ...] = ()
    attention_error: Floats = field(default_factory=_nothing)
    attention_in: NDArray[np.float32] = field(default_factory=_nothing32)
    attention_mid: NDArray[np.float32] = field(default_factory=_nothing32)
    fingerprint: str = ""
    tool: str = field(default=f"mc_gguf {__version__}")

    @property
    def n_expert(self) -> int:
        return int(self.frequency.shape[1])

    @classmethod
    def blank(cls, model: ModelInfo) -> Calibration:
        """No statistics at all: enough to plan a 16-bit file of `model`."""
        layers = model.expert_layers
        empty, none = np.zeros((len(layers), model.n_expert)), np.zeros(0)
        empty32 = np.zeros(0, dtype=np.float32)
        return cls(
            model=model,
            layers=layers,
            types=(),
            corpus={},
            frequency=empty,
            routing_weight=empty,
            sq_error=empty,
            output_sq=empty,
            imatrix_in=empty32,
            imatrix_mid=empty32,
            ratio_quantiles=none,
            routing_sensitivity=none,
            routing_curve=none,
            nominal_error=empty,
            fingerprint=NO_CALIBRATION,
        )

    @classmethod
    def from_published(cls, published: PublishedStatistics, fingerprint: str) -> Calibration:
        """A calibration without a model: only what strategy mc needs."""
        none, none32 = np.zeros(0), np.zeros(0, dtype=np.float32)
        return cls(
            model=None,
            layers=tuple(range(len(published.frequency))),
            types=(),
            corpus={"about": published.about},
            frequency=published.frequency,
            routing_weight=published.routing_weight,
            sq_error=none,
            output_sq=none,
            imatrix_in=none32,
            imatrix_mid=none32,
            ratio_quantiles=none,
            routing_sensitivity=none,
            routing_curve=none,
            nominal_error=published.nominal_error,
            fingerprint=fingerprint,
            tool="published",
        )

    def save(self, path: Path) -> Calibration:
        """Write the file; returns this calibration with `fingerprint` set to the file's SHA-256."""
        from safetensors.numpy import save

        header = {
            "format": "mc_gguf.calibration",
            "version": CALIBRATION_VERSION,
            "tool": self.tool,
            "model": self.model.to_json() if self.model else None,
            "layers": self.layers,
            "types": self.types,
            "corpus": self.corpus,
            "attention_types": self.attention_types,
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in (*_ARRAYS, *_LATER_ARRAYS)}
        data = save(arrays, metadata={"mc_gguf": json.dumps(header, sort_keys=True)})
        with atomic_write(path) as file:
            file.write(data)
        return replace(self, fingerprint=hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a calibration, or the published statistics (JSON). Raises ArtifactError."""
        fingerprint = sha256_of(path)
        if is_published(path):
            return cls.from_published(PublishedStatistics.load(path), fingerprint)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as reader:
                header = json.loads((reader.metadata() or {}).get("mc_gguf", "{}"))
                check_header(path, header, "mc_gguf.calibration", CALIBRATION_VERSION)
                names = (*_ARRAYS, *(name for name in _LATER_ARRAYS if name in reader.keys()))
                arrays = {name: reader.get_tensor(name) for name in names}
            return cls(
                model=ModelInfo.from_json(header["model"]) if header["model"] else None,
                layers=tuple(header["layers"]),
                types=tuple(header["types"]),
                corpus=header["corpus"],
                fingerprint=fingerprint,
                tool=header["tool"],
                attention_types=tuple(header.get("attention_types", ())),
                **arrays,
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a calibration file ({error!r}); make one with: mc-gguf calibrate"
            ) from error


_ARRAYS = (
    "frequency",
    "routing_weight",
    "sq_error",
    "output_sq",
    "imatrix_in",
    "imatrix_mid",
    "ratio_quantiles",
    "routing_sensitivity",
    "routing_curve",
    "nominal_error",
    "relative_error",
    "weight_error",
    "hessian_trace",
    "kld_per_error",
    "block_score",
    "hidden_max",
    "hidden_median",
    "down_max",
)
_LATER_ARRAYS = ("attention_error", "attention_in", "attention_mid")  # not in the first files of this version
