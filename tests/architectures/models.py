"""Random models of the architectures that llama.cpp runs, and what is done with each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration, Plan
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.capture.context import Context, Devices
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.container import MixedGguf
from mc_gguf.conversion import file_bytes_for
from mc_gguf.ggml.quantizers import dequantize_rows
from mc_gguf.ggml.types import TYPES
from mc_gguf.plan.request import PlanRequest
from mc_gguf.quantize.writer import write_model
from mc_gguf.routing.params import RoutingParams
from mc_gguf.run.routing_api import read_counters, reset_counters, routing_shape, set_routing
from mc_gguf.runtime.packages import load_gguf
from mc_gguf.source import Checkpoint, open_checkpoint
from mc_gguf.source.text import Corpus

N_TOKENS = 64
PAIR = ("Q4_0", "Q8_0")  # the types of every stack: rows of any length that the models have fit them

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """What one architecture's test has to say.

    `function` is what its experts compute, `matrices` the expert's matrices and how many others were decided.
    """

    name: str
    function: str
    matrices: str


@dataclass(frozen=True)
class Subject:
    """The model of one architecture in `path`; files go to `folder`."""

    path: Path
    folder: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.path)

    @cached_property
    def rows(self) -> NDArray[np.int32]:
        n_vocab = next(t.shape[1] for t in self.checkpoint.info.tensors if t.name == "token_embd.weight")
        return np.random.default_rng(0).integers(1, n_vocab, (8, N_TOKENS)).astype(np.int32)

    @cached_property
    def calibration(self) -> Calibration:
        """With default types, and little else."""
        corpus = Corpus(self.rows, ("random tokens",), "0" * 64, self.rows.size, 0)
        options = CalibrationOptions(max_rows=16, sensitivity_tokens=128, matrix_tokens=64, threads=1)
        found = calibrate_checkpoint(self.checkpoint, corpus, options, quiet=True)
        return found.save(self.folder / "calibration.safetensors")

    @cached_property
    def plan(self) -> Plan:
        """What is planned within the size of a plan for 4.6 bits: the types of all matrices are decided."""
        measure = file_bytes_for(self.calibration)
        size = PlanRequest(bpw=4.6).plan(self.calibration, measure).file_bytes
        return PlanRequest(size=size).plan(self.calibration, measure)

    def mixed_plan(self, pair: tuple[str, str] = PAIR) -> Plan:
        """The plan with both types in every stack, in turn."""
        info = self.checkpoint.info
        row = tuple(pair[number % 2] for number in range(info.n_expert))
        experts = {p: (row, row[1:] + row[:1]) * len(self.plan.layers) for p in self.plan.experts}
        experts = {p: table[: len(self.plan.layers)] for p, table in experts.items()}
        changed = replace(self.plan, experts=experts, file_bytes=None)
        return changed.save(self.folder / f"{'-'.join(pair)}.plan.json")

    def write(self, plan: Plan, name: str) -> Path:
        return Path(write_model(self.checkpoint, self.calibration, plan, self.folder / name, 1).header.path)

    def as_f32(self, path: Path) -> Path:
        """The same weights as float32, in plain stacks."""
        gguf, mixed, info = load_gguf(), MixedGguf.open(path), self.checkpoint.info
        output = path.with_suffix(".f32.gguf")
        writer = gguf.GGUFWriter(output, info.architecture)
        self.checkpoint.copy_kv(writer)
        stacks = {stack.name: key for key, stack in info.stacks.items()}
        for spec in info.tensors:
            if spec.name in stacks:
                layer, projection = stacks[spec.name]
                writer.add_tensor(spec.name, np.stack(list(self._experts(mixed, layer, projection))))
                continue
            entry = mixed.header.tensors[spec.name]
            raw = np.fromfile(path, np.uint8, entry.n_bytes, offset=entry.offset)
            if entry.type.name not in TYPES:  # integers
                values: NDArray[Any] = raw.view(np.int32)
            else:
                cols = entry.shape[0]
                values = dequantize_rows(raw, entry.type.name, cols, int(np.prod(entry.shape[1:])))
            writer.add_tensor(spec.name, values.reshape(entry.shape[::-1]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return output

    def _experts(self, mixed: MixedGguf, layer: int, projection: str) -> Iterator[NDArray[np.float32]]:
        rows, cols = self.checkpoint.info.expert_shape(projection, layer)
        for number in range(self.checkpoint.info.n_expert):
            kind = mixed.type_of(layer, projection, number).name
            yield dequantize_rows(mixed.data(layer, projection, number), kind, cols, rows)

    def logits(self, path: Path, threshold: float | None = None) -> tuple[Logits, int]:
        """Logits of one row of text, and how many slots were dropped. No threshold: without routing."""
        with Context(path, N_TOKENS, 1, Devices(1), lambda _address, ask, _data: not ask) as context:
            if threshold is not None:
                shape = routing_shape(context.handle)
                each = np.full((shape.n_layer, shape.n_rank), threshold, dtype=np.float32)
                set_routing(context.handle, RoutingParams("threshold", thresholds=each))
                reset_counters(context.handle)
            context.evaluate(self.rows[:1])
            dropped = 0 if threshold is None else int(read_counters(context.handle)[0][:, 1].sum())
            return context.logits(N_TOKENS).copy(), dropped

    def distance(self, path: Path) -> NDArray[np.float64]:
        """How far a file's logits are from those of its weights as float32: see tests/runtime."""
        a, b = self.logits(path)[0], self.logits(self.as_f32(path))[0]
        distances = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
        return np.asarray(np.quantile(distances, [0.5, 0.85]))


def describe(subject: Subject, function: ExpertFunction) -> Found:
    """What docs/reference/architectures.md says of it."""
    info, others = subject.checkpoint.info, subject.plan.fixed.others
    projections = ", ".join(info.projections)
    return Found(info.architecture, function.text, f"{projections}; {len(others)} others")
