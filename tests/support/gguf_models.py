"""Small GGUF models for tests: random weights in memory, plans for them, and files taken apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf import container
from mc_gguf.artifacts import (
    PROJECTIONS,
    Calibration,
    FixedTypes,
    ModelInfo,
    Plan,
    TensorSpec,
    expert_tensor_name,
)
from mc_gguf.container.layout import MetadataSource
from mc_gguf.ggml.gguf_file import ARRAY, FLOAT32, STRING, UINT32, TensorEntry, Value, read_header
from mc_gguf.ggml.gguf_writer import add_values
from mc_gguf.routing import RoutingMetadata
from mc_gguf.runtime.packages import load_gguf
from mc_gguf.source.base import fingerprint, measure_metadata
from tests.support.synthetic_calibration import synthetic_routing

ONES = hashlib.sha256(b"1").hexdigest()
TWOS = hashlib.sha256(b"2").hexdigest()


def model_kv(n_layer: int, n_expert: int, n_embd: int, n_ff: int, n_used: int = 2) -> dict[str, Value]:
    """The metadata of a Mixtral-like model with three tokens."""
    numbers = {
        "block_count": n_layer,
        "context_length": 64,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "expert_count": n_expert,
        "expert_used_count": min(n_used, n_expert),
        "rope.dimension_count": n_embd // 2,
    }
    kv = {"general.name": Value(STRING, "random")}
    kv |= {f"llama.{key}": Value(UINT32, number) for key, number in numbers.items()}
    kv["llama.attention.layer_norm_rms_epsilon"] = Value(FLOAT32, 0.0009765625)
    kv["tokenizer.ggml.model"] = Value(STRING, "llama")
    kv["tokenizer.ggml.tokens"] = Value(ARRAY, ["<unk>", "<s>", "\u2581a"], STRING)
    kv["tokenizer.ggml.bos_token_id"] = Value(UINT32, 1)
    return kv


def model_tensors(
    n_layer: int, n_expert: int, n_embd: int, n_ff: int, kind: str, projections: Sequence[str] = PROJECTIONS
) -> list[TensorSpec]:
    """The tensors of a Mixtral-like model, ordered like the converter's, with shapes in ggml order."""
    tensors = [
        TensorSpec("output.weight", (n_embd, 3), kind),
        TensorSpec("token_embd.weight", (n_embd, 3), kind),
    ]
    for layer in range(n_layer):
        for projection in projections:
            shape = {"down": (n_ff, n_embd), "gate_up": (n_embd, 2 * n_ff)}.get(projection, (n_embd, n_ff))
            tensors.append(TensorSpec(expert_tensor_name(layer, projection), (*shape, n_expert), kind))
        tensors.append(TensorSpec(f"blk.{layer}.ffn_gate_inp.weight", (n_embd, n_expert), "F32"))
        tensors += [
            TensorSpec(f"blk.{layer}.attn_{x}.weight", (n_embd, n_embd), kind)
            for x in ("q", "k", "v", "output")
        ]
        tensors += [TensorSpec(f"blk.{layer}.{x}_norm.weight", (n_embd,), "F32") for x in ("attn", "ffn")]
    return [*tensors, TensorSpec("output_norm.weight", (n_embd,), "F32")]


