"""Measure the speed of MUL_MAT_ID_GROUPED against MUL_MAT_ID of the unpatched build, as ratios in one run.

    python -m tools.bench_op [--tokens 1,512] [--threads 1,2] [--rounds 7] [--seconds 0.5] [--json]

This needs both runtimes (mc-gguf runtime build; mc-gguf runtime build --unpatched). It answers two questions
for the shape of Mixtral-8x7B (n_embd 4096, n_ff 14336, 8 experts, top-2) with weights in plain buffers, that
is, without repacking:

- one group: how fast is the grouped op against MUL_MAT_ID when all experts have the same type?
- three groups: how fast is one op that mixes three types against MUL_MAT_ID on each type alone, its times
  weighted by usage?

The programs run in turn, round after round. A ratio is stock time / our time within a round: 1 is equal, and
above 1 ours is faster. The median, lowest and highest over the rounds are printed. `best` is the ratio of the
lowest times of all rounds, which leaves out what other work on the machine adds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from mc_gguf.runtime import require
from mc_gguf.runtime.builder import compile_program

SOURCE = Path(__file__).resolve().parent / "native" / "bench-op.cpp"
SINGLE = ("Q2_K", "IQ2_XXS", "IQ3_XXS")
MIXES = (("IQ1_M", "IQ2_XXS", "IQ3_XXS"), ("IQ2_XXS", "Q2_K", "Q3_K"))


@dataclass(frozen=True)
class Ratio:
    """Stock time / our time over the rounds of one setting; `best` is that of the lowest times."""

    types: str
    n_tokens: int
    n_threads: int
    median: float
    lowest: float
    highest: float
    best: float


@dataclass(frozen=True)
class NotRepacked:
    """A setting that cannot be measured with --repack: this CPU has no repacked form of these types."""

    types: str
    n_tokens: int
    n_threads: int
    not_repacked: tuple[str, ...]


@dataclass(frozen=True)
class Time:
    """Microseconds per op within one run: median and lowest, and the share of routed slots of each type. The
    median is 0 where the weights were to be repacked and cannot be.
    """

    median: float
    lowest: float
    shares: list[float]


@dataclass(frozen=True)
class Bench:
    """The two programs, how many seconds a run takes at least, and the matrices' shape."""

    stock: Path
    grouped: Path
    seconds: float
    shape: tuple[int, int]  # columns, rows
    repack: bool = False  # the stock side repacks its weights where it can

    def time(self, program: Path, types: str, n_tokens: int, n_threads: int) -> Time:
        env = os.environ | ({"REPACK": "1"} if self.repack and program == self.stock else {})
        numbers = (n_tokens, n_threads, self.seconds, *self.shape)
        command: list[str | Path] = [program, types, *map(str, numbers)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        return Time(found["us"], found["min_us"], found["share"])

    def ratio(
        self, types: tuple[str, ...], n_tokens: int, n_threads: int, rounds: int
    ) -> Ratio | NotRepacked:
        if missing := self.not_repacked(types):
            return NotRepacked("+".join(types), n_tokens, n_threads, missing)
        ours = []
        stock = []  # per round, one time per type
        for _ in range(rounds):
            ours.append(self.time(self.grouped, ",".join(types), n_tokens, n_threads))
            stock.append([self.time(self.stock, name, n_tokens, n_threads) for name in types])

        shares = ours[0].shares
        expected = [weighted(shares, [t.median for t in times]) for times in stock]
        ratios = [e / o.median for e, o in zip(expected, ours, strict=True)]
        lowest = [min(times[i].lowest for times in stock) for i in range(len(types))]
        best = weighted(shares, lowest) / min(o.lowest for o in ours)
        figures = (statistics.median(ratios), min(ratios), max(ratios), best)
        return Ratio("+".join(types), n_tokens, n_threads, *figures)

    def not_repacked(self, types: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `types` that the stock side should repack and cannot; it then measures nothing."""
        if not self.repack:
            return ()
        quick = replace(self, seconds=0.0)
        return tuple(name for name in types if quick.time(self.stock, name, 1, 1).median == 0)


def weighted(shares: list[float], times: list[float]) -> float:
    return sum(share * t for share, t in zip(shares, times, strict=True))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@click.command(help=__doc__)
@click.option("--tokens", default="1,512", show_default=True, help="Batch sizes.")
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="Least duration of one run.")
@click.option("--shape", default="4096,14336", show_default=True, help="Columns and rows of a matrix.")
@click.option("--types", default="", help="One type, or several joined by +.  [default: a list of both]")
@click.option("--repack", is_flag=True, help="Let the stock side repack its weights where this CPU does.")
@click.option("--json", "as_json", is_flag=True)
def main(
    tokens: str,
    threads: str,
    rounds: int,
    seconds: float,
    shape: str,
    types: str,
    repack: bool,
    as_json: bool,
) -> None:
    patched, unpatched = require(), require(patched=False)
    cols, rows = numbers(shape)
    bench = Bench(
        compile_program(unpatched, SOURCE, "bench-op"),
        compile_program(patched, SOURCE, "bench-op"),
        seconds,
        (cols, rows),
        repack,
    )
    settings = [tuple(types.split("+"))] if types else [*((name,) for name in SINGLE), *MIXES]
    if not as_json:
        click.echo(
            f"{'types':<28}{'tokens':>8}{'threads':>9}{'ratio':>9}{'lowest':>9}{'highest':>9}{'best':>9}"
        )
    for names in settings:
        for n_tokens in numbers(tokens):
            for n_threads in numbers(threads):
                r = bench.ratio(names, n_tokens, n_threads, rounds)
                click.echo(json.dumps(asdict(r)) if as_json else row(r))


def row(r: Ratio | NotRepacked) -> str:
    setting = f"{r.types:<28}{r.n_tokens:>8}{r.n_threads:>9}"
    if isinstance(r, NotRepacked):
        return f"{setting}  not measured: this CPU does not repack {', '.join(r.not_repacked)}"
    return f"{setting}{r.median:>9.3f}{r.lowest:>9.3f}{r.highest:>9.3f}{r.best:>9.3f}"


if __name__ == "__main__":
    main()
