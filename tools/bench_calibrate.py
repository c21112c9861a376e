"""Measure calibrate's peak memory and time on random Mixtral-shaped checkpoints of different depth.

    python -m tools.experiments.make_model mixtral-2 --layers 2
    python -m tools.experiments.make_model mixtral-4 --layers 4
    python -m tools.bench_calibrate mixtral-2 mixtral-4 --tokens 2048

Each model is calibrated in a process of its own, whose peak resident set the kernel reports. The script
prints one line per model and then checks that every peak is at most one decoder layer in float32 plus 3 GB,
and that the peaks are within 5 % of each other. It exits with 1 when a check fails. One limit: pages of a
memory-mapped source count as resident while they are mapped.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from tools.common import mc_gguf

ALLOWANCE_BYTES = 3_000_000_000
SPREAD = 0.05


@dataclass(frozen=True)
class Measured:
    """What one calibration took, and the size of a decoder layer of its model in float32."""

    model: Path
    n_layer: int
    peak_bytes: int
    layer_bytes: int
    seconds: float

    def line(self) -> str:
        gb = f"{self.peak_bytes / 1e9:.2f} GB peak, one layer {self.layer_bytes / 1e9:.2f} GB"
        return f"{self.model.name}: {self.n_layer} layers, {gb}, {self.seconds:.0f} s"


def measure(model: Path, options: list[str]) -> Measured:
    """Run `mc-gguf calibrate` on `model` in a child process."""
    from mc_gguf.source import open_checkpoint

    info = open_checkpoint(model).info
    weights = sum(
        math.prod(t.shape) for t in info.tensors if t.name.startswith(f"blk.{info.expert_layers[0]}.")
    )
    with tempfile.TemporaryDirectory() as folder:
        command = mc_gguf("calibrate", model, "-o", f"{folder}/calib", *options)
        start = time.monotonic()
        child = subprocess.Popen(command)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"calibrate failed on {model}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(model, info.n_layer, usage.ru_maxrss * unit, 4 * weights, seconds)


def failures(results: list[Measured]) -> list[str]:
    """The checks that failed, as text."""
    found = [
        f"{r.model.name}: {r.peak_bytes / 1e9:.2f} GB exceed one layer and {ALLOWANCE_BYTES / 1e9:g} GB"
        for r in results
        if r.peak_bytes > r.layer_bytes + ALLOWANCE_BYTES
    ]
    peaks = [r.peak_bytes for r in results]
    if max(peaks) > (1 + SPREAD) * min(peaks):
        found.append(f"peaks differ by {100 * (max(peaks) / min(peaks) - 1):.1f} %")
    return found


@click.command(help=__doc__)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--tokens", default=2048, show_default=True)
@click.option(
    "--rows", default=256, show_default=True, help="Rows per matrix to measure: time, hardly memory."
)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--types", help="Types to measure, separated by commas.  [default: all]")
def main(models: tuple[Path, ...], tokens: int, rows: int, threads: int, types: str | None) -> None:
    options = ["--tokens", str(tokens), "--rows", str(rows), "--threads", str(threads)]
    options += ["--types", types] if types else []
    results = []
    for model in models:
        results.append(measure(model, options))
        click.echo(results[-1].line())
    problems = failures(results)
    click.echo("\n".join(problems) or "memory is as it should be")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
