"""One model on texts: perplexity, and the KL divergence from stored references.

    texts = [Text.read(Path("wiki.test.raw"))]
    stored = references(Path("bf16.gguf"), texts, n_ctx=512)    # computed once, then read from the cache
    for file in files:
        for result in evaluate_model(file, texts, stored, n_ctx=512):
            print(result.model, result.mean_kld, result.mean_kld_se)

docs/explanation/evaluation.md defines the numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_gguf.common.errors import McError
from mc_gguf.common.progress import progress
from mc_gguf.evaluate.files import model_file_bytes, model_sha256
from mc_gguf.evaluate.reference import Reference
from mc_gguf.evaluate.result import Result, statistics
from mc_gguf.evaluate.scorer import Scorer
from mc_gguf.evaluate.text import Text
from mc_gguf.routing import Routing

log = logging.getLogger(__name__)


def evaluate_model(
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
    """One result for each text.

    Args:
        model: a GGUF.
        texts: what to score.
        references: open references in the order of the texts; None: perplexity only.
        n_ctx: tokens per chunk.
        n_tokens: how many tokens to score, rounded up to whole chunks; None, or more than the text or its
            reference has: all.
        routing: which experts a token may do without.
        n_threads: 0: all cores.
        with_hash: say the SHA-256 of the model, too.
        quiet: no progress on stderr.

    Raises what Llama raises, and McError when a text is too short, when a reference is of another text or
    vocabulary, or when logits are not numbers.
    """
    if references is not None and len(references) != len(texts):
        raise McError(f"{len(texts)} texts need as many references, but there are {len(references)}")
    paired: list[Reference | None] = list(references) if references else [None] * len(texts)
    with Scorer(model, n_ctx, routing=routing, n_threads=n_threads) as scorer:
        if n_ctx > scorer.n_ctx_train:
            log.warning("the context is %d, but %s was trained on %d", n_ctx, model.name, scorer.n_ctx_train)
        facts: dict[str, Any] = {
            "model": str(model),
            "file_bytes": model_file_bytes(model),
            "ctx": n_ctx,
            "routing": str(routing),
            "model_sha256": model_sha256(model) if with_hash else None,
        }
        return [
            Result(**facts, **_measure(scorer, text, reference, n_tokens, quiet))
            for text, reference in zip(texts, paired, strict=True)
        ]


def _measure(
    scorer: Scorer, text: Text, reference: Reference | None, n_tokens: int | None, quiet: bool
) -> dict[str, Any]:
    """The fields of Result that depend on the text."""
    chunks = scorer.cut(text, n_tokens)
    if reference:
        chunks = chunks[: len(reference.tokens)]
    name, start = scorer.model.name, time.perf_counter()
    with progress(f"{name} on {text.name}", chunks.size, "tokens", quiet) as bar:
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
    """Perplexity with its standard error, the number of tokens that were scored, and the context."""

    value: float
    standard_error: float
    n_scored: int
    n_ctx: int


def perplexity(
    model: Path, text: str, n_ctx: int = 512, n_scored: int | None = None, n_threads: int = 0
) -> Perplexity:
    """Perplexity of `model` on the beginning of `text`.

    At least `n_scored` tokens are scored (None: all). Raises McError when the text has fewer.
    """
    [found] = evaluate_model(
        model, [Text("text", text.encode())], n_ctx=n_ctx, n_tokens=n_scored, n_threads=n_threads, quiet=True
    )
    if n_scored is not None and found.tokens < n_scored:
        raise McError(f"the text has only {found.tokens} tokens to score: give a longer one")
    return Perplexity(found.perplexity, found.perplexity_se, found.tokens, n_ctx)
