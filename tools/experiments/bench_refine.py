"""Compare refinement with evolutionary search: same start, text, blocks, and CPU time of one thread.

    python -m tools.experiments.bench_refine run DIR --bpw 2.0625 [--method expansion] [--start pmq]
    python -m tools.experiments.bench_refine report DIR

There are two methods. `expansion` is mc-gguf refine (mc_gguf/refine/search.py). `evopress` is the search of
EvoPress (Sieberling et al. 2024, arXiv 2410.14649). It makes offspring of the incumbent by level switches: a
matrix gets the next larger type, and others get smaller ones until the budget holds; the number of switches
is the lower of two draws from 1 to 3. KL divergence selects among the offspring in three steps, on few, more
and many token rows that are drawn anew in every generation, and the incumbent takes part in the last step.
There are fewer offspring and tokens than in the paper (128 and 131,072), so that minutes suffice for many
generations.

Time is the CPU time of this process, so that other work on the machine does not count, and it starts when all
matrices are dequantized. Compensated blocks come from DIR/bank, which is filled with every type first; a
search is charged --matrix-seconds for each of the matrices near its start plan, which refine would have had
to make. `--blocks ggml` searches on ggml's blocks, with all types and no charge. Everything found is
quantized with compensation and measured by the runtime as in tools/experiments/quality_experiment.py, whose
DIR/16-bit.gguf and DIR/seed-0.calib.safetensors are used if they are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from tools.common import MODEL
from tools.experiments.quality_experiment import Workshop, measure, text_files

Ints = NDArray[np.int64]
# Offspring per generation, and the (token rows, survivors) of the selection steps.
N_OFFSPRING = 32
STEPS = ((1, 8), (6, 2), (24, 1))
HELD_OUT = 4  # every fourth row
N_CTX = 512
N_SCORED = 4096  # tokens of each text that the runtime scores


@dataclass(eq=False)
class EvoPress:
    """The baseline. `choice` is the incumbent; `scope` knows the sizes of the types by matrix."""

    scope: Any
    evaluator: Any
    allowed: NDArray[np.bool_]
    choice: Ints
    rng: np.random.Generator
    generations: int = 0
    kept: int = 0
    levels: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        # The columns of every projection, from the smallest type to the largest.
        self.levels = np.argsort(self.scope.problem.size[0], axis=1, kind="stable")

    def mutate(self) -> Ints:
        """The incumbent after a few level switches that keep the budget."""
        child = self.choice.copy()
        for _ in range(min(self.rng.integers(1, 4), self.rng.integers(1, 4))):
            self._step(child, +1)
        for _ in range(100):
            if self.scope.fits(child):
                break
            self._step(child, -1)
        return child if self.scope.fits(child) else self.choice

    def _step(self, child: Ints, direction: int) -> None:
        place = tuple(self.rng.integers(n) for n in child.shape)
        order = self.levels[place[-1]]
        options = [c for c in order if self.allowed[place][c] or c == child[place]]
        at = options.index(child[place]) + direction
        if 0 <= at < len(options):
            child[place] = options[at]

    def generation(self, assignment: Callable[[Ints], Any]) -> None:
        pool = [self.mutate() for _ in range(N_OFFSPRING)]
        pool = [c for c in pool if (c != self.choice).any()]
        for step, (n_row, n_left) in enumerate(STEPS):
            if step == len(STEPS) - 1:
                pool.append(self.choice)
            rows = self.rng.permutation(len(self.evaluator.rows))[:n_row]
            found = self.evaluator.sweep([assignment(c) for c in pool], rows).mean(axis=1)
            pool = [pool[i] for i in np.argsort(found, kind="stable")[:n_left]]
        self.generations += 1
        if (pool[0] != self.choice).any():
            self.choice, self.kept = pool[0], self.kept + 1
            self.evaluator.settle(assignment(self.choice))


class Bench:
    """The start plan, the blocks and the token rows of one arm."""

    def __init__(self, shop: Workshop, bpw: float, start: str, blocks: str, tokens: int, seed: int) -> None:
        from mc_gguf.compensate import experts as compensation
        from mc_gguf.plan import Budget
        from mc_gguf.refine.blocks import NEAR, ggml_blocks
        from mc_gguf.refine.budget import scope_of
        from mc_gguf.refine.matrices import Matrices
        from mc_gguf.refine.memory import wanted_types
        from mc_gguf.refine.passes import Layers
        from mc_gguf.source.decoder import Decoder
        from mc_gguf.source.text import load_corpus

        folder = shop.folder
        self.folder, self.shop = folder, shop
        self.calibration = self.shop.calibration(0)
        self.plan = self.shop._plan(Budget(bpw=bpw), start, 0, self.calibration)
        self.scope, self.start = scope_of(self.plan, self.calibration)
        self.bank = compensation.open_bank(folder / "bank", self.calibration)
        size, n_type = self.scope.problem.size[0], len(self.scope.problem.types)
        near = wanted_types(size, self.start, NEAR)
        self.allowed = near if blocks == "compensated" else wanted_types(size, self.start, n_type)
        self.n_charged = int(near.sum()) if blocks == "compensated" else 0
        plain = ggml_blocks(self.shop.checkpoint, self.calibration, folder / "ggml-bank", 1)
        self.shop._bank(self.plan, _arm())  # all matrices of all types, compensated
        bank = self.bank if blocks == "compensated" else plain.bank
        matrices = Matrices(self.shop.checkpoint, plain.quantizer, bank, 8 << 30)
        self.layers = Layers(Decoder(self.shop.checkpoint), matrices)
        rows = load_corpus(self.shop.checkpoint, (), tokens, seed=seed).rows
        rows = np.random.default_rng(seed).permutation(rows)
        held_out = np.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
        self.rows, self.held_out = rows[~held_out], rows[held_out]

    def assignment(self, columns: Ints) -> Any:
        from mc_gguf.refine.passes import Assignment

        return Assignment(self.scope.problem.types, columns)

    def warm(self) -> None:
        """Dequantize every matrix that a search may read."""
        for layer, expert, p, t in zip(*np.nonzero(self.allowed), strict=True):
            name = self.scope.problem.types[t]
            self.layers.matrices.get(int(layer), ("gate", "up", "down")[p], int(expert), name)

    def search(self, method: str, seconds: float, folder: Path) -> tuple[Ints, dict[str, Any]]:
        from mc_gguf.common.progress import progress
        from mc_gguf.refine.passes import Evaluator
        from mc_gguf.refine.search import Search
        from mc_gguf.refine.state import SearchState

        self.warm()
        began = time.process_time()
        evaluator = Evaluator(self.layers, self.rows, self.scope.problem.types, time.process_time)
        if method == "evopress":
            evaluator.settle(self.assignment(self.start))
            rng = np.random.default_rng(0)
            one = EvoPress(self.scope, evaluator, self.allowed, self.start, rng)
            while time.process_time() - began < seconds:
                one.generation(self.assignment)
            return one.choice, {"rounds": one.generations, "accepted": one.kept}
        folder.mkdir(parents=True, exist_ok=True)
        state = SearchState(self.start.copy())
        search = Search(
            self.scope,
            evaluator,
            state,
            folder,
            0,
            seconds,
            began,
            allowed=self.allowed,
            clock=time.process_time,
        )
        with progress("search", quiet=True) as bar:
            search.run(bar)
        return state.columns, {"rounds": state.rounds, "accepted": state.accepted}

    def held_out_divergence(self, columns: Ints) -> list[float]:
        """The divergences of start and end on rows that no search saw, with compensated blocks."""
        from mc_gguf.refine.matrices import Matrices
        from mc_gguf.refine.passes import Evaluator, Layers
        from mc_gguf.source.decoder import Decoder

        matrices = Matrices(self.shop.checkpoint, self.layers.matrices.quantizer, self.bank, 8 << 30)
        layers = Layers(Decoder(self.shop.checkpoint), matrices)
        evaluator = Evaluator(layers, self.held_out, self.scope.problem.types)
        before = evaluator.settle(self.assignment(self.start)).mean()
        return [float(before), float(evaluator.sweep([self.assignment(columns)])[0].mean())]

    def measured(self, columns: Ints, name: str, n_scored: int) -> dict[str, float]:
        """The KL divergence of the file by text, in nats per token, measured by the runtime."""
        from mc_gguf.quantize.writer import write_model

        path, problem = self.folder / f"{name}.gguf", self.scope.problem
        plan = replace(
            self.plan,
            experts=problem.experts(columns),
            expert_bpw=problem.bpw(columns),
            expert_bytes=problem.expert_bytes(columns),
            file_bytes=self.scope.file_bytes(columns),
        ).save(self.folder / f"{name}.plan.json")
        write_model(self.shop.checkpoint, self.calibration, plan, path, 1, resume=False, bank=self.bank)
        found = measure(path, self.shop.sixteen_bit(), text_files(self.folder), N_CTX, n_scored)
        path.unlink()
        return {r["text"]: r["mean_kld"] for r in found}


def _arm() -> Any:
    from tools.experiments.quality_experiment import Arm

    return Arm("", "", True, 0)


@click.group(help=__doc__)
def main() -> None: ...


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--bpw", type=float, required=True)
@click.option("--method", type=click.Choice(["expansion", "evopress"]), default="expansion")
@click.option("--start", type=click.Choice(["pmq", "layer"]), default="pmq")
@click.option("--blocks", type=click.Choice(["compensated", "ggml"]), default="compensated")
@click.option("--seconds", default=300.0, show_default=True)
@click.option("--matrix-seconds", default=0.2, show_default=True)
@click.option("--tokens", default=32768, show_default=True, help="Tokens to search on.")
@click.option(
    "--scored", "n_scored", default=N_SCORED, show_default=True, help="Tokens of each text to score."
)
@click.option("--model", type=click.Path(path_type=Path), default=MODEL, help="[default: the bundled model]")
@click.option("--calibration-tokens", type=int, help="Tokens to calibrate on.  [default: mc-gguf's own]")
@click.option("--types", help="Types to measure, separated by commas.  [default: all]")
def run(
    folder: Path,
    bpw: float,
    method: str,
    start: str,
    blocks: str,
    seconds: float,
    matrix_seconds: float,
    tokens: int,
    n_scored: int,
    model: Path,
    calibration_tokens: int | None,
    types: str | None,
) -> None:
    """Run one search and add a record to FOLDER/refine.jsonl."""
    import torch

    torch.set_num_threads(1)
    name = f"{method}-{start}-{blocks}-{bpw:g}"
    shop = Workshop(folder, model, 1, calibration_tokens, tuple(types.split(",")) if types else None)
    bench = Bench(shop, bpw, start, blocks, tokens, 1)
    charged = bench.n_charged * matrix_seconds
    columns, record = bench.search(method, seconds - charged, folder / name)
    record |= {"method": method, "start": start, "blocks": blocks, "bpw": bpw, "charged": charged}
    record["changed"] = int((columns != bench.start).sum())
    record["held_out"] = bench.held_out_divergence(columns)
    stored = folder / f"start-{start}-{bpw:g}.json"
    if not stored.exists():
        stored.write_text(json.dumps(bench.measured(bench.start, f"{name}-start", n_scored)))
    record["start_kld"] = json.loads(stored.read_text())
    record["kld"] = bench.measured(columns, name, n_scored)
    with (folder / "refine.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    click.echo(json.dumps(record))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Print the records as a table: KL divergences in 0.001 nats per token; in brackets, end over start."""
    records = [json.loads(line) for line in (folder / "refine.jsonl").read_text().splitlines()]
    texts = list(records[0]["kld"])
    click.echo(f"| bits | start | blocks | method | rounds | held out | {' | '.join(texts)} |")
    click.echo("|---" * (6 + len(texts)) + "|")
    for r in sorted(records, key=lambda r: (r["bpw"], r["start"], r["blocks"], r["method"])):
        pairs = [tuple(r["held_out"]), *((r["start_kld"][t], r["kld"][t]) for t in texts)]
        cells = [f"{1e3 * a:.2f} → {1e3 * b:.2f} ({b / a:.3f})" for a, b in pairs]
        head = [f"{r['bpw']:g}", r["start"], r["blocks"], r["method"], f"{r['accepted']}/{r['rounds']}"]
        click.echo(f"| {' | '.join([*head, *cells])} |")


if __name__ == "__main__":
    main()
