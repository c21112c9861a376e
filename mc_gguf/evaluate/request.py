"""What evaluate() is asked for and what it finds: everything is checked first, then models are evaluated one
by one, then the report is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mc_gguf.common.arguments import to_paths
from mc_gguf.common.errors import McError, about
from mc_gguf.common.files import check_output, check_shards
from mc_gguf.common.machine import threads_for_now
from mc_gguf.evaluate.cache import is_stored, references
from mc_gguf.evaluate.comparable import check_vocabularies, warn_if_quantized
from mc_gguf.evaluate.evaluation import evaluate_model
from mc_gguf.evaluate.files import model_sha256
from mc_gguf.evaluate.report import Report, write_report
from mc_gguf.evaluate.result import Result, result_table
from mc_gguf.evaluate.tasks.runner import TaskRequest, TaskResult, check_tasks, run_tasks, task_table
from mc_gguf.evaluate.text import Text
from mc_gguf.routing import Routing
from mc_gguf.run.opening import check_file

NO_TEXT = (
    "there is nothing to evaluate on: give a text that the model was not calibrated on, for instance the "
    "test part of WikiText-2 (the text that comes with mc_gguf is calibration text: a file calibrated on it "
    "would look better than it is), or tasks"
)


@dataclass(frozen=True)
class Evaluation:
    """One result for each model and text, and one for each model, task and metric."""

    results: tuple[Result, ...]
    tasks: tuple[TaskResult, ...] = ()

    def to_json(self) -> list[dict[str, Any]]:
        return [found.to_json() for found in self.results] + [found.to_json() for found in self.tasks]

    def table(self) -> str:
        """Aligned text for the terminal."""
        parts = []
        if self.results:
            parts.append(result_table(self.results))
        if self.tasks:
            parts.append(task_table(self.tasks))
        return "\n\n".join(parts)


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of mc_gguf.evaluate.evaluate; n_threads 0: the cores that are free."""

    models: tuple[Path, ...]
    texts: tuple[Path, ...]
    reference: Path | None
    n_ctx: int
    n_tokens: int | None
    routing: str
    tasks: TaskRequest | None
    output: Path | None
    command: str
    with_hashes: bool
    n_threads: int
    quiet: bool

    def run(self) -> Evaluation:
        """Check everything, evaluate, and write the report where one is wanted."""
        texts = self.check()
        request = replace(self, n_threads=threads_for_now(self.n_threads or None))
        results, tasks = request._results(texts), request._tasks()
        found = Evaluation(tuple(results), tuple(tasks))
        if self.output:
            write_report(self.output, self._report(texts, found))
        return found

    def check(self) -> list[Text]:
        """The texts, read. Raises McError for whatever can be known before hours of computing."""
        if self.output:
            with about("output"):
                check_output(self.output, (*self.models, *self.texts, *to_paths(self.reference)))
                check_shards(self.output)
        with about("routing"):
            Routing.of(self.routing)
        if not self.models:
            raise McError("there is nothing to evaluate: give a model", parameter="models")
        for model in self.models:
            check_file(model)
        if not self.texts and not self.tasks:
            raise McError(NO_TEXT, parameter=("text", "tasks"))
        if self.reference and not self.texts:
            raise McError("a reference is compared on a text: give one, too", parameter="reference")
        texts = [Text.read(path) for path in self.texts]
        if self.tasks:
            check_tasks(self.tasks)
        if texts:
            self._check_comparable()
        return texts

    def _check_comparable(self) -> None:
        """Raises McError unless the models share their vocabulary with the reference, if that is a GGUF."""
        with about("reference"):
            is_model = self.reference is not None and not is_stored(self.reference)
            if self.reference and is_model:
                check_file(self.reference)
                warn_if_quantized(self.reference)
        check_vocabularies(self.models, self.reference if is_model else None)

    def _results(self, texts: Sequence[Text]) -> list[Result]:
        if not texts:
            return []
        stored = None
        if self.reference:
            sizes = (self.n_ctx, self.n_tokens, self.n_threads)
            with about("reference"):
                stored = references(self.reference, texts, *sizes, self.quiet)
        return [
            result
            for model in self.models
            for result in evaluate_model(
                model,
                texts,
                stored,
                n_ctx=self.n_ctx,
                n_tokens=self.n_tokens,
                routing=self.routing,
                n_threads=self.n_threads,
                with_hash=self.with_hashes or self.output is not None,
                quiet=self.quiet,
            )
        ]

    def _tasks(self) -> list[TaskResult]:
        if self.tasks is None:
            return []
        return [
            result
            for model in self.models
            for result in run_tasks(model, self.tasks, self.routing, self.n_threads, self.quiet)
        ]

    def _report(self, texts: Sequence[Text], found: Evaluation) -> Report:
        files = [*self.models, *filter(None, [self.reference])]
        hashes = {str(path): model_sha256(path) for path in files}
        hashes |= {text.name: text.sha256 for text in texts}
        return Report(found.results, found.tasks, self.command, hashes, self.reference)
