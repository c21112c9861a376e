"""Texts to evaluate on, and how they are cut into chunks, as llama-perplexity does.

A text is cut into chunks of n_ctx tokens; the rest at the end is not used. BOS replaces the first token of
each chunk where the model adds one. The second half of each chunk is scored, so that every scored token has
at least n_ctx/2 tokens before it.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import FormatError, McError
from mc_gguf.common.texts import decode, read_bytes
from mc_gguf.ggml.gguf_file import read_header

if TYPE_CHECKING:
    from mc_gguf.evaluate.sequences import Sequences

log = logging.getLogger(__name__)

REMEMBERED = 8  # texts whose tokens are kept

_tokens: dict[tuple[str, str], NDArray[np.int32]] = {}  # by text and tokenizer, oldest first


@dataclass(frozen=True)
class Text:
    """A text and the name it has in results."""

    name: str
    content: bytes

    @classmethod
    def read(cls, path: Path) -> Text:
        """The file's bytes without one newline at the end, as llama.cpp's tools read a prompt file.

        Raises SourceError when it cannot be read or is not UTF-8.
        """
        content = read_bytes(path)
        decode(content, path)
        if content.startswith(codecs.BOM_UTF8):
            log.warning(
                "the text %s begins with a byte order mark, which is scored as text, as in llama.cpp", path
            )
        return cls(path.name, content.removesuffix(b"\n"))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def n_scored(n_ctx: int) -> int:
    """How many tokens of a chunk are scored."""
    return n_ctx - 1 - n_ctx // 2


def cut(llm: Sequences, text: Text, n_ctx: int, n_tokens: int | None = None) -> NDArray[np.int32]:
    """The text as chunks [n_chunk, n_ctx], as many as `n_tokens` scored tokens need (None: all).

    When the text has fewer, all of them. Raises McError when there is not even one.
    """
    found = tokens_of(llm, text)
    n_chunk = len(found) // n_ctx
    if n_chunk == 0:
        raise McError(
            f"the text {text.name} has {len(found)} tokens, but {n_ctx} are needed: give a longer text, or a "
            "smaller context",
            parameter=("text", "ctx"),
        )
    if n_tokens is not None:
        n_chunk = min(n_chunk, -(-n_tokens // n_scored(n_ctx)))
    return found[: n_chunk * n_ctx].reshape(n_chunk, n_ctx)


def tokens_of(llm: Sequences, text: Text) -> NDArray[np.int32]:
    """All tokens of the text, with BOS in front where the model adds one.

    They are remembered: a megabyte takes llama.cpp a second, and often many files with one tokenizer are
    evaluated.
    """
    key = (text.sha256, tokenizer_fingerprint(Path(llm.model_path)))
    if (found := _tokens.pop(key, None)) is None:
        found = llm.tokens(text.content)
        found.setflags(write=False)
    if key[1]:
        _tokens[key] = found  # the latest is the last to go
        while len(_tokens) > REMEMBERED:
            del _tokens[next(iter(_tokens))]
    return found


def tokenizer_fingerprint(model: Path) -> str:
    """SHA-256 of all that the file says about its tokenizer; "" for a file that we cannot read."""
    digest = hashlib.sha256()
    try:
        spans = read_header(model).kv_spans
    except FormatError:  # llama.cpp reads more than we do
        return ""
    with model.open("rb") as file:
        for key, (start, end) in sorted(spans.items()):
            if key.startswith("tokenizer.") or key == "general.architecture":
                file.seek(start)
                digest.update(file.read(end - start))
    return digest.hexdigest()
