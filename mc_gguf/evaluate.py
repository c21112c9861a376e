"""Perplexity of a GGUF through the runtime, by the definition of llama.cpp's llama-perplexity tool.

The text is cut into chunks of n_ctx tokens, the first token of each replaced by BOS where the model adds
one; the second half of a chunk is scored, so every scored token has at least n_ctx/2 tokens before it
(tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mc_gguf.errors import McError

if TYPE_CHECKING:
    from mc_gguf.llama import Llama


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with its standard error, and how many tokens were scored at which context."""

    value: float
    standard_error: float
    n_scored: int
    n_ctx: int

    @classmethod
    def of(cls, nll: NDArray[np.float64], n_ctx: int) -> Perplexity:
        """From the negative log-likelihood (nats) of every scored token."""
        value = float(np.exp(nll.mean()))
        error = value * float(nll.std(ddof=1)) / nll.size**0.5
        return cls(value, error, nll.size, n_ctx)


def perplexity(
    model: Path, text: str, n_ctx: int = 512, n_scored: int | None = None, n_threads: int = 0
) -> Perplexity:
    """Perplexity of the model at `model` on the start of `text`: at least `n_scored` tokens are scored
    (None: all).

    Raises McError when the text has too few tokens.
    """
    from mc_gguf.llama import Llama

    llm = Llama(model, n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ctx, logits_all=True, n_threads=n_threads)
    try:
        tokens = np.asarray(llm.tokenize(text.encode(), add_bos=llm._model.add_bos_token(), special=False))
        per_chunk = n_ctx - 1 - n_ctx // 2
        n_chunk = len(tokens) // n_ctx if n_scored is None else -(-n_scored // per_chunk)
        if n_chunk == 0 or n_chunk * n_ctx > len(tokens):
            raise McError(
                f"the text has {len(tokens)} tokens, {max(1, n_chunk) * n_ctx} are needed: give a longer text"
            )
        return Perplexity.of(np.concatenate(list(_chunks(llm, tokens[: n_chunk * n_ctx], n_ctx))), n_ctx)
    finally:
        llm.close()


def _chunks(llm: Llama, tokens: NDArray[np.int64], n_ctx: int) -> Iterator[NDArray[np.float64]]:
    """Negative log-likelihoods of the scored tokens, chunk by chunk."""
    first = n_ctx // 2
    for row in tokens.reshape(-1, n_ctx):
        chunk = row.copy()
        if llm._model.add_bos_token():
            chunk[0] = llm.token_bos()
        llm.reset()  # type: ignore[no-untyped-call]  # llama_cpp has no type information
        llm.eval(chunk.tolist())
        logits = llm.scores[first : n_ctx - 1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(axis=1))
        yield log_sum - np.take_along_axis(logits, chunk[first + 1 :, None], axis=1)[:, 0]
