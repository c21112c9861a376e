"""GGUF files for tests of the runtime, with more freedom than quantize has: any grouping, groups of the same
type, or every expert dequantized to F32.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mc_gguf.artifacts import PROJECTIONS, expert_tensor_name
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import ggml_type
from mc_gguf.runtime import Runtime, packages
from mc_gguf.source import Checkpoint
from tests.support import ROOT

LOGITS = ROOT / "tests" / "native" / "logits.py"
Groups = Sequence[tuple[str, Sequence[int]]]  # (type, experts) of each group


def first_layers(model: Path, n_layer: int, folder: Path) -> Path:
    """A copy of a HF directory with only its first layers, weights unchanged."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    kept = {
        k: v
        for k, v in tensors.items()
        if "layers." not in k or int(k.split("layers.")[1].split(".")[0]) < n_layer
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": n_layer}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class ModelWriter:
    """Writes variants of one checkpoint; quantized experts are kept, so variants share the work."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self._blocks: dict[tuple[int, str, int, str], NDArray[np.uint8]] = {}

    def write(
        self,
        name: str,
        groups: Groups | Mapping[int, Groups],
        dequantize: bool = False,
        version: int = 1,
        architecture: str | None = None,
    ) -> Path:
        """Write a file with `groups`, which are for every layer or by layer.

        One group of all experts in order is a stock tensor. So is everything with `dequantize`, which stores
        the weights that the blocks stand for as F32.
        """
        gguf = packages.load_gguf()
        path = self.folder / f"{name}.gguf"
        own_name = self.checkpoint.info.architecture
        writer = gguf.GGUFWriter(path, architecture or own_name)
        self.checkpoint.copy_kv(writer)
        if architecture is not None:
            self._rename(writer, own_name, architecture)
        writer.add_uint32("mc_gguf.version", version)
        stacks = {
            expert_tensor_name(i, p): (i, p) for i in self.checkpoint.info.expert_layers for p in PROJECTIONS
        }
        for spec in self.checkpoint.info.tensors:
            if spec.name not in stacks:
                writer.add_tensor(spec.name, self.checkpoint.tensor(spec.name))
                continue
            layer, projection = stacks[spec.name]
            own = groups[layer] if isinstance(groups, Mapping) else groups
            for part, data, kind in self._parts(spec.name, layer, projection, own, dequantize):
                writer.add_tensor(part, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _rename(self, writer: Any, old: str, new: str) -> None:
        """Give the metadata of architecture `old` to `new`, and add what qwen3moe needs."""
        values = writer.kv_data[0]
        for key in [key for key in values if key.startswith(f"{old}.")]:
            values[new + key.removeprefix(old)] = values.pop(key)
        head = int(self.checkpoint.hparams["rope.dimension_count"])
        writer.add_expert_feed_forward_length(self.checkpoint.info.n_ff)
        writer.add_key_length(head)
        writer.add_value_length(head)
        for layer in range(self.checkpoint.info.n_layer):
            for name in ("attn_q_norm", "attn_k_norm"):
                writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(head, dtype=np.float32))

    def _parts(
        self, name: str, layer: int, projection: str, groups: Groups, dequantize: bool
    ) -> list[tuple[str, NDArray[Any], str]]:
        n_expert = self.checkpoint.info.n_expert
        if dequantize:
            kinds = {e: kind for kind, experts in groups for e in experts}
            rows, cols = self.checkpoint.info.expert_shape(projection)
            blocks = (self._quantized(layer, projection, e, kinds[e]) for e in range(n_expert))
            weights = [dequantize_rows(b, kinds[e], cols, rows) for e, b in enumerate(blocks)]
            return [(name, np.stack(weights), "F32")]
        stacked = [
            np.stack([self._quantized(layer, projection, e, kind) for e in experts])
            for kind, experts in groups
        ]
        if len(groups) == 1:
            assert list(groups[0][1]) == list(range(n_expert))
            return [(name, stacked[0], groups[0][0])]
        table = np.zeros((n_expert, 2), dtype=np.int32)
        for g, (_, experts) in enumerate(groups):
            for position, e in enumerate(experts):
                table[e] = g, position
        parts: list[tuple[str, NDArray[Any], str]] = [(f"{name}.map", table, "I32")]
        return parts + [(f"{name}.{g}", data, groups[g][0]) for g, data in enumerate(stacked)]

    def _quantized(self, layer: int, projection: str, expert: int, kind: str) -> NDArray[np.uint8]:
        key = (layer, projection, expert, ggml_type(kind).name)
        if key not in self._blocks:
            weights = self.checkpoint.expert(layer, projection, expert)
            ones = np.ones(weights.shape[1], dtype=np.float32)
            self._blocks[key] = quantize_rows(weights, kind, ones, threads=2)
        return self._blocks[key]


def run_logits(
    runtime: Runtime,
    models: Sequence[Path],
    out: Path,
    batches: str = "1",
    threads: str = "2",
    repack: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """The arrays of tests/native/logits.py in a process of its own."""
    settings = ["--batches", batches, "--threads", threads]
    command = [sys.executable, LOGITS, runtime.lib_dir, out, *models, *settings]
    done = subprocess.run(
        [*map(str, command), *(["--repack"] if repack else [])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as arrays:
        return dict(arrays)
