"""What `mc-gguf eval` does: everything is checked first, then models are evaluated one by one, then shown."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from mc_gguf.common.errors import McError
from mc_gguf.evaluate.cache import references
from mc_gguf.evaluate.evaluation import evaluate
from mc_gguf.evaluate.files import fingerprint
from mc_gguf.evaluate.report import Report, write_report
from mc_gguf.evaluate.result import Result, table
from mc_gguf.evaluate.tasks.runner import TaskRequest, TaskResult, check_tasks, run_tasks, task_table
from mc_gguf.evaluate.text import Text
from mc_gguf.routing import Routing
from mc_gguf.run.llama import check_file

__all__ = ["Request", "TaskRequest", "run"]

NO_TEXT = (
    "there is nothing to evaluate on: give --text FILE, a text that the model was not calibrated on, for "
    "instance the test part of WikiText-2 (the text that comes with mc_gguf is calibration text: a file "
    "calibrated on it would look better than it is), or --tasks"
)


@dataclass(frozen=True)
class Request:
    """What the user asked for; n_threads 0: all cores."""

    models: tuple[Path, ...]
    texts: tuple[Path, ...]
    reference: Path | None
    n_ctx: int
    n_tokens: int | None
    routing: str
    tasks: TaskRequest | None
    n_threads: int


def run(request: Request, as_json: bool, output: Path | None) -> None:
    """Evaluates, prints on stdout, and writes the report where one is wanted."""
    texts = check(request, output)
    stored = None
    if request.reference and texts:
        stored = references(request.reference, texts, request.n_ctx, request.n_tokens, request.n_threads)
    results: list[Result] = []
    tasks: list[TaskResult] = []
    for model in request.models:
        if texts:
            results += evaluate(
                model,
                texts,
                stored,
                n_ctx=request.n_ctx,
                n_tokens=request.n_tokens,
                routing=request.routing,
                n_threads=request.n_threads,
                with_hash=as_json or output is not None,
            )
        if request.tasks:
            tasks += run_tasks(model, request.tasks, request.routing, request.n_threads)
    if output:
        write_report(output, make_report(request, texts, results, tasks))
    click.echo(as_text(results, tasks, as_json))


def check(request: Request, output: Path | None) -> list[Text]:
    """The texts, read. McError for whatever can be known before hours of computing."""
    Routing.of(request.routing)
    for model in request.models:
        check_file(model)
    if not request.texts and not request.tasks:
        raise McError(NO_TEXT)
    if request.reference and not request.texts:
        raise McError("--reference is compared on a text: give --text FILE, too")
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise McError(f"{output}: the report needs the name of a file in a folder that exists")
    if request.tasks:
        check_tasks(request.tasks)
    return [Text.read(path) for path in request.texts]


def as_text(results: Sequence[Result], tasks: Sequence[TaskResult], as_json: bool) -> str:
    """What goes to stdout."""
    if as_json:
        return json.dumps([r.to_json() for r in results] + [t.to_json() for t in tasks], indent=1)
    return "\n\n".join([table(results)] * bool(results) + [task_table(tasks)] * bool(tasks))


def make_report(
    request: Request, texts: Sequence[Text], results: Sequence[Result], tasks: Sequence[TaskResult]
) -> Report:
    hashes = {str(path): fingerprint(path) for path in [*request.models, *filter(None, [request.reference])]}
    hashes |= {text.name: text.sha256 for text in texts}
    command = shlex.join(["mc-gguf", *sys.argv[1:]])
    return Report(tuple(results), tuple(tasks), command, hashes, request.reference)