class RandomCheckpoint:
    """A mc_gguf.source.Checkpoint whose random weights are made anew at every read, always the same."""

    def __init__(
        self,
        n_layer: int = 2,
        n_expert: int = 4,
        n_embd: int = 32,
        n_ff: int = 64,
        kind: str = "BF16",
        projections: Sequence[str] = PROJECTIONS,
    ) -> None:
        self.kv = model_kv(n_layer, n_expert, n_embd, n_ff)
        tensors = model_tensors(n_layer, n_expert, n_embd, n_ff, kind, projections)
        self.info = ModelInfo(
            architecture="llama",
            n_layer=n_layer,
            n_expert=n_expert,
            n_expert_used=min(2, n_expert),
            n_embd=n_embd,
            n_ff=n_ff,
            fingerprint=fingerprint(self.kv, "llama", tensors, []),
            kv_bytes=measure_metadata(self.kv, "llama"),
            n_kv=len(self.kv) + 1,
            tensors=tuple(tensors),
        )
        self.hparams: Mapping[str, Any] = {}
        self.gguf: Path | None = None
        self.bos_id: int | None = 1
        self.add_bos = True

    def copy_kv(self, writer: Any) -> None:
        add_values(writer, self.kv)

    def _draw(self, name: str, expert: int | None, count: int) -> NDArray[np.float32]:
        seed = int.from_bytes(hashlib.sha256(f"{name}/{expert}".encode()).digest()[:4], "little")
        values = np.random.default_rng(seed).standard_normal(count, dtype=np.float32)
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # exact in BF16

    def tensor(self, name: str) -> NDArray[np.float32]:
        shape = next(t.shape for t in self.info.tensors if t.name == name)
        return self._draw(name, None, int(np.prod(shape))).reshape(shape[::-1])

    def expert(self, layer: int, projection: str, expert: int) -> NDArray[np.float32]:
        rows, cols = self.info.expert_shape(projection, layer)
        return self._draw(expert_tensor_name(layer, projection), expert, rows * cols).reshape(rows, cols)

    def raw(self, name: str, expert: int | None = None) -> NDArray[np.uint8]:
        spec = next(t for t in self.info.tensors if t.name == name)
        count = int(np.prod(spec.shape)) // (1 if expert is None else spec.shape[-1])
        wide = self._draw(name, expert, count)
        if spec.type == "BF16":
            return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return wide.astype(np.float16 if spec.type == "F16" else np.float32).view(np.uint8)

    def tokenize(self, text: str) -> list[int]:
        return [2 for _ in text]


