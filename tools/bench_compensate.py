"""Measure error compensation: what it does to the model, and how long it takes.

    python -m tools.bench_compensate quality models/tiny-mixtral --types Q2_K,IQ2_XXS --text wiki.txt
    python -m tools.bench_compensate speed --type Q2_K --rows 14336 --cols 4096 [--passes 3] [--sweeps 1]

`quality` gives all experts one type and leaves everything else in 16 bits. It prints the mean KL divergence
to the 16-bit model, with ggml's quantizers and with compensation, from the same importance matrices; like
llama-perplexity it scores the second half of each window of --ctx tokens. It computes in torch, where the
weights are replaced by what the blocks stand for. `speed` times one made-up matrix: Gaussian, with correlated
inputs.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import PROJECTIONS, Calibration
from mc_gguf.common.files import sha256_of
from mc_gguf.common.progress import progress
from mc_gguf.compensate.experts import compensate, open_bank
from mc_gguf.compensate.matrix import CompensationOptions, quantize_compensated
from mc_gguf.compensate.products import add_squares, mirror
from mc_gguf.ggml.quantizers import dequantize_rows, init, quantize_rows
from mc_gguf.source import Checkpoint, open_checkpoint
from mc_gguf.source.decoder import CHUNK, Decoder, Expert
from mc_gguf.source.text import Corpus, load_corpus

Weights = Mapping[tuple[int, int, str], NDArray[np.float32]]


class Replaced(Decoder):
    """A decoder with other expert weights."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights) -> None:
        super().__init__(checkpoint)
        self.replaced = weights

    def expert(self, layer: int, expert: int) -> Expert:
        return Expert(*(torch.from_numpy(self.replaced[layer, expert, p]) for p in PROJECTIONS))


