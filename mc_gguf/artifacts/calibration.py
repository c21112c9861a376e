"""Calibration and Plan: the two files that pass between the steps calibrate -> plan -> quantize.

Both carry a format version and the fingerprints of what they were made from. A calibration is a safetensors
file (arrays) whose header holds one JSON document (everything else); a plan is JSON, one line per row of
experts, sorted and stable so that it can be read and diffed. Files are written to a temporary name and
renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mc_gguf import __version__
from mc_gguf.errors import ArtifactError

PROJECTIONS: tuple[str, ...] = ("gate", "up", "down")
ATTENTION: tuple[str, ...] = ("q", "k", "v", "output")  # matrices of an attention block: blk.N.attn_*.weight
CALIBRATION_VERSION = 3
PLAN_VERSION = 1
NO_CALIBRATION = hashlib.sha256(b"").hexdigest()  # fingerprint where nothing had to be measured: 16-bit files

Floats = NDArray[np.float64]


def expert_tensor_name(layer: int, projection: str) -> str:
    """GGUF name of the stacked experts of one layer and projection, as llama.cpp's converter writes it."""
    return f"blk.{layer}.ffn_{projection}_exps.weight"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_UMASK = os.umask(0)  # it can only be read by setting it; at import no other thread is at work
os.umask(_UMASK)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises ArtifactError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the source: GGUF name, shape in ggml order (fastest first), and its 16/32-bit type."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class ModelInfo:
    """What planning needs to know of the source model, so that it never opens the weights.

    `kv_bytes` and `n_kv` count the GGUF metadata that the output copies from the source (mc_gguf's own keys
    not included); `tensors` lists every tensor in file order, expert stacks included. `fingerprint`
    identifies the source.
    """

    architecture: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff: int
    fingerprint: str
    kv_bytes: int
    n_kv: int
    tensors: tuple[TensorSpec, ...]

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Layers that have routed experts, ascending."""
        names = {t.name for t in self.tensors}
        return tuple(i for i in range(self.n_layer) if expert_tensor_name(i, "down") in names)

    def expert_shape(self, projection: str) -> tuple[int, int]:
        """(rows, weights per row) of one expert's matrix."""
        return (self.n_embd, self.n_ff) if projection == "down" else (self.n_ff, self.n_embd)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelInfo:
        tensors = tuple(TensorSpec(t["name"], tuple(t["shape"]), t["type"]) for t in data["tensors"])
        return cls(**{**data, "tensors": tensors})


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
            model=model, layers=layers, types=(), corpus={}, frequency=empty, routing_weight=empty,
            sq_error=empty, output_sq=empty, imatrix_in=empty32, imatrix_mid=empty32, ratio_quantiles=none,
            routing_sensitivity=none, routing_curve=none, nominal_error=empty, fingerprint=NO_CALIBRATION,
        )  # fmt: skip

    def save(self, path: Path) -> Calibration:
        """Write the file; returns this calibration with `fingerprint` set to the file's SHA-256."""
        from safetensors.numpy import save

        header = {
            "format": "mc_gguf.calibration", "version": CALIBRATION_VERSION, "tool": self.tool,
            "model": self.model.to_json() if self.model else None,
            "layers": self.layers, "types": self.types, "corpus": self.corpus,
            "attention_types": self.attention_types,
        }  # fmt: skip
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in (*_ARRAYS, *_LATER_ARRAYS)}
        data = save(arrays, metadata={"mc_gguf": json.dumps(header, sort_keys=True)})
        with atomic_write(path) as file:
            file.write(data)
        return replace(self, fingerprint=hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a calibration, or the published statistics (JSON). Raises ArtifactError."""
        fingerprint = sha256_of(path)
        with path.open("rb") as file:
            if file.read(1) == b"{":
                from mc_gguf.published_statistics import load_published

                return load_published(path, fingerprint)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as reader:
                header = json.loads((reader.metadata() or {}).get("mc_gguf", "{}"))
                _check_header(path, header, "mc_gguf.calibration", CALIBRATION_VERSION)
                names = (*_ARRAYS, *(name for name in _LATER_ARRAYS if name in reader.keys()))
                arrays = {name: reader.get_tensor(name) for name in names}
            return cls(
                model=ModelInfo.from_json(header["model"]) if header["model"] else None,
                layers=tuple(header["layers"]), types=tuple(header["types"]), corpus=header["corpus"],
                fingerprint=fingerprint, tool=header["tool"],
                attention_types=tuple(header.get("attention_types", ())), **arrays,
            )  # fmt: skip
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a calibration file ({error!r}); make one with: mc-gguf calibrate"
            ) from error


_ARRAYS = (
    "frequency", "routing_weight", "sq_error", "output_sq", "imatrix_in", "imatrix_mid", "ratio_quantiles",
    "routing_sensitivity", "routing_curve", "nominal_error", "relative_error", "weight_error",
    "hessian_trace", "kld_per_error", "block_score", "hidden_max", "hidden_median", "down_max",
)  # fmt: skip
_LATER_ARRAYS = ("attention_error", "attention_in", "attention_mid")  # not in the first files of this version


def _check_header(path: Path, header: object, kind: str, version: int) -> None:
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} is not a {kind} file; it holds no JSON object")
    if header.get("format") != kind:
        raise ArtifactError(f"{path} is not a {kind} file; its format field is {header.get('format')!r}")
    if header.get("version") != version:
        raise ArtifactError(
            f"{path} has format version {header.get('version')}, this mc_gguf reads version {version}; "
            "make it again"
        )


@dataclass(frozen=True)
class FixedTypes:
    """Types of the tensors that are not experts; the router and everything 1-D stay F32.

    K and V are small and every token depends on them; Q, output projection and embeddings cost little at 6.6
    bits. `attention`, where not empty, overrides `attn` and `attn_kv`: a row for every layer with the types
    of its matrices, in the order of ATTENTION.
    """

    attn_kv: str = "Q8_0"
    attn: str = "Q6_K"
    token_embd: str = "Q6_K"
    output: str = "Q6_K"
    attention: tuple[tuple[str, ...], ...] = ()

    def attention_type(self, layer: int, part: str) -> str:
        """Of the matrix `part` (one of ATTENTION) in `layer`."""
        if self.attention:
            return self.attention[layer][ATTENTION.index(part)]
        return self.attn_kv if part in ("k", "v") else self.attn


@dataclass(frozen=True)
class Plan:
    """The type of every expert and projection, with what it was decided from and what it will cost.

    `experts[projection][i][expert]` is a ggml type name, i counting `layers`. `file_bytes` is exact when the
    calibration knows the model, else None. `predicted_error` is the sum over experts of the squared output
    errors divided by the same sum of squared outputs (None for published statistics); `predicted_kld` is in
    nats a token, None when the calibration did not measure it. `objective` is what was minimised, and
    `layer_ratio` its value relative to the best plan with one type per layer and projection in the same bytes
    (strategy pmq only). `bits` is set by strategy `mc` only; `refinement` by refine: mean KL divergences
    (nats a token) before and after, and what the search was asked for.
    """

    strategy: str
    budget: dict[str, float]
    layers: tuple[int, ...]
    experts: dict[str, tuple[tuple[str, ...], ...]]
    fixed: FixedTypes
    types: tuple[str, ...]
    model_fingerprint: str
    calibration_fingerprint: str
    expert_bpw: float
    expert_bytes: int | None
    file_bytes: int | None
    predicted_error: float | None
    optimality_gap: float | None
    seed: int = 0
    bits: tuple[tuple[int, ...], ...] | None = None
    objective: str = "block"
    predicted_kld: float | None = None
    layer_ratio: float | None = None
    refinement: dict[str, float | str] | None = None
    tool: str = field(default=f"mc_gguf {__version__}")
    fingerprint: str = ""

    def type_of(self, layer: int, expert: int, projection: str) -> str:
        return self.experts[projection][self.layers.index(layer)][expert]

    def to_text(self) -> str:
        """The file's text: sorted keys, one line per row of experts."""
        body = {k: v for k, v in asdict(self).items() if k not in ("fingerprint", "experts", "bits")}
        body["fixed"] = {k: v for k, v in body["fixed"].items() if k != "attention"}
        body |= {"format": "mc_gguf.plan", "version": PLAN_VERSION}
        rows: dict[str, Sequence[Sequence[object]]] = {f"experts_{p}": self.experts[p] for p in PROJECTIONS}
        if self.bits is not None:
            rows["bits"] = self.bits
        if self.fixed.attention:
            rows["attention"] = self.fixed.attention
        lines = [f'  "{key}": {json.dumps(body[key], sort_keys=True)}' for key in sorted(body)]
        for key in sorted(rows):
            table = ",\n".join(f"    {json.dumps(row)}" for row in rows[key])
            lines.append(f'  "{key}": [\n{table}\n  ]')
        return "{\n" + ",\n".join(sorted(lines)) + "\n}\n"

    def save(self, path: Path) -> Plan:
        """Write the file; returns this plan with `fingerprint` set to the file's SHA-256."""
        data = self.to_text().encode()
        with atomic_write(path) as file:
            file.write(data)
        return replace(self, fingerprint=hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan. Raises ArtifactError when it is damaged, of another version, or incomplete."""
        fingerprint = sha256_of(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            _check_header(path, data, "mc_gguf.plan", PLAN_VERSION)
            data.pop("format")
            data.pop("version")
            experts = {p: tuple(tuple(row) for row in data.pop(f"experts_{p}")) for p in PROJECTIONS}
            bits = data.pop("bits", None)
            attention = tuple(tuple(row) for row in data.pop("attention", ()))
            plan = cls(
                **{
                    **data, "layers": tuple(data["layers"]), "types": tuple(data["types"]),
                    "experts": experts, "fixed": FixedTypes(**data["fixed"], attention=attention),
                    "fingerprint": fingerprint,
                    "bits": tuple(tuple(row) for row in bits) if bits is not None else None,
                }
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a valid plan ({error!r}); make one with: mc-gguf plan"
            ) from error
        _check_rows(path, plan)
        return plan


def _check_rows(path: Path, plan: Plan) -> None:
    rows = [row for table in plan.experts.values() for row in table]
    if any(len(table) != len(plan.layers) for table in plan.experts.values()) or not rows:
        raise ArtifactError(f"{path}: not one row of experts for each of {len(plan.layers)} layers")
    if any(len(row) != len(rows[0]) or not all(isinstance(name, str) for name in row) for row in rows):
        raise ArtifactError(f"{path}: every row of experts needs {len(rows[0])} names of types")
    attention = plan.fixed.attention
    named = all(len(r) == len(ATTENTION) and all(isinstance(n, str) for n in r) for r in attention)
    if attention and not (named and plan.layers == tuple(range(len(attention)))):
        raise ArtifactError(f"{path}: attention needs one row of {len(ATTENTION)} types for each layer")
