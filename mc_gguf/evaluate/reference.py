"""Log-probabilities of the reference model, stored once and reused: llama-perplexity's own file format.

    "_logits_", int32 n_ctx, n_vocab, n_chunk, then int32 tokens [n_chunk, n_ctx],
    then rows (logprobs.py) [n_chunk, n_ctx - 1 - n_ctx // 2, row_words(n_vocab)]: the scored positions
    then, in files that are written here, "mc_vocab" and the SHA-256 of the vocabulary (32 bytes)

All numbers are little-endian. Upstream does not read beyond the rows, so Reference.open reads what
`llama-perplexity --kl-divergence-base FILE` writes, and its --kl-divergence reads what is written here.
cache.py says where mc_gguf keeps its own references.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.evaluate.logprobs import Words, row_words
from mc_gguf.evaluate.text import n_scored

MAGIC = b"_logits_"
VOCABULARY_MAGIC = b"mc_vocab"
TRAILER_BYTES = len(VOCABULARY_MAGIC) + 32
HEADER_BYTES = len(MAGIC) + 3 * 4


@dataclass(frozen=True, eq=False)
class Reference:
    """An open file.

    `tokens` int32 [n_chunk, n_ctx] are those of the text; BOS replaces the first of a chunk when it is
    evaluated. `rows` uint16 [n_chunk, n_scored, row_words] are mapped from the disk and read when they are
    used. `vocabulary` is the SHA-256 of the vocabulary, hexadecimal; None where upstream wrote the file.
    """

    path: Path
    n_vocab: int
    tokens: NDArray[np.int32]
    rows: Words
    vocabulary: str | None = None

    @property
    def n_ctx(self) -> int:
        return int(self.tokens.shape[1])

    @classmethod
    def open(cls, path: Path) -> Reference:
        """The reference in the file `path`. Raises ArtifactError when it is of another kind or incomplete."""
        hint = "make it again, or give the 16-bit GGUF itself as the reference"
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise ArtifactError(f"{path} does not hold log-probabilities of a model: {hint}")
                header = file.read(12)
                n_ctx, n_vocab, n_chunk = np.frombuffer(header, "<i4") if len(header) == 12 else (0, 0, 0)
                wanted = rows_end(int(n_ctx), int(n_vocab), int(n_chunk))
                if min(n_ctx - 2, n_vocab, n_chunk) < 1 or size not in (wanted, wanted + TRAILER_BYTES):
                    raise ArtifactError(f"{path} is damaged or incomplete: {hint}")
                tokens = np.fromfile(file, "<i4", n_chunk * n_ctx).reshape(n_chunk, n_ctx)
                file.seek(wanted)
                mark, vocabulary = file.read(len(VOCABULARY_MAGIC)), file.read().hex()
                if mark not in (b"", VOCABULARY_MAGIC):
                    raise ArtifactError(f"{path} is damaged: {hint}")
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
        shape = (int(n_chunk), n_scored(int(n_ctx)), row_words(int(n_vocab)))
        offset = wanted - 2 * shape[0] * shape[1] * shape[2]
        rows: Words = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=shape)
        return cls(path, int(n_vocab), tokens.astype(np.int32), rows, vocabulary or None)

    def check(self, chunks: NDArray[np.int32], n_vocab: int, vocabulary: str, model: str) -> None:
        """Raises McError unless this reference begins with `chunks` [n, n_ctx] and has this vocabulary, of
        `n_vocab` tokens and with the SHA-256 `vocabulary`.
        """
        if n_vocab != self.n_vocab:
            raise McError(
                f"{model} has a vocabulary of {n_vocab} tokens, but the reference {self.path} has one of "
                f"{self.n_vocab}: only files of the same model can be compared"
            )
        if self.vocabulary not in (None, vocabulary):
            raise McError(
                f"{model} has another vocabulary than the reference {self.path}, though of the same size: "
                "only files of the same model can be compared"
            )
        if chunks.shape[1] != self.n_ctx:
            raise McError(
                f"{self.path} was made with a context of {self.n_ctx} tokens, not {chunks.shape[1]}: "
                f"give the context {self.n_ctx}",
                parameter="ctx",
            )
        if len(chunks) > len(self.tokens) or not np.array_equal(chunks, self.tokens[: len(chunks)]):
            raise McError(
                f"the tokens in {self.path} are not those of {model}: text or tokenizer differ; "
                "evaluate on the text of the reference, and compare models that share a tokenizer"
            )


def is_reference(path: Path) -> bool:
    """Whether the file begins like a stored reference, and not, for instance, like a GGUF."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def file_size(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """Bytes of a file that is written here."""
    return rows_end(n_ctx, n_vocab, n_chunk) + TRAILER_BYTES


def rows_end(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """Bytes up to the end of the rows, which is where upstream's files end."""
    return HEADER_BYTES + n_chunk * (4 * n_ctx + 2 * n_scored(n_ctx) * row_words(n_vocab))


def header(tokens: NDArray[np.int32], n_vocab: int) -> bytes:
    """The bytes in front of the rows; `tokens` [n_chunk, n_ctx]."""
    n_chunk, n_ctx = tokens.shape
    return MAGIC + np.array([n_ctx, n_vocab, n_chunk], "<i4").tobytes() + tokens.astype("<i4").tobytes()


def trailer(vocabulary: str) -> bytes:
    """The bytes after the rows; `vocabulary` is a SHA-256, hexadecimal."""
    return VOCABULARY_MAGIC + bytes.fromhex(vocabulary)
