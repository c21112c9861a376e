"""llama.cpp's tokenizer of a GGUF; the weights are not loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mc_gguf.common.errors import FormatError
from mc_gguf.runtime.llama_library import LlamaModel, listen, llama_cpp, reason


class Vocabulary:
    """The vocabulary in the GGUF `path`; of a split model, give the first shard.

    Raises FormatError, with llama.cpp's reason, when it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        params: Any = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        listen()
        try:
            self._model: Any = LlamaModel(path_model=str(path), params=params, verbose=False)
        except ValueError as error:
            raise FormatError(f"{path}: {reason() or error}") from error

    @cached_property
    def tokens(self) -> list[bytes]:
        """The texts of the tokens; empty for those that are marked as unused."""
        return token_texts(self._model)

    @cached_property
    def sha256(self) -> str:
        return tokens_sha256(self.tokens)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`: no BOS is added, and what looks like a special token is plain text."""
        tokens: list[int] = self._model.tokenize(text.encode("utf-8"), add_bos=False, special=False)
        return tokens


def token_texts(model: Any) -> list[bytes]:
    """The texts of the tokens of a llama_cpp model; empty for those that are marked as unused."""
    vocab = model.vocab
    unused = llama_cpp.LLAMA_TOKEN_ATTR_UNUSED
    return [
        b"" if llama_cpp.llama_vocab_get_attr(vocab, i) & unused else llama_cpp.llama_vocab_get_text(vocab, i)
        for i in range(model.n_vocab())
    ]


def tokens_sha256(tokens: Sequence[bytes]) -> str:
    """One hash of a vocabulary: of the tokens' texts in their order."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()
