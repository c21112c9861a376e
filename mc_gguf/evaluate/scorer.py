"""Scorer: a loaded model that scores texts, alone or against a reference, or that makes a reference.

Chunks are packed into batches of up to 2,048 tokens as llama-perplexity packs them, each a sequence with a
cache of its own. With routing, one chunk is computed at a time: importance is then ranked within 512
tokens, as in a chat. Logits are read where llama.cpp wrote them and are gone with the next batch. At most
1,024 positions are held at once (2,048 if n_ctx is larger), so memory does not grow with the text or the
context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import McError
from mc_gguf.common.files import atomic_write
from mc_gguf.evaluate import logprobs
from mc_gguf.evaluate.logprobs import Float32s, by_blocks
from mc_gguf.evaluate.reference import Reference, header, trailer
from mc_gguf.evaluate.sequences import UBATCH, Sequences
from mc_gguf.evaluate.text import Text, cut
from mc_gguf.routing import Routing

BATCH = 2048  # tokens, llama-perplexity's default

Chunks = NDArray[np.int32]
Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Scores:
    """Values of every scored token [n], float32, in nats; the last three need a reference."""

    nll: Float32s
    nll_base: Float32s | None = None
    kld: Float32s | None = None
    same_top: NDArray[np.bool_] | None = None

    @cached_property
    def p_diff(self) -> Float32s | None:
        """Change of the probability of the correct token."""
        return None if self.nll_base is None else np.exp(-self.nll) - np.exp(-self.nll_base)


@dataclass(frozen=True)
class _Piece:
    """Logits [n, V] of chunk `chunk`: row i predicts the token at position start + i + 1."""

    chunk: int
    start: int
    logits: Float32s


class Scorer:
    """Loads `model` for chunks of n_ctx tokens. Use it in a `with`, or close() it. Raises what Llama raises.

    n_threads 0: all cores. Each call computes everything; nothing is kept between calls.
    """

    def __init__(
        self, model: Path, n_ctx: int = 512, *, routing: Routing | str = "off", n_threads: int = 0
    ) -> None:
        self.model, self.n_ctx = model, n_ctx
        whole = Routing.of(routing).policy == "off"
        self.n_seq = max(1, BATCH // n_ctx) if whole else 1
        self.n_batch = BATCH if whole else UBATCH
        self.llm = Sequences(
            model, n_ctx=n_ctx, n_seq=self.n_seq, n_batch=self.n_batch, n_threads=n_threads, routing=routing
        )
        workers = self.llm.n_threads
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()
        self.llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_ctx_train(self) -> int:
        """The context with which the model was trained, in tokens."""
        return int(self.llm._model.n_ctx_train())

    def cut(self, text: Text, n_tokens: int | None = None) -> Chunks:
        """The text as chunks [n, n_ctx] of this model's tokens (see text.cut)."""
        return cut(self.llm, text, self.n_ctx, n_tokens)

    def score(
        self, chunks: Chunks, reference: Reference | None = None, advance: Advance = lambda n: None
    ) -> Scores:
        """Scores of the chunks [n, n_ctx], against the reference, if there is one, which must begin with
        them.

        `advance` is called with the number of tokens that have just been done. Raises McError for logits
        that are not numbers, and when the reference does not fit.
        """
        if reference:
            llm = self.llm
            reference.check(chunks, llm.vocabulary, llm.vocabulary_sha256, str(self.model))
        parts: list[Float32s] = []
        for piece in self._pieces(chunks, advance):
            targets = self._targets(chunks, piece)
            if reference:
                start = piece.start - self.n_ctx // 2
                rows = reference.rows[piece.chunk, start : start + len(targets)]
                found = by_blocks(logprobs.compare, self._pool, piece.logits, targets, rows)
            else:
                found = by_blocks(logprobs.log_likelihood, self._pool, piece.logits, targets)[None]
            parts.append(self._finite(found, piece))
        values = np.concatenate(parts, axis=1)
        return Scores(values[0], values[1], values[2], values[3] > 0) if reference else Scores(values[0])

    def store(self, chunks: Chunks, path: Path, advance: Advance = lambda n: None) -> Reference:
        """Write the log-probabilities at the chunks' scored positions; the file appears once it is
        complete.
        """
        with atomic_write(path) as file:
            file.write(header(chunks, self.llm.vocabulary))
            for piece in self._pieces(chunks, advance):
                targets = self._targets(chunks, piece)
                rows = np.empty((len(targets), logprobs.row_words(self.llm.vocabulary)), dtype=np.uint16)
                self._finite(by_blocks(logprobs.encode, self._pool, piece.logits, targets, rows), piece)
                file.write(rows.data)
            file.write(trailer(self.llm.vocabulary_sha256))
        return Reference.open(path)

    def _targets(self, chunks: Chunks, piece: _Piece) -> Chunks:
        return chunks[piece.chunk, piece.start + 1 : piece.start + 1 + len(piece.logits)]

    def _finite(self, values: Float32s, piece: _Piece) -> Float32s:
        if not np.isfinite(values).all():
            raise McError(
                f"{self.model} gives logits that are not numbers in chunk {piece.chunk + 1}: the file is "
                "damaged, or llama.cpp computes wrongly on this machine"
            )
        return values

    def _pieces(self, chunks: Chunks, advance: Advance) -> Iterator[_Piece]:
        """Run the model, batch by batch."""
        n_ctx, first = self.n_ctx, self.n_ctx // 2
        step = min(self.n_batch, n_ctx)
        for i in range(0, len(chunks), self.n_seq):
            group = chunks[i : i + self.n_seq].copy()
            if self.llm.adds_bos:
                group[:, 0] = self.llm.token_bos()
            self.llm.clear()
            for start in range(0, n_ctx, step):
                tokens = group[:, start : start + step]
                positions = np.tile(np.arange(start, start + tokens.shape[1], dtype=np.int32), len(group))
                sequences = np.repeat(np.arange(len(group), dtype=np.int32), tokens.shape[1])
                wanted = (positions >= first) & (positions < n_ctx - 1)
                logits = self.llm.decode(tokens.ravel(), positions, sequences, wanted)
                if len(logits):
                    for j, rows in enumerate(logits.reshape(len(group), -1, logits.shape[1])):
                        yield _Piece(i + j, max(start, first), rows)
                advance(tokens.size)
