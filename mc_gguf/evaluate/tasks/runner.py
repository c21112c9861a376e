"""Runs tasks of lm-evaluation-harness (the package lm_eval), which is imported only when one is asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mc_gguf.common.errors import McError
from mc_gguf.common.extras import require_extra
from mc_gguf.evaluate.files import model_file_bytes
from mc_gguf.evaluate.result import align_columns

DEFAULT_CTX = 4096  # tokens of context for a task, or what the model was trained on if that is less


@dataclass(frozen=True)
class TaskRequest:
    """Names of tasks or groups.

    `folder` is searched for them, too. `limit` is the number of documents of each task (None: all),
    `n_fewshot` the number of examples before each (None: what the task says).
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    n_fewshot: int | None = None


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, over `documents` documents. `stderr` is None where the harness has none."""

    model: str
    file_bytes: int
    task: str
    metric: str
    value: float
    stderr: float | None
    n_fewshot: int
    documents: int
    routing: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_tasks(request: TaskRequest) -> None:
    """Raises MissingExtraError without lm_eval, McError when it does not know a task."""
    require_extra("tasks")
    if request.folder and not request.folder.is_dir():
        raise McError(f"{request.folder} is not a folder with tasks (YAML)", parameter="tasks_path")
    known = set(_manager(request).all_tasks)
    if unknown := [name for name in request.names if name not in known]:
        raise McError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and "
            "tasks_path names a folder with your own",
            parameter="tasks",
        )


@cache
def _manager(request: TaskRequest) -> Any:
    """The harness's index of tasks; reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return TaskManager(include_path=str(request.folder) if request.folder else None)


def run_tasks(
    model: Path, request: TaskRequest, routing: str = "off", n_threads: int = 0, quiet: bool = False
) -> list[TaskResult]:
    """All metrics of all tasks. Raises McError when a task's data set cannot be loaded."""
    from lm_eval import simple_evaluate

    from mc_gguf.evaluate.tasks.harness import HarnessModel

    with HarnessModel(model, DEFAULT_CTX, routing=routing, n_threads=n_threads, quiet=quiet) as lm:
        try:
            found = simple_evaluate(
                lm,
                tasks=list(request.names),
                num_fewshot=request.n_fewshot,
                limit=request.limit,
                task_manager=_manager(request),
                log_samples=False,
                bootstrap_iters=1000,
            )
        except ConnectionError as error:
            raise McError(f"the data of {', '.join(request.names)} cannot be loaded: {error}") from error
    shared: dict[str, Any] = {"model": str(model), "file_bytes": model_file_bytes(model), "routing": routing}
    return [
        TaskResult(
            task=name,
            metric=metric,
            value=float(value),
            stderr=_number(values, metric, "_stderr"),
            n_fewshot=int(found["n-shot"].get(name, 0) or 0),
            documents=int(found["n-samples"].get(name, {}).get("effective", 0)),
            **shared,
        )
        for name, values in found["results"].items()
        for metric, value in _metrics(values)
    ]


def _metrics(values: dict[str, Any]) -> list[tuple[str, float]]:
    """The harness keys metrics "name,filter"."""
    pairs = ((k, v) for k, v in values.items() if "," in k and "_stderr," not in k)
    return [(k.removesuffix(",none"), v) for k, v in pairs if isinstance(v, int | float)]


def _number(values: dict[str, Any], metric: str, suffix: str) -> float | None:
    name, _, chosen = metric.partition(",")
    found = values.get(f"{name}{suffix},{chosen or 'none'}")
    return float(found) if isinstance(found, int | float) else None


def task_table(results: Sequence[TaskResult]) -> str:
    """The results as aligned text, one line each."""
    rows = [("model", "task", "metric", "value", "documents")]
    rows += [(r.model, r.task, r.metric, value_text(r), f"{r.documents:,}") for r in results]
    return align_columns(rows, [True] * len(rows[0]))


def value_text(result: TaskResult) -> str:
    error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    return f"{result.value:.4f}{error}"
