"""The layout of a mixed-expert GGUF: which tensors it has, in which order, at which offsets, and the bytes of
its header.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mc_gguf.artifacts import FixedTypes, ModelInfo, TensorSpec
from mc_gguf.common.errors import FormatError, McError
from mc_gguf.container.keys import (
    FINGERPRINT,
    FORMAT_VERSION,
    KEY_CALIBRATION,
    KEY_EXPERT_BPW,
    KEY_PLAN,
    KEY_VERSION,
)
from mc_gguf.container.routing import routing_bytes, routing_kv
from mc_gguf.ggml.gguf_file import DEFAULT_ALIGNMENT, pad
from mc_gguf.ggml.gguf_writer import add_values
from mc_gguf.ggml.types import MAP_TYPE, MAX_GROUPS, SIXTEEN_BIT, TYPES, TYPES_BY_NAME, GgmlType, ggml_type
from mc_gguf.routing.metadata import RoutingMetadata

_FINGERPRINT_BYTES = 64
# Every key we add, with the bytes of its value.
_OWN_KEYS = {
    "general.file_type": 4,
    "general.quantization_version": 4,
    KEY_VERSION: 4,
    KEY_EXPERT_BPW: 4,
    KEY_PLAN: 8 + _FINGERPRINT_BYTES,
    KEY_CALIBRATION: 8 + _FINGERPRINT_BYTES,
}
_QUANTIZATION_VERSION = 2
_INTEGERS = ("I8", "I16", "I32", "I64")

ExpertTypes = Mapping[str, Sequence[Sequence[str]]]


class MetadataSource(Protocol):
    """What a header needs of a source model: its ModelInfo, and the metadata that is copied."""

    info: ModelInfo

    def copy_kv(self, writer: Any) -> None: ...


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output: what to write, and where.

    `shape` is in ggml order, `offset` counts from the start of the file, `source` is the tensor that it is
    made from. `experts` lists the experts of a stack in the order of their slices (None: no stack), `map` the
    (group, position) of every expert (None: no map).
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    source: TensorSpec
    experts: tuple[int, ...] | None = None
    map: tuple[tuple[int, int], ...] | None = None

    @property
    def n_bytes(self) -> int:
        return self.type.row_bytes(self.shape[0]) * math.prod(self.shape[1:])


def layout(
    info: ModelInfo, experts: ExpertTypes, fixed: FixedTypes, routing: RoutingMetadata | None = None
) -> tuple[OutputTensor, ...]:
    """All tensors of the output in file order, with their offsets. `experts` is indexed like Plan.experts;
    `routing` is the metadata that the header will carry, whose size moves the tensors.

    Raises McError when a type is unknown or does not fit the rows, or a row of `experts` is missing.
    """
    keep_f32 = any(t.type in SIXTEEN_BIT for t in info.tensors)
    rows: dict[str, tuple[GgmlType, ...]] = {}
    for (layer, projection), stack in info.stacks.items():
        if layer in info.expert_layers:
            rows[stack.name] = _expert_row(info, experts, projection, info.expert_layers.index(layer))
        else:  # of a block that predicts further tokens
            rows[stack.name] = (fixed_type(stack, fixed, keep_f32),) * info.n_expert
    entries: list[OutputTensor] = []
    for spec in info.tensors:
        if spec.name in rows:
            entries += _expert_tensors(spec, rows[spec.name])
        else:
            kind = fixed_type(spec, fixed, keep_f32)
            entries.append(OutputTensor(spec.name, spec.shape, kind, 0, spec))
    offset = header_bytes(info, entries, routing)
    placed = []
    for entry in entries:
        placed.append(replace(entry, offset=offset))
        offset += pad(entry.n_bytes, DEFAULT_ALIGNMENT)
    return tuple(placed)


def _expert_row(info: ModelInfo, experts: ExpertTypes, projection: str, index: int) -> tuple[GgmlType, ...]:
    row = experts[projection][index] if index < len(experts.get(projection, ())) else ()
    if len(row) != info.n_expert:
        raise McError(
            f"the plan gives {len(row)} types for {projection} in layer {info.expert_layers[index]}, "
            f"the model has {info.n_expert} experts there"
        )
    return tuple(ggml_type(name) for name in row)


def _expert_tensors(spec: TensorSpec, row: Sequence[GgmlType]) -> list[OutputTensor]:
    """The stock tensor when all experts share a type, else the map and a tensor per type, by ascending id."""
    cols, rows, n_expert = spec.shape
    kinds = sorted(set(row), key=lambda kind: kind.id)
    if len(kinds) == 1:
        return [OutputTensor(spec.name, spec.shape, kinds[0], 0, spec, tuple(range(n_expert)))]
    if len(kinds) > MAX_GROUPS:
        raise McError(f"{spec.name} would need {len(kinds)} groups; {MAX_GROUPS} are possible")
    members = [tuple(e for e in range(n_expert) if row[e] == kind) for kind in kinds]
    places = {e: (g, position) for g, group in enumerate(members) for position, e in enumerate(group)}
    table = tuple(places[e] for e in range(n_expert))
    groups = [
        OutputTensor(f"{spec.name}.{g}", (cols, rows, len(group)), kinds[g], 0, spec, group)
        for g, group in enumerate(members)
    ]
    return [OutputTensor(f"{spec.name}.map", (2, n_expert), MAP_TYPE, 0, spec, None, table), *groups]


def fixed_type(spec: TensorSpec, fixed: FixedTypes, keep_f32: bool = True) -> GgmlType:
    """The type of a tensor that is not an expert stack: what `fixed.others` says, else this.

    F32 for one-dimensional tensors, the router, biases, and (with `keep_f32`, for 16-bit sources) whatever
    the source holds as F32. Where the rows are not whole blocks of the wanted type, Q8_0; where they are not
    of that either, F16.
    """
    if wanted := fixed.others.get(spec.name):
        return TYPES_BY_NAME.get(wanted) or ggml_type(wanted)
    if spec.type in _INTEGERS:
        return TYPES_BY_NAME[spec.type]
    if not spec.is_matrix or (keep_f32 and spec.type == "F32"):
        return TYPES["F32"]
    if spec.name in ("token_embd.weight", "output.weight"):
        wanted = fixed.token_embd if spec.name.startswith("token_embd") else fixed.output
    else:
        wanted = fixed.attn_kv if spec.name.endswith(("attn_k.weight", "attn_v.weight")) else fixed.attn
    for name in (wanted, "Q8_0", "F16"):
        if ggml_type(name).fits(spec.shape[0]):
            found = ggml_type(name)
            break
    # A source that is quantized already gains nothing from more bits.
    own = TYPES_BY_NAME[spec.type]
    return own if own.bpw < found.bpw else found


def header_bytes(
    info: ModelInfo, tensors: Sequence[OutputTensor], routing: RoutingMetadata | None = None
) -> int:
    """Bytes of the header with its padding, which is the offset of the first tensor."""
    own = sum(8 + len(key) + 4 + size for key, size in _OWN_KEYS.items()) + routing_bytes(routing)
    infos = sum(8 + len(t.name.encode()) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)
    return pad(24 + info.kv_bytes + own + infos, DEFAULT_ALIGNMENT)


def total_bytes(tensors: Sequence[OutputTensor]) -> int:
    """Bytes of the file that `layout` describes."""
    return tensors[-1].offset + pad(tensors[-1].n_bytes, DEFAULT_ALIGNMENT)


def file_bytes(
    info: ModelInfo, experts: ExpertTypes, fixed: FixedTypes, routing: RoutingMetadata | None = None
) -> int:
    """The exact bytes of the file that quantize writes for these types, with the routing metadata `routing`.
    Raises McError, like `layout`.
    """
    return total_bytes(layout(info, experts, fixed, routing))


def expert_bpw(tensors: Sequence[OutputTensor]) -> float:
    """Storage bits per weight of the routed experts; maps do not count."""
    groups = [t for t in tensors if t.experts is not None]
    return 8 * sum(t.n_bytes for t in groups) / sum(math.prod(t.shape) for t in groups)


def encode_header(
    source: MetadataSource,
    tensors: Sequence[OutputTensor],
    plan: str,
    calibration: str,
    routing: RoutingMetadata | None = None,
) -> bytes:
    """The bytes of the header, padded up to the first tensor. `plan` and `calibration` are SHA-256
    fingerprints; anything else raises FormatError.
    """
    for key, value in ((KEY_PLAN, plan), (KEY_CALIBRATION, calibration)):
        if not FINGERPRINT.fullmatch(value):
            raise FormatError(f"key {key}: {value!r} is not a SHA-256 fingerprint")
    from mc_gguf.runtime.packages import load_gguf

    gguf = load_gguf()
    writer = gguf.GGUFWriter(None, source.info.architecture)
    source.copy_kv(writer)
    writer.add_file_type(_file_type(tensors))
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_uint32(KEY_VERSION, FORMAT_VERSION)
    writer.add_float32(KEY_EXPERT_BPW, expert_bpw(tensors))
    writer.add_string(KEY_PLAN, plan)
    writer.add_string(KEY_CALIBRATION, calibration)
    if routing is not None:
        add_values(writer, routing_kv(routing))
    for t in tensors:
        kind = gguf.GGMLQuantizationType(t.type.id)
        writer.add_tensor_info(
            t.name, tuple(reversed(t.shape)), np.dtype(np.float32), t.n_bytes, raw_dtype=kind
        )
    with tempfile.TemporaryDirectory(prefix="mc-gguf-") as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    padded = data + bytes(pad(len(data), DEFAULT_ALIGNMENT) - len(data))
    if len(padded) != tensors[0].offset:
        raise FormatError(f"the header takes {len(padded)} bytes where {tensors[0].offset} were computed")
    return padded


def _file_type(tensors: Sequence[OutputTensor]) -> int:
    """llama_ftype of the type that holds most expert weights."""
    weights: dict[str, int] = {}
    for t in tensors:
        if t.experts is not None:
            weights[t.type.name] = weights.get(t.type.name, 0) + math.prod(t.shape)
    major = max(sorted(weights), key=lambda name: weights[name])
    return TYPES[major].file_type
