"""Tokens of tokenizer.json that have no row in the embeddings. Standard library only."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mc_gguf.common.errors import SourceError

log = logging.getLogger(__name__)


def check_token_ids(folder: Path, n_vocab: int | None) -> None:
    """Raises SourceError when the tokenizer has tokens beyond the embeddings' `n_vocab` rows.

    Tokens that were added to a SentencePiece model, as fine-tuning adds a padding token, are the exception:
    the converter leaves them out, and a warning says so. What is wrong with the file itself is not said here.
    """
    path = folder / "tokenizer.json"
    if n_vocab is None or not path.is_file():
        return
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        own = [(i, token) for token, i in _own_tokens(data) if i >= n_vocab]
        added = [(t["id"], t["content"]) for t in data.get("added_tokens") or () if t["id"] >= n_vocab]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if not own and not added:
        return
    number, token = min([*own, *added])
    what = f"{path}: token {token!r} has number {number}, but the embeddings have only {n_vocab} rows"
    if set(own) - set(added) or not (folder / "tokenizer.model").is_file():
        raise SourceError(
            f"{what}; give the tokenizer that belongs to the model, or enlarge the embeddings "
            "(resize_token_embeddings() of transformers) and save the model again"
        )
    log.warning("%s: %d such tokens are left out", what, len(added))


def _own_tokens(data: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The tokens of the model proper with their ids: a dictionary, or in a Unigram model a list."""
    vocab = data["model"]["vocab"]
    if isinstance(vocab, dict):
        yield from vocab.items()
    else:
        yield from ((entry[0], i) for i, entry in enumerate(vocab))
