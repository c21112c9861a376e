"""Measure the speed of dynamic expert routing, as ratios in one run.

    python -m tools.experiments.make_model /tmp/m2 --layers 2
    python -m tools.bench_routing make /tmp/m2 /tmp/b              # /tmp/b/Q2_K.gguf and a mixed file
    python -m tools.bench_routing run /tmp/b/*.gguf                # what dropping experts gains
    python -m tools.bench_routing off /tmp/b/Q2_K.gguf --baseline LIB_DIR   # what it costs when it is off

`run` alternates the policies on one loaded model, round after round. It times

- MoE blocks at decode, from the router to the sum of the experts (by the scheduler's callback), with the
  second expert of every token dropped;
- whole decode steps with about 30 % of the second slots dropped by their thresholds, against what the number
  of bytes read predicts;
- prefill of --prefill tokens with 5 to 30 % of the expert activations dropped, including the importance by
  attention, with flash attention off and on.

`off` starts one process per side and round: the patched runtime with routing off, and the llama.cpp libraries
in --baseline. A ratio is one of times, in the order that its line names; the median, the lowest and the
highest of the rounds are printed.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

MIX = ("IQ2_XXS", "Q2_K", "Q3_K")
SEED_TOKENS = 7
N_PREFILL = 512
N_STEPS = 48
N_BEFORE = 32  # tokens in the cache before decode steps are timed


def tokens(n: int, n_vocab: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(SEED_TOKENS).integers(3, n_vocab, n)]


@dataclass(frozen=True)
class Ratios:
    """The ratios of all rounds of one setting."""

    what: str
    values: list[float]
    note: str = ""

    def __str__(self) -> str:
        v = self.values
        return f"{self.what:<58}{statistics.median(v):8.3f}{min(v):8.3f}{max(v):8.3f}  {self.note}"


@dataclass(frozen=True)
class Size:
    """How much is measured: threads, rounds, tokens of a prompt."""

    threads: int
    rounds: int
    prefill: int


@dataclass
class Model:
    """A loaded model whose routing can be switched; it times prompts and single decode steps."""

    path: Path
    flash_attn: bool
    size: Size
    cb_eval: Any = None
    llm: Any = field(init=False)

    def __post_init__(self) -> None:
        from mc_gguf.run.llama import Llama
        from mc_gguf.run.routing_api import routing_shape

        options: dict[str, Any] = {
            "n_ctx": 1024,
            "n_batch": self.size.prefill,
            "n_ubatch": self.size.prefill,
            "routing": "off",
        }
        with context_defaults(self.cb_eval):
            self.llm = Llama(self.path, n_threads=self.size.threads, flash_attn=self.flash_attn, **options)
        self.shape = routing_shape(self.llm._ctx.ctx)
        self.tokens = tokens(max(self.size.prefill, N_BEFORE + N_STEPS), self.llm.n_vocab())

    def set(self, policy: str, threshold: float = 0.0, protect: float = 0.02) -> None:
        from mc_gguf.routing.params import RoutingParams
        from mc_gguf.run.routing_api import reset_counters, set_routing

        thresholds = np.full((self.shape.n_layer, self.shape.n_rank), threshold, dtype=np.float32)
        set_routing(self.llm._ctx.ctx, RoutingParams(policy, protect=protect, thresholds=thresholds))
        reset_counters(self.llm._ctx.ctx)

    def prefill(self, n: int | None = None) -> float:
        """Seconds for a prompt of n tokens (default: the whole one) from an empty cache."""
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        start = time.perf_counter()
        self.llm.eval(self.tokens[: n or self.size.prefill])
        return time.perf_counter() - start

    def decode(self, n: int) -> list[float]:
        """Seconds of each of n steps after the first N_BEFORE tokens."""
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        self.llm.eval(self.tokens[:N_BEFORE])
        seconds = []
        for token in self.tokens[N_BEFORE : N_BEFORE + n]:
            start = time.perf_counter()
            self.llm.eval([token])
            seconds.append(time.perf_counter() - start)
        return seconds

    def dropped(self) -> float:
        """Share of the slots of ranks after the first that was dropped since the last set()."""
        from mc_gguf.run.routing_api import read_counters

        slots, _ = read_counters(self.llm._ctx.ctx)
        return float(slots[:, 1].sum() / max(1, slots[:, :2, 1:].sum()))

    def threshold_for(self, share: float, measure: Callable[[], object]) -> float:
        """The threshold that drops about this share of the slots after the first, found by bisection."""
        low, high = 0.0, 1.0
        for _ in range(9):
            middle = (low + high) / 2
            self.set("threshold", middle)
            measure()
            low, high = (middle, high) if self.dropped() < share else (low, middle)
        return (low + high) / 2


@contextmanager
def context_defaults(cb_eval: Any) -> Iterator[None]:
    """llama_cpp has no argument for the scheduler's callback: set it in the defaults that it starts from."""
    from mc_gguf.runtime import use_in_llama_cpp

    llama_cpp: Any = use_in_llama_cpp()
    original = llama_cpp.llama_cpp.llama_context_default_params

    def defaults() -> Any:
        params = original()
        if cb_eval is not None:
            params.cb_eval = cb_eval
        return params

    modules = (llama_cpp, llama_cpp.llama_cpp)
    for module in modules:
        module.llama_context_default_params = defaults
    try:
        yield
    finally:
        for module in modules:
            module.llama_context_default_params = original


