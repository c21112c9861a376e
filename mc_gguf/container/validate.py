"""The rules of docs/reference/format.md beyond GGUF's own. A violation is a FormatError that names the tensor
or the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mc_gguf.artifacts import ALL_PROJECTIONS, expert_tensor_name, whole_set
from mc_gguf.common.errors import FormatError
from mc_gguf.container.keys import (
    FINGERPRINT,
    FORMAT_VERSION,
    KEY_CALIBRATION,
    KEY_EXPERT_BPW,
    KEY_PLAN,
    KEY_VERSION,
    PART_NAME,
    STOCK_NAME,
)
from mc_gguf.ggml.gguf_file import FLOAT32, STRING, UINT32, GgufHeader, pad
from mc_gguf.ggml.types import MAX_GROUPS, TYPES, GgmlType


@dataclass(frozen=True)
class ExpertSlice:
    """Where one expert's matrix lies: its type, and its bytes in the file `path`. Shape is (cols, rows)."""

    type: GgmlType
    shape: tuple[int, int]
    offset: int
    n_bytes: int
    path: Path


Slices = Mapping[tuple[int, str], Sequence[ExpertSlice]]


def average_bits(slices: Slices) -> float | None:
    """Storage bits per expert weight; None without experts."""
    parts = [part for row in slices.values() for part in row]
    weights = sum(math.prod(part.shape) for part in parts)
    return 8 * sum(part.n_bytes for part in parts) / weights if weights else None


