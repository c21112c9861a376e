"""Measure the throughput of `mc-gguf eval` against llama-perplexity: same file, text, threads and batches.

    python -m tools.bench_eval LLAMA_PERPLEXITY MODEL [--reference BF16.gguf] [--chunks 80] [--threads 1]

LLAMA_PERPLEXITY is the tool built from the pinned llama.cpp (cmake target llama-perplexity), with our patches
if MODEL is mixed. Rounds alternate. A round is timed from the end of the first pass over the model to the end
of the last, which leaves out loading and tokenizing. The script prints the tokens per second of both, as
medians over the rounds, and their ratio.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray

from tools.common import WIKITEXT

if TYPE_CHECKING:
    from mc_gguf.evaluate.reference import Reference
    from mc_gguf.evaluate.scorer import Scorer

PASS = re.compile(rb"seconds per pass")
FINAL = re.compile(rb"Final estimate|====== Perplexity statistics")


def upstream_seconds(command: list[str], n_pass: int) -> float:
    """Seconds from the end of the first pass to the end of the last, scaled to all of them."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    start = end = 0.0
    for line in process.stdout:
        if PASS.search(line) and not start:
            start = time.perf_counter()
        elif FINAL.search(line) and not end:
            end = time.perf_counter()
    if process.wait() or not start or not end:
        raise click.ClickException(f"{' '.join(command)} failed")
    return (end - start) * n_pass / (n_pass - 1)


@click.command(help=__doc__)
@click.argument("tool", type=click.Path(path_type=Path, exists=True))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--reference", type=click.Path(path_type=Path, exists=True), help="Measure KL divergence too.")
@click.option("--ctx", default=512, show_default=True)
@click.option("--chunks", "n_chunk", default=80, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    tool: Path, model: Path, reference: Path | None, ctx: int, n_chunk: int, threads: int, rounds: int
) -> None:
    from mc_gguf.evaluate.scorer import Scorer
    from mc_gguf.evaluate.text import Text

    text = Text.read(WIKITEXT)
    with TemporaryDirectory() as folder, Scorer(model, ctx, n_threads=threads) as scorer:
        chunks = scorer.cut(text)[:n_chunk]
        command = [str(tool), "-m", str(model), "-f", str(WIKITEXT), "-c", str(ctx), "-t", str(threads)]
        compare(scorer, chunks, None, [*command, "--chunks", str(n_chunk)], rounds)
        if reference:
            with Scorer(reference, ctx, n_threads=threads) as base:
                stored = base.store(chunks, Path(folder) / "stored.logits")
            options = ["--kl-divergence", "--kl-divergence-base", str(stored.path)]
            compare(scorer, chunks, stored, command + options, rounds)


def compare(
    scorer: Scorer, chunks: NDArray[np.int32], stored: Reference | None, command: list[str], rounds: int
) -> None:
    """Run both in turn and print a line."""
    n_pass = -(-len(chunks) // scorer.n_seq)
    times: dict[str, list[float]] = {"llama-perplexity": [], "mc_gguf": []}
    for _ in range(rounds):
        times["llama-perplexity"].append(upstream_seconds(command, n_pass))
        marks: list[float] = []
        scorer.score(chunks, stored, lambda n, marks=marks: marks.append(time.perf_counter()))  # type: ignore[misc]
        times["mc_gguf"].append((time.perf_counter() - marks[0]) * n_pass / (n_pass - 1))
    speeds = {name: chunks.size / statistics.median(values) for name, values in times.items()}
    told = ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items())
    ratio = speeds["mc_gguf"] / speeds["llama-perplexity"]
    click.echo(f"{'KL divergence' if stored else 'perplexity'}: {told}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
