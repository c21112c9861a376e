"""Measure quantize: peak memory, and time against llama.cpp's own quantizer for the same types.

    python -m tools.experiments.make_model /tmp/m2 --layers 2
    python -m tools.bench_quantize memory /tmp/m2 --types Q3_K,Q4_K          # peak resident set, seconds
    python -m tools.bench_quantize speed /tmp/m2 --type Q2_K [--imatrix]     # both sides from one 16-bit GGUF

Every measurement runs in a process of its own. `speed` alternates the two sides and compares the experts'
bytes, which must be equal. The 16-bit GGUF and the outputs lie in --work for a while and are removed.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import PROJECTIONS, Calibration, FixedTypes, ModelInfo, Plan, expert_tensor_name

NO_FINGERPRINT = "0" * 64
FTYPES = {"Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_XS": 30}


def make_plan(info: ModelInfo, types: Sequence[str], fixed: FixedTypes, path: Path) -> Plan:
    """A plan that gives the experts the types in turn; it is for any source."""
    row = tuple(types[e % len(types)] for e in range(info.n_expert))
    plan = Plan(
        strategy="bench",
        budget={},
        layers=info.expert_layers,
        experts={p: (row,) * len(info.expert_layers) for p in PROJECTIONS},
        fixed=fixed,
        types=tuple(types),
        model_fingerprint="",
        calibration_fingerprint=NO_FINGERPRINT,
        expert_bpw=0.0,
        expert_bytes=None,
        file_bytes=None,
        predicted_error=None,
        optimality_gap=None,
    )
    return plan.save(path)


def make_calibration(info: ModelInfo, path: Path) -> Calibration:
    """A calibration that holds random importance matrices of experts that are all in use."""
    rng = np.random.default_rng(0)
    shape = len(info.expert_layers), info.n_expert
    statistics: dict[str, NDArray[Any]] = {
        "frequency": np.ones(shape),
        "imatrix_in": rng.random((*shape, info.n_embd), dtype=np.float32) + np.float32(0.01),
        "imatrix_mid": rng.random((*shape, info.n_ff), dtype=np.float32) + np.float32(0.01),
    }
    return Calibration(info, info.expert_layers, (), {}, statistics).save(path)


def ours(
    source: Path, types: Sequence[str], fixed: FixedTypes, imatrix: bool, output: Path, threads: int
) -> float:
    """Seconds that opening and quantizing take."""
    from mc_gguf.ggml.quantizers import init
    from mc_gguf.quantize.writer import write_model
    from mc_gguf.source import open_checkpoint

    init(types)  # tables that both sides build once
    start = time.monotonic()
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint.info, types, fixed, output.with_suffix(".plan"))
    calibration = make_calibration(checkpoint.info, output.with_suffix(".calib")) if imatrix else None
    write_model(checkpoint, calibration, plan, output, threads, resume=False)
    return time.monotonic() - start


def theirs(source: Path, type_name: str, imatrix: bool, output: Path, threads: int) -> float:
    """Seconds that llama_model_quantize takes with every matrix in one type."""
    from mc_gguf.runtime import use_in_llama_cpp
    from mc_gguf.source import open_checkpoint

    llama_cpp = use_in_llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, FTYPES[type_name], True
    params.allow_requantize = False
    if imatrix:
        info = open_checkpoint(source).info
        calibration = make_calibration(info, output.with_suffix(".calib"))
        kept = upstream_imatrix(llama_cpp, info, calibration)
        params.imatrix = kept
    start = time.monotonic()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)):
        raise click.ClickException("llama_model_quantize failed")
    return time.monotonic() - start


def upstream_imatrix(llama_cpp: Any, info: ModelInfo, calibration: Calibration) -> Any:
    """The calibration as a null-terminated array of llama_model_imatrix_data, one per expert stack.

    It holds addresses only, so the numbers are attached to it and live as long as it does.
    """
    kind = llama_cpp.llama_model_imatrix_data
    entries, kept = [], []
    for layer in info.expert_layers:
        for projection in PROJECTIONS:
            rows = [calibration.imatrix(layer, projection, e) for e in range(info.n_expert)]
            data = np.concatenate([row for row in rows if row is not None])
            name = expert_tensor_name(layer, projection).encode()
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries.append(kind(name, pointer, data.size))
            kept.append((name, data))
    array = (kind * (len(entries) + 1))(*entries)
    array.kept = kept
    return array


@dataclass(frozen=True)
class Cost:
    """Wall-clock and CPU seconds of a call, and the peak resident memory of its process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int

    def to_json(self, side: str) -> dict[str, float]:
        numbers = {"s": self.seconds, "cpu_s": self.cpu_seconds, "peak_gb": self.peak_bytes / 1e9}
        return {f"{side}_{unit}": round(number, 2) for unit, number in numbers.items()}