class MoeTimer:
    """Seconds between the first and the last node of each MoE block."""

    FIRST, LAST = b"ffn_norm-", b"ffn_moe_out-"  # the router comes right after the norm

    def __init__(self) -> None:
        from mc_gguf.runtime import use_in_llama_cpp

        llama_cpp = use_in_llama_cpp().llama_cpp
        base = ctypes.CDLL(str(Path(llama_cpp._lib._name).parent / "libggml-base.so"))
        self.name = base.ggml_get_name
        self.name.argtypes, self.name.restype = [ctypes.c_void_p], ctypes.c_char_p
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._seen)
        self.seconds = 0.0
        self.start = 0.0

    def _seen(self, tensor: int, ask: bool, _data: object) -> bool:
        name = self.name(tensor)
        if ask:
            return bool(name.startswith((self.FIRST, self.LAST)))
        if name.startswith(self.FIRST):
            self.start = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self.start
        return True


def bytes_per_step(path: Path, expert_share: float) -> float:
    """Bytes of weights that a decode step reads: everything but the embeddings, of the experts this share."""
    from mc_gguf.runtime import packages

    total = 0.0
    for tensor in packages.load_gguf().GGUFReader(path).tensors:
        if tensor.name == "token_embd.weight":
            continue
        total += tensor.n_bytes * (expert_share if "_exps" in tensor.name else 1.0)
    return total


def moe_decode(path: Path, size: Size) -> Ratios:
    timer = MoeTimer()
    model = Model(path, False, size, timer.callback)

    def one(threshold: float) -> float:
        model.set("threshold", threshold)
        timer.seconds = 0.0
        model.decode(16)
        return timer.seconds

    one(0.0)
    ratios = [one(0.0) / one(2.0) for _ in range(size.rounds)]
    model.llm.close()
    return Ratios("MoE blocks at decode: both experts / only the first", ratios, "goal 1.6")


def decode(path: Path, size: Size) -> Ratios:
    model = Model(path, False, size)
    threshold = model.threshold_for(0.3, lambda: model.decode(N_STEPS))

    def one(policy: str) -> list[float]:
        model.set(policy, threshold)
        model.decode(1)
        model.set(policy, threshold)
        return model.decode(N_STEPS)

    pairs = [(one("off"), one("odp")) for _ in range(size.rounds + 1)][1:]
    dropped = model.dropped()
    ratios = [sum(off) / sum(odp) for off, odp in pairs]
    # a step does the same work in every round, so its lowest time leaves out other work on the machine
    lowest_off, lowest_odp = (np.min([pair[side] for pair in pairs], axis=0).sum() for side in (0, 1))
    best = float(lowest_off / lowest_odp)
    n_used, n_expert = model.shape.n_rank, model.shape.n_expert
    kept = 1 + (n_used - 1) * (1 - dropped)
    predicted = bytes_per_step(path, n_used / n_expert) / bytes_per_step(path, kept / n_expert)
    model.llm.close()
    gain, best_gain = ((ratio - 1) / (predicted - 1) for ratio in (statistics.median(ratios), best))
    note = (
        f"{dropped:.1%} of second slots dropped, bytes predict {predicted:.3f}: {gain:.0%} of it, by the "
        f"lowest time of each step {best:.3f}, {best_gain:.0%}; goal 90 %"
    )
    return Ratios("decode: off / odp", ratios, note)


def prefill(path: Path, size: Size, flash_attn: bool) -> Iterator[Ratios]:
    model = Model(path, flash_attn, size)
    for share in (0.1, 0.2, 0.6):  # of second slots
        threshold = model.threshold_for(share, lambda: model.prefill(64))

        def one(policy: str, threshold: float = threshold) -> float:
            model.set(policy, threshold)
            model.prefill(1)  # the first after a switch allocates
            model.set(policy, threshold)
            return model.prefill()

        one("odp")
        ratios = [one("off") / one("odp") for _ in range(size.rounds)]
        name = f"prefill {size.prefill}: off / odp, flash attention {'on' if flash_attn else 'off'}"
        yield Ratios(name, ratios, f"{model.dropped() / 2:.1%} of expert activations dropped")
    model.llm.close()