def uniform(info: ModelInfo, type_name: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Plan.experts with one type everywhere."""
    return {p: tuple((type_name,) * info.n_expert for _ in info.expert_layers) for p in info.projections}


def mixed(checkpoint: MetadataSource, types: tuple[str, ...], seed: int = 1) -> dict[str, list[list[str]]]:
    """Types of a plan, drawn from `types`."""
    rng = np.random.default_rng(seed)
    info = checkpoint.info
    return {p: rng.choice(types, (len(info.expert_layers), info.n_expert)).tolist() for p in info.projections}


def make_plan(
    info: ModelInfo,
    experts: Mapping[str, Sequence[Sequence[str]]],
    path: Path,
    calibration: str = ONES,
    fixed: FixedTypes | None = None,
    model_fingerprint: str | None = None,
) -> Plan:
    """A saved plan with these types."""
    plan = Plan(
        strategy="test",
        budget={"bpw": 3.0},
        layers=info.expert_layers,
        experts={p: tuple(tuple(row) for row in rows) for p, rows in experts.items()},
        fixed=fixed or FixedTypes(),
        types=(),
        model_fingerprint=info.fingerprint if model_fingerprint is None else model_fingerprint,
        calibration_fingerprint=calibration,
        expert_bpw=3.0,
        expert_bytes=None,
        file_bytes=None,
        predicted_error=None,
        optimality_gap=None,
    )
    return plan.save(path)


def make_calibration(info: ModelInfo, path: Path, unused: Sequence[tuple[int, int]] = ()) -> Calibration:
    """A saved calibration with random importance matrices; the `unused` experts (layer index, expert) saw no
    tokens.
    """
    n_layer, n_expert = len(info.expert_layers), info.n_expert
    rng = np.random.default_rng(5)
    wide, mid = (
        rng.random((n_layer, n_expert, n), dtype=np.float32) + 0.01 for n in (info.n_embd, info.n_ff)
    )
    flat = np.ones((n_layer, n_expert))
    frequency = flat.copy()
    for place in unused:
        wide[place] = mid[place] = frequency[place] = 0
    statistics = {
        "frequency": frequency,
        "routing_weight": flat,
        "sq_error": np.ones((n_layer, n_expert, len(info.projections), 1)),
        "output_sq": flat,
        "imatrix_in": wide,
        "imatrix_mid": mid,
        **synthetic_routing(n_layer),
    }
    return Calibration(info, info.expert_layers, ("Q2_K",), {}, statistics).save(path)


@dataclass(frozen=True)
class Part:
    """A tensor taken out of a file; the shape is in ggml order."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    data: bytes


def write_random(
    path: Path,
    checkpoint: RandomCheckpoint,
    experts: Mapping[str, Sequence[Sequence[str]]],
    routing: RoutingMetadata | None = None,
) -> None:
    """Write a file with a true header and maps, and random bytes for weights. This needs no ggml."""
    tensors = container.layout(checkpoint.info, experts, FixedTypes(), routing)
    rng = np.random.default_rng(7)
    data = bytearray(container.total_bytes(tensors))
    header = container.encode_header(checkpoint, tensors, ONES, TWOS, routing)
    data[: len(header)] = header
    for t in tensors:
        body = rng.bytes(t.n_bytes) if t.map is None else np.asarray(t.map, dtype="<i4").tobytes()
        data[t.offset : t.offset + t.n_bytes] = body
    path.write_bytes(data)


def take_apart(path: Path) -> tuple[dict[str, Value], list[Part]]:
    """A file's metadata and tensors, which can be changed and written again by write_parts."""
    header, data = read_header(path), path.read_bytes()

    def part(t: TensorEntry) -> Part:
        return Part(t.name, t.shape, t.type.id, data[t.offset : t.offset + t.n_bytes])

    return dict(header.kv), [part(t) for t in header.tensors.values()]


def write_parts(path: Path, kv: Mapping[str, Value], parts: Sequence[Part], per_shard: int = 0) -> None:
    """Write a GGUF with gguf-py alone, whatever is in it. `per_shard`: in shards of so many tensors, as
    NAME-00001-of-0000N.gguf and so on.
    """
    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_shard)
    add_values(writer, {k: v for k, v in kv.items() if k != "general.architecture"})
    for p in parts:
        kind = gguf.GGMLQuantizationType(p.type_id)
        shape = gguf.quants.quant_shape_to_byte_shape(p.shape[::-1], kind)
        array = np.frombuffer(p.data, dtype=np.uint8).reshape(shape)
        writer.add_tensor(p.name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized_gguf(path: Path, name: str, n_embd: int = 256) -> dict[str, NDArray[np.float32]]:
    """Writes a GGUF of random matrices of the type `name`; returns what gguf-py takes their bytes for."""
    gguf, rng = load_gguf(), np.random.default_rng(0)
    checkpoint = RandomCheckpoint(2, 3, n_embd, 256, kind="F32")
    write_random(path, checkpoint, uniform(checkpoint.info, "F32"))
    kv, parts = take_apart(path)
    kv["llama.attention.head_count_kv"] = Value(UINT32, 2)
    kind, weights = gguf.GGMLQuantizationType[name], {}
    n_block, n_byte = gguf.GGML_QUANT_SIZES[kind]
    for i, part in enumerate(parts):
        shape = part.shape[::-1]
        if len(shape) == 1 or "ffn_gate_inp" in part.name:
            data = np.ones(shape, dtype=np.float32).tobytes()
            parts[i] = replace(part, type_id=0, data=data)
            continue
        blocks = rng.integers(0, 60, (*shape[:-1], shape[-1] // n_block * n_byte), dtype=np.uint8)
        weights[part.name] = gguf.quants.dequantize(blocks, kind)
        parts[i] = replace(part, type_id=int(kind), data=blocks.tobytes())
    write_parts(path, {k: v for k, v in kv.items() if not k.startswith("mc_gguf.")}, parts)
    return weights


def changed_copy(source: Path, path: Path, changes: Mapping[str, Value | None]) -> Path:
    """A copy of a GGUF with other metadata; None removes a key."""
    kv, parts = take_apart(source)
    merged = kv | dict(changes)
    write_parts(path, {key: value for key, value in merged.items() if value is not None}, parts)
    return path


def split(source: Path, path: Path, per_shard: int) -> list[Path]:
    """A GGUF in shards of `per_shard` tensors, which are named after `path`."""
    write_parts(path, *take_apart(source), per_shard)
    return sorted(path.parent.glob(f"{path.stem}-?????-of-?????.gguf"))


def renamed(part: Part, name: str) -> Part:
    return replace(part, name=name)