def in_process(call: Callable[..., float], *args: Any) -> Cost:
    """Run `call`, which returns its seconds, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measured, args=(queue, call, args))
    process.start()
    process.join()
    if process.exitcode:
        raise click.ClickException(f"{call.__name__} ended with {process.exitcode}")
    cost: Cost = queue.get()
    return cost


def _measured(queue: Any, call: Callable[..., float], args: Sequence[Any]) -> None:
    before = time.process_time()
    seconds = call(*args)
    cpu_seconds = time.process_time() - before
    queue.put(Cost(seconds, cpu_seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def same_experts(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes for every expert."""
    from mc_gguf.ggml.gguf_file import read_header

    a, b = (read_header(path) for path in (one, other))
    for name in (name for name in a.tensors if "_exps" in name):
        x, y = a.tensors[name], b.tensors[name]
        if x.type != y.type or not np.array_equal(
            np.fromfile(one, np.uint8, x.n_bytes, offset=x.offset),
            np.fromfile(other, np.uint8, y.n_bytes, offset=y.offset),
        ):
            return False
    return True


@click.group(help=__doc__)
def main() -> None: ...


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--types", default="Q3_K,Q4_K", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the output.")
def memory(source: Path, types: str, threads: int, work: Path | None) -> None:
    """Peak memory and time of one quantize run."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        output = Path(folder) / "m.gguf"
        cost = in_process(ours, source, types.split(","), FixedTypes(), False, output, threads)
        report = {"source": source.name, "types": types, "file_bytes": output.stat().st_size}
        click.echo(json.dumps(report | cost.to_json("ours")))


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--type", "type_name", type=click.Choice(sorted(FTYPES)), default="Q2_K", show_default=True)
@click.option("--imatrix", is_flag=True, help="Use a (random) importance matrix on both sides.")
@click.option("--repeat", default=2, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the files.")
def speed(source: Path, type_name: str, imatrix: bool, repeat: int, threads: int, work: Path | None) -> None:
    """Time against llama_model_quantize, every matrix in one type, from the same 16-bit GGUF."""
    fixed = FixedTypes(type_name, type_name, type_name, type_name)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        plain, mine, other = (Path(folder) / name for name in ("bf16.gguf", "ours.gguf", "theirs.gguf"))
        bf16 = replace(fixed, attn_kv="BF16", attn="BF16", token_embd="BF16", output="BF16")
        in_process(ours, source, ["BF16"], bf16, False, plain, threads)
        ratios, cpu_ratios = [], []
        for _ in range(repeat):
            a = in_process(ours, plain, [type_name], fixed, imatrix, mine, threads)
            b = in_process(theirs, plain, type_name, imatrix, other, threads)
            ratios.append(round(a.seconds / b.seconds, 3))
            cpu_ratios.append(round(a.cpu_seconds / b.cpu_seconds, 3))
            click.echo(json.dumps(a.to_json("ours") | b.to_json("theirs")))
        report = {"type": type_name, "imatrix": imatrix, "ratios": ratios, "cpu_ratios": cpu_ratios}
        click.echo(json.dumps(report | {"same_bytes": same_experts(mine, other)}))


if __name__ == "__main__":
    main()
