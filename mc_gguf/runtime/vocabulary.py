"""llama.cpp's tokenizer of a GGUF; the weights are not loaded."""

from __future__ import annotations

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

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`: no BOS is added, and what looks like a special token is plain text."""
        tokens: list[int] = self._model.tokenize(text.encode("utf-8"), add_bos=False, special=False)
        return tokens
