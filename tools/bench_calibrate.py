"""Peak memory and time of calibrate on Mixtral-shaped random checkpoints that differ only in their number of
layers.

    python -m tools.experiments.make_model mixtral-2 --layers 2
    python -m tools.experiments.make_model mixtral-4 --layers 4
    python -m tools.bench_calibrate mixtral-2 mixtral-4 --tokens 2048

Every model is calibrated in a process of its own; its peak resident set is what the kernel reports for it.
Prints one line a model, then the checks: at most one decoder layer in float32 plus 3 GB, and peaks within 5 %
of each other. Exits with 1 when a check fails. Limits: pages of a memory-mapped source count as resident
while they are mapped.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ALLOWANCE_BYTES = 3_000_000_000
SPREAD = 0.05


@dataclass(frozen=True)
class Measured:
    """One calibration: what it took, and what a decoder layer of the model takes in float32."""

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
        command = [
            sys.executable,
            "-m",
            "mc_gguf",
            "calibrate",
            str(model),
            "-o",
            f"{folder}/calib",
            *options,
        ]
        start = time.monotonic()
        child = subprocess.Popen(command)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"calibrate failed on {model}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(model, info.n_layer, usage.ru_maxrss * unit, 4 * weights, seconds)


def failures(results: list[Measured]) -> list[str]:
    """What is not as it should be."""
    found = [
        f"{r.model.name}: {r.peak_bytes / 1e9:.2f} GB exceed one layer and {ALLOWANCE_BYTES / 1e9:g} GB"
        for r in results
        if r.peak_bytes > r.layer_bytes + ALLOWANCE_BYTES
    ]
    peaks = [r.peak_bytes for r in results]
    if max(peaks) > (1 + SPREAD) * min(peaks):
        found.append(f"peaks differ by {100 * (max(peaks) / min(peaks) - 1):.1f} %")
    return found


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", default="2048")
    parser.add_argument("--rows", default="256", help="rows a matrix for the errors: time, hardly memory")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    arguments = parser.parse_args()
    options = ["--tokens", arguments.tokens, "--rows", arguments.rows, "--threads", arguments.threads]
    results = []
    for model in arguments.models:
        results.append(measure(model, options))
        print(results[-1].line(), flush=True)  # noqa: T201 (what this script is for)
    problems = failures(results)
    print("\n".join(problems) or "memory as it should be")  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
