"""Measure planning on made-up statistics: its time, its memory, and how far the plan is from the optimum.

    python -m tools.bench_allocate [--layers 58] [--experts 256] [--bpw 2.2] [--size] [--json]

Without options, it plans one layer of 256 experts (goal: proven optimal in 2 s) and DeepSeek-V3's 58 layers
of 256 experts (goal: a gap of at most 0.1 % in 120 s and 4 GB), with 3 projections and 10 types each. An
error is that of the type on Gaussian weights times a sensitivity that has heavy tails over layers, experts
and projections: it is log-normal, and one expert in a hundred is a hundred times as sensitive as the others.
(Mixtral-8x7B has an expert with 122 times the median of its layer.)
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import click
import numpy as np

from mc_gguf.artifacts import PROJECTIONS, Calibration, ModelInfo, TensorSpec, expert_tensor_name
from mc_gguf.plan import Budget, plan
from tools.common import RELATIVE_ERROR

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS")
# Seconds, gap, GB.
LIMITS = {"one layer": (2.0, 1e-9, 4.0), "DeepSeek-V3": (120.0, 1e-3, 4.0)}


@dataclass(frozen=True)
class Result:
    """One program: its size, its time, its gap as a share of the objective, and the process's peak memory."""

    name: str
    n_item: int
    n_type: int
    bpw: float
    seconds: float
    gap: float
    peak_gb: float


def made_up(n_layer: int, n_expert: int, n_embd: int = 7168, n_ff: int = 2048, seed: int = 0) -> Calibration:
    """A calibration of a model with DeepSeek-V3's experts; every expert of every layer is different."""
    rng = np.random.default_rng(seed)
    shape = (n_layer, n_expert)
    use = rng.lognormal(0, 1, shape)
    spread = use * rng.lognormal(0, 0.7, (n_layer, 1)) * np.where(rng.random(shape) < 0.01, 100, 1)
    each = rng.lognormal(0, 0.3, (*shape, 3, 1)) * rng.lognormal(0, 0.05, (*shape, 3, len(TYPES)))
    error = spread[..., None, None] * each * np.array([RELATIVE_ERROR[name] for name in TYPES])
    shapes = {p: (n_ff, n_embd, n_expert) if p == "down" else (n_embd, n_ff, n_expert) for p in PROJECTIONS}
    stacks = [(expert_tensor_name(i, p), shapes[p]) for i in range(n_layer) for p in PROJECTIONS]
    tensors = tuple(TensorSpec(name, stack, "BF16") for name, stack in stacks)
    model = ModelInfo("deepseek2", n_layer, n_expert, 8, n_embd, n_ff, "0" * 64, 1 << 20, 40, tensors)
    statistics = {"frequency": use, "routing_weight": use, "sq_error": error, "output_sq": spread}
    return replace(Calibration.blank(model), types=TYPES, statistics=statistics)


def measure(name: str, n_layer: int, n_expert: int, bpw: float, as_file: bool = False) -> Result:
    """Time plan() for one budget; with `as_file` the budget is the size of the whole file."""
    from mc_gguf.container import file_bytes

    source = made_up(n_layer, n_expert)
    start = time.perf_counter()
    if as_file:
        assert source.model is not None
        size = partial(file_bytes, source.model)
        limit = int(bpw / 8 * source.model.n_ff * source.model.n_embd * 3 * n_layer * n_expert) + (4 << 20)
        found = plan(source, Budget(size_bytes=limit), file_bytes=size, objective="block")
    else:
        found = plan(source, Budget(bpw=bpw), objective="block")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert found.optimality_gap is not None
    n_item = n_layer * n_expert * len(PROJECTIONS)
    return Result(name, n_item, len(TYPES), bpw, seconds, found.optimality_gap, peak)


@click.command(help=__doc__)
@click.option("--layers", type=int, help="Plan a model of this many layers instead.")
@click.option("--experts", type=int, default=256, show_default=True)
@click.option("--bpw", "rates", type=float, multiple=True, default=(1.8, 2.2, 3.1), show_default=True)
@click.option("--size", "as_file", is_flag=True, help="Give the budget as the size of a file.")
@click.option("--json", "as_json", is_flag=True)
def main(layers: int | None, experts: int, rates: tuple[float, ...], as_file: bool, as_json: bool) -> None:
    sizes = {"own": (layers, experts)} if layers else {"one layer": (1, 256), "DeepSeek-V3": (58, 256)}
    for name, (n_layer, n_expert) in sizes.items():
        for bpw in rates:
            found = measure(name, n_layer, n_expert, bpw, as_file)
            reached = zip((found.seconds, found.gap, found.peak_gb), LIMITS.get(name, ()), strict=False)
            good = "ok" if all(value <= limit for value, limit in reached) else "MISSED"
            click.echo(
                json.dumps(asdict(found))
                if as_json
                else f"{name:<12} {found.n_item:>6} items, {bpw} bpw: {found.seconds:7.2f} s, "
                f"gap {found.gap:.1e}, peak {found.peak_gb:.2f} GB  {good}"
            )


if __name__ == "__main__":
    main()
