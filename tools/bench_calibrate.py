"""Peak memory and time of calibrate on Mixtral-shaped random checkpoints that differ only in their number of
layers.

    python tools/make_model.py mixtral-2 --layers 2 && python tools/make_model.py mixtral-4 --layers 4
    python tools/bench_calibrate.py mixtral-2 mixtral-4 --tokens 2048

Every model is calibrated in a process of its own; its peak resident set is what the kernel reports for it.
Prints one line a model, then the checks: at most one decoder layer in float32 plus 3 GB, and peaks within 5 %
of each other without the branches of sensitivity.py, whose number is that of the layers. Exits with 1 when a
check fails. Limits: pages of a memory-mapped source count as resident while they are mapped.
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
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mc_gguf.artifacts import ModelInfo

ALLOWANCE_BYTES = 3_000_000_000
SPREAD = 0.05


@dataclass(frozen=True)
class Measured:
    """One calibration: what it took, and what a decoder layer of the model takes in float32."""

    model: Path
    n_layer: int
    peak_bytes: int
    branch_bytes: int
    layer_bytes: int
    seconds: float

    def line(self) -> str:
        peak, branch, layer = (n / 1e9 for n in (self.peak_bytes, self.branch_bytes, self.layer_bytes))
        gb = f"{peak:.2f} GB peak ({branch:.2f} GB branches), one layer {layer:.2f} GB"
        return f"{self.model.name}: {self.n_layer} layers, {gb}, {self.seconds:.0f} s"


def measure(model: Path, tokens: int, options: list[str]) -> Measured:
    """Run `mc-gguf calibrate` on `model` in a child process."""
    from mc_gguf.checkpoint import open_checkpoint

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
    return Measured(model, info.n_layer, usage.ru_maxrss * unit, branches(info, tokens), 4 * weights, seconds)


def branches(info: ModelInfo, tokens: int) -> int:
    """Bytes of the branches and of what a layer adds to them."""
    from mc_gguf.corpus import DEFAULT_CTX
    from mc_gguf.sensitivity import SENSITIVITY_TOKENS, branch_rows

    rows = np.zeros((tokens // DEFAULT_CTX, DEFAULT_CTX), dtype=np.int32)
    n_tokens = branch_rows(rows, info.n_layer, info.n_embd, SENSITIVITY_TOKENS).size
    return 2 * (info.n_layer + 1) * n_tokens * info.n_embd * 4


def failures(results: list[Measured]) -> list[str]:
    """What is not as it should be."""
    found = [
        f"{r.model.name}: {r.peak_bytes / 1e9:.2f} GB exceed one layer and {ALLOWANCE_BYTES / 1e9:g} GB"
        for r in results
        if r.peak_bytes > r.layer_bytes + ALLOWANCE_BYTES
    ]
    peaks = [r.peak_bytes - r.branch_bytes for r in results]
    if max(peaks) > (1 + SPREAD) * min(peaks):
        found.append(f"peaks without branches differ by {100 * (max(peaks) / min(peaks) - 1):.1f} %")
    return found


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rows", default="256", help="rows a matrix for the errors: time, hardly memory")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    arguments = parser.parse_args()
    options = ["--tokens", str(arguments.tokens), "--rows", arguments.rows, "--threads", arguments.threads]
    results = []
    for model in arguments.models:
        results.append(measure(model, arguments.tokens, options))
        print(results[-1].line(), flush=True)  # noqa: T201 (what this script is for)
    problems = failures(results)
    print("\n".join(problems) or "memory as it should be")  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
