"""`mc-gguf eval`: how close GGUFs are to their 16-bit model."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("models", metavar="MODEL...", type=_PATH, nargs=-1, required=True)
@click.option(
    "--text",
    "texts",
    type=_PATH,
    multiple=True,
    help="A text file to score; may be repeated. Take one that the model was not calibrated on.",
)
@click.option(
    "--reference",
    type=_PATH,
    help="The 16-bit GGUF to compare with; or its stored log-probabilities, as `llama-perplexity "
    "--kl-divergence-base` writes them.",
)
@click.option(
    "--ctx",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="Tokens of a chunk; its second half is scored.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to score of each text.  [default: all]")
@click.option(
    "--routing",
    default="off",
    show_default=True,
    metavar="R",
    help="Which experts a token may do without, as in chat. The reference always uses all of them.",
)
@click.option(
    "--tasks", metavar="T,T", help="Tasks of lm-evaluation-harness to run (pip install 'mc_gguf[tasks]')."
)
@click.option("--tasks-path", type=_PATH, help="A folder with tasks of your own (YAML).")
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task.  [default: all]")
@click.option("--fewshot", type=click.IntRange(min=0), help="Examples before each.  [default: the task's]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list instead of a table.")
@click.option("-o", "--output", type=_PATH, help="Write a report to this file, too: one page of HTML.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
def command(
    models: tuple[Path, ...],
    texts: tuple[Path, ...],
    reference: Path | None,
    ctx: int,
    tokens: int | None,
    routing: str,
    tasks: str | None,
    tasks_path: Path | None,
    limit: int | None,
    fewshot: int | None,
    as_json: bool,
    output: Path | None,
    threads: int | None,
) -> None:
    """Perplexity of each MODEL on each text; with a reference, KL divergence from it, too.

    Definitions and numbers are those of llama.cpp's llama-perplexity. The reference's log-probabilities are
    computed once and kept in the user's cache. docs/eval.md says what the numbers mean.
    """
    from mc_gguf.evaluate.command import Request, TaskRequest, run

    wanted = TaskRequest(tuple(tasks.split(",")), tasks_path, limit, fewshot) if tasks else None
    request = Request(models, texts, reference, ctx, tokens, routing, wanted, threads or 0)
    run(request, as_json, output)
