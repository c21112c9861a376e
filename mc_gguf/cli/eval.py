"""`mc-gguf eval`: how close GGUFs are to their 16-bit model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command, section
from mc_gguf.cli.result import show

texts = section("Text and reference")
tasks = section("Tasks")


@click.command(cls=Command)
@click.argument("models", metavar="MODEL...", type=o.PATH, nargs=-1, required=True)
@texts(
    "--text",
    type=o.PATH,
    multiple=True,
    help="Text to score, UTF-8; may be repeated. Take one that the model was not calibrated on.",
)
@texts(
    "--reference",
    type=o.PATH,
    help="The 16-bit GGUF to compare with, or its stored log-probabilities, as `llama-perplexity "
    "--kl-divergence-base` writes them.",
)
@texts("--tokens", type=click.IntRange(min=1), help="Tokens to score of each text.  [default: all]")
@texts(
    "--ctx",
    type=click.IntRange(16, 2**31 - 1),
    default=512,
    show_default=True,
    help="Tokens per chunk; the second half of each chunk is scored.",
)
@texts("-o", "--output", type=o.PATH, help="Write a report to this file, too: one page of HTML.")
@tasks(
    "--tasks", metavar="T,T,...", help="Tasks of lm-evaluation-harness to run (pip install 'mc-gguf[tasks]')."
)
@tasks("--tasks-path", type=o.PATH, help="A folder with tasks of your own (YAML).")
@tasks("--limit", type=click.IntRange(min=1), help="Documents of each task.  [default: all]")
@tasks("--fewshot", type=click.IntRange(min=0), help="Examples before each document.  [default: the task's]")
@o.routing_option
@o.threads_option
@o.quiet_option
@o.json_option
def command(models: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Measure how close each MODEL is to the 16-bit model.

    Perplexity on each text; with a reference, KL divergence from it, too. Definitions and numbers are
    those of llama.cpp's llama-perplexity. The reference's log-probabilities are computed once and kept in
    the user's cache. docs/guide/evaluate.md says what the numbers mean.
    """
    from mc_gguf.evaluate import evaluate

    typed = shlex.join(["mc-gguf", *sys.argv[1:]])
    found = evaluate(models, command=typed, hashes=as_json, **options)
    show(found.to_json(), found.table(), as_json)