class Validator:
    """Applies the rules to the header of a model, in the order of docs/reference/format.md; `shards` are the
    headers of its files.

    `parts[stack][suffix]` is the full name of a part: a stack's map (suffix "map") or group ("0", "1", ...).
    """

    def __init__(self, header: GgufHeader, shards: Sequence[GgufHeader]) -> None:
        self.header, self.shards = header, shards
        self.architecture = str(header.get("general.architecture", ""))
        self.parts: dict[str, dict[str, str]] = {}
        for name in header.tensors:
            if match := PART_NAME.fullmatch(name):
                self.parts.setdefault(match[1], {})[match[2]] = name

    def violation(self, where: str, what: str) -> FormatError:
        """The error to raise; `where` is "tensor NAME" or "key NAME"."""
        return FormatError(f"{self.header.path}: {where}: {what}")

    def read_slices(self) -> dict[tuple[int, str], tuple[ExpertSlice, ...]]:
        """Every expert's slice by (layer, projection), in file order of layers. Raises FormatError."""
        ours = KEY_VERSION in self.header.kv
        if ours:
            self.check_keys()
        elif self.parts:
            raise self.violation(
                f"key {KEY_VERSION}", f"is missing, but tensor {next(iter(self.parts))} is stored in groups"
            )
        found: dict[tuple[int, str], tuple[ExpertSlice, ...]] = {}
        for name in (*self.parts, *self.header.tensors):
            if match := STOCK_NAME.fullmatch(name):
                grouped = name in self.parts
                if grouped and name in self.header.tensors:
                    raise self.violation(
                        f"tensor {name}", "is there whole and in groups; only one is possible"
                    )
                found[int(match[1]), match[2]] = (
                    self.grouped_slices(name) if grouped else self.stock_slices(name)
                )
        if ours:
            self.check_whole_file(found)
        return dict(sorted(found.items(), key=lambda item: (item[0][0], ALL_PROJECTIONS.index(item[0][1]))))

    def check_keys(self) -> None:
        for key, type_id in (
            (KEY_VERSION, UINT32),
            (KEY_EXPERT_BPW, FLOAT32),
            (KEY_PLAN, STRING),
            (KEY_CALIBRATION, STRING),
        ):
            if key not in self.header.kv:
                raise self.violation(f"key {key}", "is missing")
            if self.header.kv[key].type != type_id:
                raise self.violation(
                    f"key {key}", f"has value type {self.header.kv[key].type}, not {type_id}"
                )
        if (version := self.header.get(KEY_VERSION)) != FORMAT_VERSION:
            raise self.violation(
                f"key {KEY_VERSION}", f"version {version} is not known; this mc_gguf reads {FORMAT_VERSION}"
            )
        for key in (KEY_PLAN, KEY_CALIBRATION):
            if not FINGERPRINT.fullmatch(self.header.get(key)):
                raise self.violation(f"key {key}", f"{self.header.get(key)!r} is not a SHA-256 fingerprint")

    def expert_count(self, tensor: str) -> int:
        key = f"{self.architecture}.expert_count"
        count = self.header.get(key)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise self.violation(f"key {key}", f"is {count!r}, but tensor {tensor} holds experts")
        return count

    def stock_slices(self, name: str) -> tuple[ExpertSlice, ...]:
        entry, n_expert = self.header.tensors[name], self.expert_count(name)
        if len(entry.shape) != 3 or entry.shape[2] != n_expert:
            raise self.violation(
                f"tensor {name}", f"shape {list(entry.shape)} does not end in the {n_expert} experts"
            )
        size = entry.n_bytes // n_expert
        shape = entry.shape[0], entry.shape[1]
        starts = (entry.offset + e * size for e in range(n_expert))
        return tuple(ExpertSlice(entry.type, shape, start, size, entry.path) for start in starts)

    def grouped_slices(self, name: str) -> tuple[ExpertSlice, ...]:
        parts, n_expert = self.parts[name], self.expert_count(name)
        groups = self.group_names(name, parts)
        sizes = self.group_sizes(groups, n_expert)
        slices = []
        for group, position in self.places(parts["map"], sizes):
            entry = self.header.tensors[groups[group]]
            size = entry.n_bytes // sizes[group]
            shape = entry.shape[0], entry.shape[1]
            slices.append(ExpertSlice(entry.type, shape, entry.offset + position * size, size, entry.path))
        return tuple(slices)

    def group_names(self, name: str, parts: Mapping[str, str]) -> list[str]:
        """The names of the groups, in order. The parts must be a map and the groups 0, 1, ..., and stand
        together in the file.
        """
        if "map" not in parts:
            raise self.violation(
                f"tensor {name}.map", f"is missing, but {next(iter(parts.values()))} is there"
            )
        n_group = len(parts) - 1
        for suffix, part in parts.items():
            if suffix != "map" and suffix not in {str(g) for g in range(n_group)}:
                raise self.violation(
                    f"tensor {part}",
                    f"is not one of the groups 0 to {n_group - 1}; one is missing or misnamed",
                )
        if not 2 <= n_group <= MAX_GROUPS:
            raise self.violation(f"tensor {name}.map", f"{n_group} groups; 2 to {MAX_GROUPS} are possible")
        expected = [parts["map"], *(parts[str(g)] for g in range(n_group))]
        names = list(self.header.tensors)
        start = names.index(expected[0])
        if names[start : start + len(expected)] != expected:
            raise self.violation(
                f"tensor {expected[0]}", "is not followed at once by its groups in their order"
            )
        return expected[1:]

    def group_sizes(self, groups: Sequence[str], n_expert: int) -> list[int]:
        entries = [self.header.tensors[name] for name in groups]
        for entry, before in zip(entries, [None, *entries], strict=False):
            if entry.type.name not in TYPES:
                raise self.violation(
                    f"tensor {entry.name}", f"type {entry.type.name} is not allowed for experts"
                )
            if len(entry.shape) != 3 or entry.shape[:2] != entries[0].shape[:2]:
                raise self.violation(
                    f"tensor {entry.name}", f"shape {list(entry.shape)} does not fit {list(entries[0].shape)}"
                )
            if before is not None and before.type.id >= entry.type.id:
                raise self.violation(
                    f"tensor {entry.name}",
                    f"type {entry.type.name} after {before.type.name}: ids must ascend",
                )
        sizes = [entry.shape[2] for entry in entries]
        if sum(sizes) != n_expert:
            raise self.violation(
                f"tensor {groups[0]}", f"the groups hold {sum(sizes)} experts, the model has {n_expert}"
            )
        return sizes

    def places(self, name: str, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(group, position) of every expert, as the map `name` has them. Each must be in range, and each
        group must hold its experts in ascending order.
        """
        entry, n_expert = self.header.tensors[name], sum(sizes)
        if entry.type.name != "I32" or entry.shape != (2, n_expert):
            raise self.violation(
                f"tensor {name}", f"is {entry.type.name} {list(entry.shape)}, not I32 [2, {n_expert}]"
            )
        flat = np.fromfile(entry.path, dtype="<i4", count=2 * n_expert, offset=entry.offset)
        places = [(int(g), int(p)) for g, p in flat.reshape(n_expert, 2)]
        filled = [0] * len(sizes)
        for expert, (group, position) in enumerate(places):
            if not 0 <= group < len(sizes):
                raise self.violation(f"tensor {name}", f"expert {expert} is in group {group} of {len(sizes)}")
            if not 0 <= position < sizes[group]:
                raise self.violation(
                    f"tensor {name}", f"expert {expert} is at {position} of {sizes[group]} in group {group}"
                )
            if position != filled[group]:
                raise self.violation(
                    f"tensor {name}",
                    f"expert {expert} is at {position} in group {group} instead of {filled[group]}: every "
                    "expert once, in ascending order",
                )
            filled[group] += 1
        return places

    def check_whole_file(self, slices: Slices) -> None:
        """The rules about more than one tensor: complete layers, the average bits, the end of the file."""
        layers = sorted({layer for layer, _ in slices})
        wanted = whole_set({p for _, p in slices})
        if not wanted:
            layer = next(layer for layer in layers if (layer, "gate_up") in slices)
            raise self.violation(
                f"tensor {expert_tensor_name(layer, 'gate_up')}",
                "cannot be beside tensors of gate or up alone",
            )
        for layer in layers:
            for projection in wanted:
                if (layer, projection) not in slices:
                    raise self.violation(
                        f"tensor {expert_tensor_name(layer, projection)}", "is missing; the others are there"
                    )
            self.check_shapes(layer, slices)
        actual, stated = average_bits(slices), self.header.get(KEY_EXPERT_BPW)
        if actual is None or not math.isclose(actual, stated, rel_tol=1e-6):
            raise self.violation(f"key {KEY_EXPERT_BPW}", f"says {stated}, the tensors have {actual}")
        for shard in self.shards:
            self.check_end(shard)

    def check_end(self, shard: GgufHeader) -> None:
        if not shard.tensors:  # the first shard may hold metadata alone
            return
        last = list(shard.tensors.values())[-1]
        end = pad(last.offset + last.n_bytes, shard.alignment)
        if shard.file_bytes != end:
            where = f"{shard.path}: tensor {last.name}"
            raise FormatError(f"{where}: the file has {shard.file_bytes} bytes; it must end at {end}")

    def check_shapes(self, layer: int, slices: Slices) -> None:
        shapes = {p: slices[layer, p][0].shape for p in ALL_PROJECTIONS if (layer, p) in slices}
        (cols, rows), first = next(iter(shapes.values())), next(iter(shapes))
        n_ff = rows / 2 if first == "gate_up" else rows
        for projection, shape in shapes.items():
            if shape != ((n_ff, cols) if projection == "down" else (cols, rows)):
                name = expert_tensor_name(layer, projection)
                raise self.violation(f"tensor {name}", f"experts {shape} do not fit {first}'s {(cols, rows)}")