@torch.inference_mode()
def log_probs(decoder: Decoder, rows: NDArray[np.int32]) -> Tensor:
    """Log-probabilities [rows, n_scored, n_vocab] of the tokens that are scored."""
    hidden = decoder.embed(rows)
    for layer in range(decoder.checkpoint.info.n_layer):
        decoder.attention(layer, hidden)
        decoder.feed_forward(layer, hidden)
    return torch.log_softmax(decoder.logits(hidden[:, rows.shape[1] // 2 : -1]), dim=-1)


def divergence(reference: Tensor, found: Tensor) -> float:
    """Mean KL divergence in nats per token."""
    return float((reference.exp() * (reference - found)).sum(-1).mean())


@torch.inference_mode()
def importance(decoder: Decoder, corpus: Corpus) -> Calibration:
    """A calibration with importance matrices only."""
    info, hidden = decoder.checkpoint.info, decoder.embed(corpus.rows)
    sums = [np.zeros((info.n_layer, info.n_expert, n), dtype=np.float32) for n in (info.n_embd, info.n_ff)]
    for layer in range(info.n_layer):
        decoder.attention(layer, hidden)
        flat = hidden.view(-1, info.n_embd)
        routing, norm = decoder.route(layer, flat), decoder.ffn_norm(layer)
        for number in range(info.n_expert):
            tokens, expert = torch.nonzero(routing.experts == number)[:, 0], decoder.expert(layer, number)
            for part in torch.split(tokens, CHUNK):
                x = decoder.norm(flat[part], norm)
                for total, values in zip(sums, (x, expert.hidden(x)), strict=True):
                    total[layer, number] += values.square().sum(0).numpy() / len(tokens)
        decoder.feed_forward(layer, hidden)
    blank = Calibration.blank(info)
    statistics = {"imatrix_in": sums[0], "imatrix_mid": sums[1]}
    return replace(blank, statistics=statistics, fingerprint=corpus.sha256)


def plain_weights(checkpoint: Checkpoint, calibration: Calibration, name: str, threads: int) -> Weights:
    weights = {}
    for layer in range(checkpoint.info.n_layer):
        for expert in range(checkpoint.info.n_expert):
            for p in PROJECTIONS:
                rows, cols = checkpoint.info.expert_shape(p)
                blocks = quantize_rows(
                    checkpoint.expert(layer, p, expert), name, calibration.imatrix(layer, p, expert), threads
                )
                weights[layer, expert, p] = dequantize_rows(blocks, name, cols, rows)
    return weights


def compensated_weights(
    checkpoint: Checkpoint, calibration: Calibration, name: str, corpus: Corpus, threads: int
) -> Weights:
    info = checkpoint.info
    places = [(layer, expert) for layer in range(info.n_layer) for expert in range(info.n_expert)]
    with tempfile.TemporaryDirectory() as folder, progress(name) as bar:
        bank = open_bank(Path(folder), calibration)
        wanted = {place: frozenset((p, name) for p in PROJECTIONS) for place in places}
        bar.say(compensate(checkpoint, calibration, wanted, corpus, bank, threads, bar).text())
        weights = {}
        for layer, expert in places:
            for p in PROJECTIONS:
                rows, cols = info.expert_shape(p)
                blocks = bank.get(layer, p, expert, name)
                assert blocks is not None
                weights[layer, expert, p] = dequantize_rows(blocks, name, cols, rows)
        return weights


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--types", default="IQ2_XXS,IQ2_XS,IQ2_S,Q2_K,IQ3_XXS", show_default=True)
@click.option("--text", "texts", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--tokens", default=4096, show_default=True, help="Tokens of each text, from its start.")
@click.option("--ctx", default=512, show_default=True)
@click.option("--calibration-tokens", default=65536, show_default=True)
@click.option("--threads", default=1, show_default=True)
def quality(
    model: Path,
    types: str,
    texts: tuple[Path, ...],
    tokens: int,
    ctx: int,
    calibration_tokens: int,
    threads: int,
) -> None:
    """Mean KL divergence of uniform types, without and with compensation."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    decoder = Decoder(checkpoint)
    corpus = load_corpus(checkpoint, tokens=calibration_tokens)
    calibration = importance(decoder, corpus)
    rows = {path.name: first_rows(checkpoint, path, tokens, ctx) for path in texts}
    click.echo(
        f"text {', '.join(f'{path.name} {sha256_of(path)[:12]}' for path in texts)}; {tokens} tokens each"
    )
    reference = {name: log_probs(decoder, r) for name, r in rows.items()}
    for name in types.split(","):
        start = time.monotonic()
        plain = plain_weights(checkpoint, calibration, name, threads)
        middle = time.monotonic()
        ours = compensated_weights(checkpoint, calibration, name, corpus, threads)
        times = f"{middle - start:.0f} s, {time.monotonic() - middle:.0f} s"
        for text, r in rows.items():
            a, b = (divergence(reference[text], log_probs(Replaced(checkpoint, w), r)) for w in (plain, ours))
            click.echo(f"{name:8} {text:24} ggml {a:.5f} compensated {b:.5f} ratio {b / a:.3f}  ({times})")


def first_rows(checkpoint: Checkpoint, path: Path, tokens: int, ctx: int) -> NDArray[np.int32]:
    """Windows of `ctx` tokens from the start of the text, each with BOS in front if the model wants it."""
    ids = checkpoint.tokenize(path.read_text(encoding="utf-8")[: 16 * tokens])
    bos = [checkpoint.bos_id] if checkpoint.add_bos and checkpoint.bos_id is not None else []
    width = ctx - len(bos)
    rows = [bos + ids[i * width : (i + 1) * width] for i in range(tokens // ctx)]
    return np.asarray(rows, dtype=np.int32)


@main.command()
@click.option("--type", "name", default="Q2_K", show_default=True)
@click.option("--rows", default=14336, show_default=True)
@click.option("--cols", default=4096, show_default=True)
@click.option("--passes", default=CompensationOptions().passes, show_default=True)
@click.option("--sweeps", default=CompensationOptions().sweeps, show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Inputs that make up the Hessian.")
@click.option("--threads", default=2, show_default=True)
def speed(name: str, rows: int, cols: int, passes: int, sweeps: int, tokens: int, threads: int) -> None:
    """Time and error of one matrix, without and with compensation."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weights = torch.randn(rows, cols).numpy()
    x = torch.randn(tokens, cols // 4) @ torch.randn(cols // 4, cols) / cols**0.5
    x += 0.3 * torch.randn(tokens, cols)
    init([name])
    hessian, diagonal = torch.zeros(cols, cols), x.square().mean(0).numpy()
    add_squares(hessian, x)
    mirror(hessian)
    start, cpu = time.monotonic(), [time.process_time()]
    plain = quantize_rows(weights, name, diagonal, threads)
    middle = time.monotonic()
    cpu.append(time.process_time())
    options = CompensationOptions(passes=passes, sweeps=sweeps)
    ours = quantize_compensated(weights, name, hessian, diagonal, options, threads, plain)
    end = time.monotonic()
    cpu.append(time.process_time())
    loss = []
    for blocks in (ours, plain):
        error = torch.from_numpy(dequantize_rows(blocks, name, cols, rows)[:512] - weights[:512])
        loss.append(float((x @ error.T).square().sum()))
    tflop = (cols**3 / 3 + rows * cols**2 * (1 + 2 * sweeps + 2)) / 1e12
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    click.echo(
        f"{name} {rows}x{cols} passes {passes} sweeps {sweeps} threads {threads}: "
        f"ggml {middle - start:.1f} s (CPU {cpu[1] - cpu[0]:.1f} s), "
        f"compensated {end - middle:.1f} s (CPU {cpu[2] - cpu[1]:.1f} s) "
        f"({tflop:.2f} TFLOP in matrix products), error {loss[0] / loss[1]:.3f} of ggml's, peak {peak:.1f} GB"
    )


if __name__ == "__main__":
    main()
