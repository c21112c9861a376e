"""Tokens per second of a capture and of upstream's llama-imatrix, on the same file, in one run.

    python -m tools.bench_capture model-bf16.gguf --imatrix build/bin/llama-imatrix --threads 2

Both evaluate the same number of tokens of the bundled text in rows of 512; llama-imatrix takes one row per
batch (its default), and we as many as calibrate would, and one. Pairs alternate; what is printed is the
median of the ratios. Neither figure includes the loading of the model: llama-imatrix's is what the tokens
take beyond one row.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from importlib import resources
from pathlib import Path

import click
import torch

from mc_gguf.capture.capture import CaptureOptions, capture, rows_at_once, sampled_tokens
from mc_gguf.capture.context import Devices
from mc_gguf.capture.spool import Spool
from mc_gguf.common.machine import memory_bytes
from mc_gguf.common.progress import progress
from mc_gguf.source import open_checkpoint
from mc_gguf.source.text import load_corpus
from tools.common import run_tool

CTX = 512


def ours(model: Path, tokens: int, threads: int, n_seq: int | None) -> float:
    """Tokens per second of capture(), the loading of the model left out."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    rows = load_corpus(checkpoint, tokens=tokens, ctx=CTX).rows
    samples = sampled_tokens(len(rows), CTX, 2048, CTX)
    n_seq = n_seq or rows_at_once(checkpoint.info, rows, model.stat().st_size, memory_bytes())
    options = CaptureOptions(rows, samples, samples[:CTX], n_seq)
    with tempfile.TemporaryDirectory() as folder, progress("capture", quiet=True) as bar:
        times: list[float] = []
        bar.advance = lambda amount=1, note="": times.append(time.monotonic())  # type: ignore[method-assign]
        capture(model, checkpoint.info, options, Devices(threads), Spool(Path(folder)), bar)
    # The first batch includes the loading.
    per_batch = n_seq * CTX
    return per_batch * (len(times) - 2) / (times[-1] - times[1])


def theirs(program: Path, model: Path, tokens: int, threads: int) -> float:
    """Tokens per second of llama-imatrix: what `tokens` more take than one row."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        data = resources.files("mc_gguf.source").joinpath("data", "calibration-mix.txt").read_bytes()
        text.write_bytes(data)
        command = [program, "-m", model, "-f", text, "-c", CTX, "-b", CTX, "-ub", CTX, "-t", threads]
        command += ["-o", Path(folder) / "i.gguf", "--process-output", "--no-ppl", "--chunks"]
        seconds = [_seconds([*command, n]) for n in (1, 1 + tokens // CTX)]
    return tokens / (seconds[1] - seconds[0])


def _seconds(command: list[object]) -> float:
    start = time.monotonic()
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"llama-imatrix failed: {done.stderr[-500:]}")
    return time.monotonic() - start


@click.command(help=__doc__)
@click.argument(
    "models", metavar="GGUF...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True)
)
@click.option("--imatrix", required=True, type=click.Path(path_type=Path, exists=True), help="The program.")
@click.option("--tokens", default=8192, show_default=True, help="Tokens of each run.")
@click.option("--threads", default=2, show_default=True, help="Threads of both.")
@click.option("--pairs", default=3, show_default=True, help="Runs of each.")
def main(models: tuple[Path, ...], imatrix: Path, tokens: int, threads: int, pairs: int) -> None:
    for model in models:
        for n_seq in (None, 1):
            ratios, rates = [], []
            for _ in range(pairs):
                other = theirs(imatrix, model, tokens, threads)
                rate = ours(model, tokens, threads, n_seq)
                ratios.append(rate / other)
                rates.append(rate)
            which = "rows as calibrate takes" if n_seq is None else "one row at a time"
            low, high = min(ratios), max(ratios)
            click.echo(
                f"{model.name}, {which}: {statistics.median(rates):.0f} tokens/s, "
                f"{statistics.median(ratios):.2f} of llama-imatrix ({low:.2f} to {high:.2f})"
            )


if __name__ == "__main__":
    run_tool(main, "bench_capture")