def flash_attention(path: Path, size: Size) -> Iterator[Ratios]:
    """What the importance costs with and without flash attention: nothing is dropped, everything computed."""
    for policy in ("off", "odp"):
        times: dict[bool, list[float]] = {False: [], True: []}
        models = {fa: Model(path, fa, size) for fa in times}
        for _ in range(size.rounds + 1):
            for fa, model in models.items():
                model.set(policy, 0.0)
                model.prefill(1)
                times[fa].append(model.prefill())
        for model in models.values():
            model.llm.close()
        ratios = [a / b for a, b in zip(times[False][1:], times[True][1:], strict=True)]
        yield Ratios(f"prefill {size.prefill}, {policy}: flash attention off / on", ratios)


@click.group(help=__doc__)
def main() -> None: ...


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", default=2, show_default=True)
def make(source: Path, folder: Path, threads: int) -> None:
    """Quantize SOURCE twice into FOLDER: every matrix in Q2_K, and the experts in three types in turn."""
    from mc_gguf.artifacts import FixedTypes
    from mc_gguf.quantize.writer import write_model
    from mc_gguf.source import open_checkpoint
    from tools.bench_quantize import make_calibration, make_plan

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(source)
    calibration = make_calibration(checkpoint.info, folder / "calibration")
    fixed = FixedTypes("Q2_K", "Q2_K", "Q2_K", "Q2_K")
    for name, types in (("Q2_K", ("Q2_K",)), ("mixed", MIX)):
        plan = make_plan(checkpoint.info, types, fixed, folder / f"{name}.plan")
        write_model(checkpoint, calibration, plan, folder / f"{name}.gguf", threads, resume=False)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--prefill", "n_prefill", default=N_PREFILL, show_default=True, help="Tokens of a prompt.")
def run(files: tuple[Path, ...], threads: int, rounds: int, n_prefill: int) -> None:
    """What dropping experts gains."""
    size = Size(threads, rounds, n_prefill)
    for path in files:
        click.echo(f"{path.name:<58}{'median':>8}{'lowest':>8}{'highest':>8}")
        click.echo(moe_decode(path, size))
        click.echo(decode(path, size))
        for fa in (False, True):
            for ratios in prefill(path, size, fa):
                click.echo(ratios)
        for ratios in flash_attention(path, size):
            click.echo(ratios)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--baseline", required=True, type=click.Path(path_type=Path), help="Folder with the other libllama."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--prefill", "n_prefill", default=N_PREFILL, show_default=True, help="Tokens of a prompt.")
def off(file: Path, baseline: Path, threads: int, rounds: int, n_prefill: int) -> None:
    """What the patch costs when routing is off."""
    from mc_gguf import runtime

    sides = {"baseline": baseline, "patched": runtime.require().lib_dir}
    times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sorted(sides, reverse=number % 2 == 1):  # each side is first in turn
            folder = sides[side]
            command = [sys.executable, "-m", "tools.bench_routing", "worker", str(file)]
            command += ["--threads", str(threads), "--prefill", str(n_prefill)]
            env = os.environ | {"LLAMA_CPP_LIB_PATH": str(folder)}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            times[side].append(json.loads(done.stdout))
    click.echo(f"{'':<58}{'median':>8}{'lowest':>8}{'highest':>8}")
    for what in ("decode", "prefill"):
        ratios = [a[what] / b[what] for a, b in zip(times["baseline"], times["patched"], strict=True)]
        best = min(t[what] for t in times["baseline"]) / min(t[what] for t in times["patched"])
        click.echo(Ratios(f"{what}: baseline / patched with routing off", ratios, f"lowest times {best:.3f}"))


@main.command(hidden=True)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--threads", default=2)
@click.option("--prefill", "n_prefill", default=N_PREFILL)
def worker(file: Path, threads: int, n_prefill: int) -> None:
    """One process of `off`: the seconds of a median decode step and of one prefill."""
    import llama_cpp

    llm: Any = llama_cpp.Llama(
        str(file),
        n_ctx=1024,
        n_batch=n_prefill,
        n_ubatch=n_prefill,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    rows = tokens(n_prefill + N_BEFORE, llm.n_vocab())
    llm.eval(rows[:N_BEFORE])  # the first use of the weights reads them from disk
    llm.reset()
    llm._ctx.kv_cache_clear()
    start = time.perf_counter()
    llm.eval(rows[:n_prefill])
    prefill_s = time.perf_counter() - start
    steps = []
    for token in rows[n_prefill:]:
        start = time.perf_counter()
        llm.eval([token])
        steps.append(time.perf_counter() - start)
    click.echo(json.dumps({"decode": statistics.median(steps), "prefill": prefill_s}))


if __name__ == "__main__":
    main()
