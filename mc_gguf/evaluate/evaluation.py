"""How close a GGUF is to its 16-bit model: perplexity, KL divergence, tasks.

    texts = [Text.read(Path("wiki.test.raw"))]
    stored = references(Path("bf16.gguf"), texts, n_ctx=512)    # computed once, then read from the cache
    for file in files:
        for result in evaluate(file, texts, stored, n_ctx=512):
            print(result.model, result.mean_kld, result.mean_kld_se)

- text.py       a text and its chunks            - kernels.py    logits to numbers; stored rows
- sequences.py  a Llama with several sequences   - scorer.py     a loaded model that scores chunks
- reference.py  stored log-probabilities         - cache.py      where they are kept, when they are made
- result.py     Result, table                    - report.py     the HTML report
- files.py      a model's files and their hash   - command.py    what `mc-gguf eval` does
- tasks.py      lm-evaluation-harness: harness.py is the model class, branches.py the computing behind it
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_gguf.common.errors import McError
from mc_gguf.common.progress import progress
from mc_gguf.evaluate.cache import references
from mc_gguf.evaluate.files import file_bytes, fingerprint
from mc_gguf.evaluate.reference import Reference
from mc_gguf.evaluate.result import Result, statistics, table
from mc_gguf.evaluate.scorer import Scorer, Scores
from mc_gguf.evaluate.text import Text
from mc_gguf.routing import Routing

__all__ = [
    "Perplexity",
    "Reference",
    "Result",
    "Scorer",
    "Scores",
    "Text",
    "evaluate",
    "perplexity",
    "references",
    "table",
]


def evaluate(
    model: Path,
    texts: Sequence[Text],
    references: Sequence[Reference] | None = None,
    *,
    n_ctx: int = 512,
    n_tokens: int | None = None,
    routing: Routing | str = "off",
    n_threads: int = 0,
    with_hash: bool = False,
    quiet: bool = False,
) -> list[Result]:
    """One result for each text; against `references`, open ones in the order of the texts, where given.

    n_tokens: how many tokens to score, rounded up to whole chunks; as many as there are when the text (or
    the reference) has fewer, or with None. n_threads 0: all cores. Progress is on stderr unless quiet.
    Raises what Llama raises, and McError: a text too short, a reference of another text or vocabulary, logits
    that are no numbers.
    """
    if references is not None and len(references) != len(texts):
        raise McError(f"{len(texts)} texts need as many references, not {len(references)}")
    paired: list[Reference | None] = list(references) if references else [None] * len(texts)
    with Scorer(model, n_ctx, routing=routing, n_threads=n_threads) as scorer:
        facts: dict[str, Any] = {
            "model": str(model),
            "file_bytes": file_bytes(model),
            "ctx": n_ctx,
            "routing": str(routing),
            "model_sha256": fingerprint(model) if with_hash else None,
        }
        return [
            Result(**facts, **_measure(scorer, text, reference, n_tokens, quiet))
            for text, reference in zip(texts, paired, strict=True)
        ]


def _measure(
    scorer: Scorer, text: Text, reference: Reference | None, n_tokens: int | None, quiet: bool
) -> dict[str, Any]:
    """The fields of Result that differ from text to text."""
    chunks = scorer.cut(text, n_tokens)
    if reference:
        chunks = chunks[: len(reference.tokens)]
    name, start = scorer.model.name, time.perf_counter()
    with progress(f"{name} on {text.name}", chunks.size, "tokens", quiet) as bar:
        if scorer.n_ctx > scorer.n_ctx_train:
            bar.say(f"warning: context {scorer.n_ctx}, but {name} was trained on {scorer.n_ctx_train} tokens")
        scorer.llm.reset_routing_stats()
        scores = scorer.score(chunks, reference, bar.advance)
    routed = scorer.llm.routing.policy != "off"
    return {
        "text": text.name,
        "seconds": time.perf_counter() - start,
        "dropped_share": scorer.llm.routing_stats().dropped_share if routed else None,
        **statistics(scores),
    }


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with its standard error, and how many tokens were scored at which context."""

    value: float
    standard_error: float
    n_scored: int
    n_ctx: int


def perplexity(
    model: Path, text: str, n_ctx: int = 512, n_scored: int | None = None, n_threads: int = 0
) -> Perplexity:
    """Perplexity of the model at `model` on the start of `text`: at least `n_scored` tokens are scored
    (None: all). McError when the text has too few tokens.
    """
    [found] = evaluate(
        model, [Text("text", text.encode())], n_ctx=n_ctx, n_tokens=n_scored, n_threads=n_threads, quiet=True
    )
    if n_scored is not None and found.tokens < n_scored:
        raise McError(f"the text has only {found.tokens} tokens to score: give a longer text")
    return Perplexity(found.perplexity, found.perplexity_se, found.tokens, n_ctx)
