"""How close a GGUF is to its 16-bit model: perplexity, KL divergence, tasks.

- evaluation.py  a model on texts, from scores to results    - result.py    Result, its statistics, table
- text.py        a text and its chunks                       - report.py    the HTML report
- sequences.py   a Llama with several sequences              - scorer.py    a loaded model that scores chunks
- logprobs.py    numbers from logits; stored rows            - reference.py stored log-probabilities
- cache.py       where references are kept, and made         - files.py     a model's files and their hash
- request.py     everything that is asked, checked and run  - comparable.py vocabularies compared
- tasks/         tasks of lm-evaluation-harness
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mc_gguf.common.arguments import (
    MAX_INT,
    MAX_THREADS,
    Names,
    PathLike,
    Paths,
    to_names,
    to_path,
    to_paths,
    whole,
)
from mc_gguf.common.progress import ProgressListener, listening

if TYPE_CHECKING:
    from mc_gguf.evaluate.cache import references
    from mc_gguf.evaluate.request import Evaluation
    from mc_gguf.evaluate.result import Result
    from mc_gguf.evaluate.scorer import Scorer
    from mc_gguf.evaluate.text import Text

__all__ = ["Evaluation", "Result", "Scorer", "Text", "evaluate", "references"]

_MODULES = {  # loaded when they are used: they load llama_cpp
    "Evaluation": "mc_gguf.evaluate.request",
    "Result": "mc_gguf.evaluate.result",
    "Scorer": "mc_gguf.evaluate.scorer",
    "Text": "mc_gguf.evaluate.text",
    "references": "mc_gguf.evaluate.cache",
}


def evaluate(
    models: Paths,
    *,
    text: Paths = (),
    reference: PathLike | None = None,
    ctx: int = 512,
    tokens: int | None = None,
    routing: str = "off",
    tasks: Names | None = None,
    tasks_path: PathLike | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    output: PathLike | None = None,
    command: str = "mc_gguf.evaluate.evaluate",
    hashes: bool = False,
    threads: int | None = None,
    quiet: bool = False,
    progress: ProgressListener | None = None,
) -> Evaluation:
    """Perplexity of models on texts; with a reference the KL divergence from it, too; and tasks.

    Definitions and numbers are those of llama.cpp's llama-perplexity. The reference's log-probabilities are
    computed once and kept in the user's cache.

    Args:
        models: GGUFs, mixed or plain.
        text: UTF-8 files to score. Take texts that the models were not calibrated on.
        reference: the 16-bit GGUF to compare with, or its stored log-probabilities, as `llama-perplexity
            --kl-divergence-base` writes them.
        ctx: tokens per chunk; the second half of each chunk is scored.
        tokens: tokens to score of each text; by default all.
        routing: which experts a token may do without, as in Llama. The reference always uses all of them.
        tasks: names of tasks of lm-evaluation-harness to run; needs mc-gguf[tasks].
        tasks_path: a folder with tasks of your own (YAML).
        limit: documents of each task; by default all.
        fewshot: examples before each document; by default what the task says.
        output: write a report to this file, too: one page of HTML.
        command: what the report shows as the command that made it.
        hashes: compute the models' SHA-256 (the report does so anyway).
        threads: threads; by default one for each core that other programs leave free.
        quiet: show no progress on stderr.
        progress: called with a ProgressState for every bit of progress, instead of showing it on stderr.

    Returns:
        One result for each model and text, and one for each model, task and metric.

    Raises:
        SourceError, FormatError: a model or a text cannot be read.
        MissingExtraError: lm_eval of mc-gguf[tasks] is not installed.
        McError: there is nothing to evaluate on, a text is too short, a number is too small, the reference is
            of another text or vocabulary, or the routing does not fit the model.

    Example:
        >>> from mc_gguf.evaluate import evaluate
        >>> found = evaluate("m.gguf", text="tests/data/wikitext-2.test.txt", ctx=128, tokens=256)
        >>> [result.text for result in found.results]
        ['wikitext-2.test.txt']
    """
    (ctx,) = whole(16, MAX_INT, ctx=ctx)
    (threads,) = whole(1, MAX_THREADS, or_none=True, threads=threads)
    tokens, limit = whole(1, or_none=True, tokens=tokens, limit=limit)
    (fewshot,) = whole(0, or_none=True, fewshot=fewshot)
    from mc_gguf.evaluate.request import EvaluationRequest
    from mc_gguf.evaluate.tasks.runner import TaskRequest

    names = to_names(tasks or ())
    request = EvaluationRequest(
        to_paths(models),
        to_paths(text),
        to_path(reference),
        ctx,
        tokens,
        routing,
        TaskRequest(names, to_path(tasks_path), limit, fewshot) if names else None,
        to_path(output),
        command,
        hashes,
        threads or 0,
        quiet,
    )
    with listening(progress):
        return request.run()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mc_gguf.evaluate' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
