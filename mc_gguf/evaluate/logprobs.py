"""Numbers from logits, by the definitions of llama.cpp's llama-perplexity (tools/perplexity/perplexity.cpp).

A row holds the logits at one position, float32 over the vocabulary, V of them. The work is done in blocks
of rows of a megabyte, without a Python loop over tokens. Numpy releases the interpreter meanwhile, so
blocks run on as many threads as the caller's pool has.

A stored row is llama-perplexity's: float32 scale, float32 smallest log-probability, then V codes, uint16
(padded to an even number):

    log p_i = scale * code_i + smallest,    codes 0..65535 over the 16 nats below the largest logit

so a stored value is off by up to 1.2e-4 nats. Upstream's writer leaves it at that. Here `smallest` is
shifted so that the stored probabilities sum to what they should. The format is the same, but the sum over
p_i * error_i, by which the KL divergence would be off, is gone (docs/explanation/evaluation.md has
numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32s = NDArray[np.float32]
Words = NDArray[np.uint16]

HEAD = 4  # words before a stored row's codes: two float32
STORED_NATS = np.float32(16)  # below the largest logit
IGNORED = np.float32(-16)  # reference log-probabilities from here down count as probability 0
BLOCK_FLOATS = 1 << 18  # of one of three arrays; with smaller ones threads wait for the interpreter


def row_words(n_vocab: int) -> int:
    """Length of a stored row in uint16."""
    return HEAD + 2 * ((n_vocab + 1) // 2)


def log_likelihood(logits: Float32s, targets: NDArray[np.int32]) -> Float32s:
    """Negative log-likelihood [n], in nats, of `targets` [n] under `logits` [n, V]."""
    top = logits.max(axis=1, keepdims=True)
    p = logits - top
    np.exp(p, out=p)
    right = np.take_along_axis(logits, targets[:, None], axis=1)
    nll: Float32s = (top + np.log(p.sum(axis=1, keepdims=True)) - right)[:, 0]
    return nll


def compare(logits: Float32s, targets: NDArray[np.int32], stored: Words) -> Float32s:
    """Model and reference compared, [4, n], from `logits` [n, V] and the reference's rows [n, row_words(V)].

    The rows of the result: negative log-likelihood of `targets` [n] in nats, that of the reference, KL
    divergence from the reference in nats per token, and 1 where both find the same token most probable.
    """
    n_vocab, at = logits.shape[1], targets[:, None]
    mine = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(mine)
    mine -= np.log(p.sum(axis=1, keepdims=True))
    head, codes = stored[:, :HEAD].view(np.float32), stored[:, HEAD : HEAD + n_vocab]
    base = codes * head[:, :1]
    base += head[:, 1:]
    found = np.empty((4, len(logits)), dtype=np.float32)
    found[0] = -np.take_along_axis(mine, at, axis=1)[:, 0]
    found[1] = -np.take_along_axis(base, at, axis=1)[:, 0]
    np.exp(base, out=p)
    ignored = base <= IGNORED
    base -= mine
    np.copyto(base, 0, where=ignored)  # also where the model's logit is -inf
    found[2] = np.vecdot(p, base)
    found[3] = logits.argmax(axis=1) == codes.argmax(axis=1)
    return found


def encode(logits: Float32s, targets: NDArray[np.int32], out: Words) -> Float32s:
    """Write the rows to `out` [n, row_words(V)]; returns negative log-likelihoods [n] of `targets`."""
    n_vocab = logits.shape[1]
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - STORED_NATS)
    scale = (top - low) / np.float32(65535)
    p = np.exp(logits - top)
    log_sum = np.log(p.sum(axis=1, keepdims=True))
    nll: Float32s = (top + log_sum - np.take_along_axis(logits, targets[:, None], axis=1))[:, 0]
    if not np.isfinite(log_sum).all():
        return nll  # which is not finite: the caller refuses it
    codes = np.maximum(logits - low, 0)
    codes *= np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)
    np.rint(codes, out=codes)
    smallest = low - top - log_sum
    stored = codes * scale
    stored += smallest
    counted = stored > IGNORED
    p_sum = p.sum(axis=1, keepdims=True, where=counted) / np.exp(log_sum)
    smallest += np.log(p_sum / np.exp(stored).sum(axis=1, keepdims=True, where=counted))
    out[:, HEAD : HEAD + n_vocab] = codes
    out[:, HEAD + n_vocab :] = 0
    out[:, :HEAD].view(np.float32)[:] = np.hstack([scale, smallest])
    return nll


def by_blocks(
    function: Callable[..., Float32s], pool: ThreadPoolExecutor | None, logits: Float32s, *rows: NDArray[Any]
) -> Float32s:
    """`function` of logits and `rows`, applied block by block along their first axis; the results joined."""
    blocks = list(_blocks(*logits.shape))
    parts = (pool.map if pool else map)(lambda b: function(logits[b], *(row[b] for row in rows)), blocks)
    return np.concatenate(list(parts), axis=-1)


def _blocks(n: int, n_vocab: int) -> Iterator[slice]:
    step = max(1, BLOCK_FLOATS // n_vocab)
    return (slice(start, start + step) for start in range(0, n, step))
