"""Reading the experts of a GGUF, ours or plain: where each expert's matrix lies and what type it has."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import ALL_PROJECTIONS, expert_tensor_name
from mc_gguf.common.arguments import PathLike
from mc_gguf.common.errors import FormatError, McError
from mc_gguf.container.keys import KEY_CALIBRATION, KEY_PLAN, KEY_VERSION
from mc_gguf.container.routing import parse_routing
from mc_gguf.container.validate import ExpertSlice, Slices, Validator, average_bits
from mc_gguf.ggml.gguf_file import GgufHeader
from mc_gguf.ggml.shards import joined, read_shards
from mc_gguf.ggml.types import GgmlType
from mc_gguf.routing.metadata import RoutingMetadata
from mc_gguf.routing.report import describe_routing

_STACK_NAME = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|gate_up|down)_exps\.weight")


class MixedGguf:
    """A GGUF, ours or plain, opened for reading: `slices[layer, projection]` lists the experts' slices.

    A plain GGUF is one without KEY_VERSION; only its stacks named gate, up and down are listed.
    """

    def __init__(self, header: GgufHeader, slices: Slices, n_shard: int = 1) -> None:
        self.header, self.slices, self.n_shard = header, slices, n_shard
        self._maps: dict[Path, NDArray[np.uint8]] = {}

    @classmethod
    def open(cls, path: PathLike) -> MixedGguf:
        """Read the header and validate it. Raises a FormatError that names what is wrong.

        Of a split GGUF, `path` may be any shard; `header` has the tensors of all, and the first one's path.
        """
        shards = read_shards(Path(path))
        header = joined(shards)
        return cls(header, Validator(header, shards).read_slices(), len(shards))

    @property
    def is_ours(self) -> bool:
        return KEY_VERSION in self.header.kv

    @property
    def is_mixed(self) -> bool:
        return any(name.endswith(".map") for name in self.header.tensors)

    @property
    def architecture(self) -> str:
        return str(self.header.get("general.architecture", ""))

    @property
    def plan_fingerprint(self) -> str | None:
        value: str | None = self.header.get(KEY_PLAN)
        return value

    @property
    def calibration_fingerprint(self) -> str | None:
        value: str | None = self.header.get(KEY_CALIBRATION)
        return value

    @cached_property
    def routing(self) -> RoutingMetadata | None:
        """The routing metadata, validated; None when the file carries none. Raises FormatError."""
        return parse_routing(self.header)

    @property
    def expert_bpw(self) -> float | None:
        """Average storage bits of the routed experts' weights; None without experts."""
        return average_bits(self.slices)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with routed experts, ascending."""
        return tuple(sorted({layer for layer, _ in self.slices}))

    def type_of(self, layer: int, projection: str, expert: int) -> GgmlType:
        """The type of one expert. Raises McError for one that there is not."""
        return self._slice(layer, projection, expert).type

    def data(self, layer: int, projection: str, expert: int) -> NDArray[np.uint8]:
        """The stored blocks of one expert, mapped: (rows, bytes of a row)."""
        part = self._slice(layer, projection, expert)
        return self._bytes(part.path, part.offset, part.n_bytes).reshape(part.shape[1], -1)

    def tensor_data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of any tensor, mapped. Raises McError for one that there is not."""
        if name not in self.header.tensors:
            raise McError(f"{self.header.path} has no tensor {name!r}")
        entry = self.header.tensors[name]
        return self._bytes(entry.path, entry.offset, entry.n_bytes)

    def _slice(self, layer: int, projection: str, expert: int) -> ExpertSlice:
        experts = self.slices.get((layer, projection), ())
        if not 0 <= expert < len(experts):
            raise McError(
                f"{self.header.path} has no expert {expert} of {projection} in layer {layer}; it has layers "
                f"{', '.join(map(str, self.layers)) or 'without experts'}"
            )
        return experts[expert]

    def _bytes(self, path: Path, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._maps[path][offset : offset + n_bytes]


def validate(path: Path) -> MixedGguf:
    """Check a file of ours against docs/reference/format.md and return it, opened. Raises FormatError, for a
    plain GGUF too.
    """
    model = MixedGguf.open(path)
    if not model.is_ours:
        raise FormatError(f"{path}: key {KEY_VERSION} is missing; mc_gguf did not write this file")
    _ = model.routing  # raises when it breaks a rule
    return model


def describe_model(model: MixedGguf) -> dict[str, Any]:
    """What `mc-gguf inspect --json` prints."""
    rows = [
        {
            "layer": layer,
            "experts": [
                {p: model.type_of(layer, p, e).name for p in ALL_PROJECTIONS if (layer, p) in model.slices}
                for e in range(max(len(model.slices.get((layer, p), ())) for p in ALL_PROJECTIONS))
            ],
        }
        for layer in model.layers
    ]
    routing = None if model.routing is None else describe_routing(model.routing)
    return {
        "path": str(model.header.path),
        "file_bytes": model.header.file_bytes,
        "shards": model.n_shard,
        "architecture": model.architecture,
        "format_version": model.header.get(KEY_VERSION),
        "mixed": model.is_mixed,
        "expert_bpw": model.expert_bpw,
        "plan_fingerprint": model.plan_fingerprint,
        "calibration_fingerprint": model.calibration_fingerprint,
        "routing": routing,
        "tensors": _type_totals(model),
        "layers": rows,
    }


def _type_totals(model: MixedGguf) -> dict[str, dict[str, int]]:
    """Number of tensors and bytes per ggml type, of experts and all others together."""
    totals: dict[str, dict[str, int]] = {}
    for entry in model.header.tensors.values():
        row = totals.setdefault(entry.type.name, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += entry.n_bytes
    return dict(sorted(totals.items()))


def expert_bytes(path: Path, n_layer: int, n_expert: int) -> NDArray[np.int64]:
    """Bytes of every expert's matrices [n_layer, n_expert], in all shards; zeros where they are not known."""
    found = np.zeros((n_layer, n_expert), dtype=np.int64)
    try:
        mixed = MixedGguf.open(path)
    except FormatError:  # llama.cpp reads more than we do, such as GGUF version 2
        return found
    for entry in mixed.header.tensors.values() if n_expert else ():
        if (match := _STACK_NAME.fullmatch(entry.name)) and int(match[1]) < n_layer:
            found[int(match[1])] += entry.n_bytes // n_expert
    for (layer, projection), experts in mixed.slices.items():
        if expert_tensor_name(layer, projection) not in mixed.header.tensors and layer < n_layer:
            found[layer] += [expert.n_bytes for expert in experts]
    return found
