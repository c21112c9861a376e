"""Texts to evaluate on, and how they are cut: llama-perplexity's chunks.

A text is cut into chunks of n_ctx tokens; what is left over at the end is not used. The first token of each
chunk is replaced by BOS where the model adds one. Of each chunk the second half is scored, so every scored
token has at least n_ctx/2 tokens before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mc_gguf.errors import McError, SourceError

if TYPE_CHECKING:
    from mc_gguf.evaluate.sequences import Sequences

SMALLEST_CTX = 16


@dataclass(frozen=True)
class Text:
    """A text and the name it has in results."""

    name: str
    content: bytes

    @classmethod
    def read(cls, path: Path) -> Text:
        """The file's bytes without one newline at the end, as llama.cpp's tools read a prompt file."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SourceError(f"cannot read the text {path}: {error.strerror}") from error
        return cls(path.name, content.removesuffix(b"\n"))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def n_scored(n_ctx: int) -> int:
    """Tokens of a chunk that are scored."""
    return n_ctx - 1 - n_ctx // 2


def cut(llm: Sequences, text: Text, n_ctx: int, n_tokens: int | None = None) -> NDArray[np.int32]:
    """The text as chunks [n_chunk, n_ctx]: as many as `n_tokens` scored tokens need (None: all), or as there
    are. McError when there is not even one.
    """
    found = llm.tokenize(text.content, add_bos=True, special=False)  # BOS: only where the model adds one
    n_chunk = len(found) // n_ctx
    if n_chunk == 0:
        raise McError(
            f"the text {text.name} has {len(found)} tokens, {n_ctx} are needed: give a longer text, or a "
            "smaller --ctx"
        )
    if n_tokens is not None:
        n_chunk = min(n_chunk, -(-n_tokens // n_scored(n_ctx)))
    return np.asarray(found[: n_chunk * n_ctx], dtype=np.int32).reshape(n_chunk, n_ctx)
