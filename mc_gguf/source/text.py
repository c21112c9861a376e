"""Text as token rows [n_rows, ctx], of the bundled mixture or of the user's files, seeded and hashed.

The rows are spread over the whole text, one at a random place in each of n_rows equal parts, so that every
domain of a mixture is represented, however few the tokens. Each row starts with BOS when the model's
tokenizer adds it, as in llama.cpp's imatrix and perplexity tools.

How much text: llama.cpp users make imatrix files from about 65,536 tokens (128 rows of 512). Expert profiles
from 8,192 tokens are noise (two halves of one text agree on 60 % of the most used experts), and i-quants
break with an importance matrix from 5,000. Fewer than MIN_TOKENS tokens give a warning.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import SourceError
from mc_gguf.common.texts import decode, read_bytes

DEFAULT_TOKENS = 65_536
DEFAULT_CTX = 512
MIN_TOKENS = 16_384
BUNDLED = "calibration-mix.txt"

log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """The part of a checkpoint that a corpus needs."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def add_bos(self) -> bool: ...

    def tokenize(self, text: str) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token rows [n_rows, ctx] int32 and where they come from.

    `sha256` is that of the texts' bytes, one text after the other; `available` counts the tokens of all of
    the text, without BOS.
    """

    rows: NDArray[np.int32]
    sources: tuple[str, ...]
    sha256: str
    available: int
    seed: int

    @property
    def n_tokens(self) -> int:
        return int(self.rows.size)

    def to_json(self) -> dict[str, Any]:
        """What a calibration records of its text."""
        n_rows, ctx = self.rows.shape
        return {
            "sources": list(self.sources),
            "sha256": self.sha256,
            "available_tokens": self.available,
            "tokens": self.n_tokens,
            "rows": n_rows,
            "ctx": ctx,
            "seed": self.seed,
        }


def load_corpus(
    tokenizer: Tokenizer,
    files: Sequence[Path] = (),
    tokens: int = DEFAULT_TOKENS,
    ctx: int = DEFAULT_CTX,
    seed: int = 0,
    max_ctx: int | None = None,
) -> Corpus:
    """Rows of `ctx` tokens (at most `max_ctx`, the model's context), about `tokens` in all, with BOS.

    `files` are read one after the other; without any, the bundled mixture is. `seed` decides where the rows
    start. Raises SourceError when a file cannot be read or is not UTF-8, when the text is shorter than one
    row, and when `tokens` is less than `ctx`.
    """
    ctx = min(ctx, max_ctx or ctx)
    if ctx < 2 or tokens < ctx:
        raise SourceError(
            f"cannot cut {tokens} tokens into rows of {ctx}: a row needs 2 tokens or more, and there must be "
            "tokens for one row at least",
            parameter=("tokens", "ctx"),
        )
    names, texts = _read(files)
    paths = files or [Path(BUNDLED)]
    parts = [tokenizer.tokenize(decode(text, path)) for text, path in zip(texts, paths, strict=True)]
    stream = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
    rows = _windows(stream, tokens // ctx, ctx, _bos(tokenizer), seed)
    _warn(rows.size, tokens, ctx)
    return Corpus(rows, names, hashlib.sha256(b"".join(texts)).hexdigest(), int(stream.size), seed)


def _read(files: Sequence[Path]) -> tuple[tuple[str, ...], list[bytes]]:
    """Names and bytes of the texts. The names have no directories, so that two machines make the same
    calibration.
    """
    if not files:
        return (BUNDLED,), [resources.files("mc_gguf.source").joinpath("data", BUNDLED).read_bytes()]
    return tuple(f.name for f in files), [read_bytes(f) for f in files]


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


def _windows(
    stream: NDArray[np.int32], n_rows: int, ctx: int, bos: list[int], seed: int
) -> NDArray[np.int32]:
    """`n_rows` windows of `stream` that do not overlap, at a random place in each of n_rows equal parts."""
    width = ctx - len(bos)
    fitting = stream.size // width
    if fitting == 0:
        raise SourceError(
            f"the text has {stream.size} tokens, which is less than one row of {ctx}; add text, or make the "
            "rows shorter"
        )
    n_rows = min(n_rows, fitting)
    edges = np.linspace(0, stream.size, n_rows + 1).astype(np.int64)
    slack = np.maximum(edges[1:] - edges[:-1] - width, 0)
    starts = np.minimum(edges[:-1] + np.random.default_rng(seed).integers(0, slack + 1), stream.size - width)
    rows = stream[starts[:, None] + np.arange(width)]
    return np.concatenate([np.tile(np.asarray(bos, dtype=np.int32), (n_rows, 1)), rows], axis=1)


def _warn(found: int, asked: int, ctx: int) -> None:
    if found + ctx <= asked:
        log.warning("the text has only %d of the %d tokens asked for; add more", found, asked)
    if found < MIN_TOKENS:
        log.warning(
            "%d tokens of text are few: statistics of experts will be noisy, and 1- and 2-bit types suffer "
            "most; use %d or more",
            found,
            MIN_TOKENS,
        )
