"""Stored references of the user's models, found or made in <cache>/references.

A reference's name has a key of the contents of model and text, the context, the number of tokens and the
runtime, so that a changed file never meets an old reference. Whoever uses a reference also compares its
tokens with those of the model that is evaluated. References are always computed with routing off.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mc_gguf.common.errors import ArtifactError, McError, about
from mc_gguf.common.files import check_space
from mc_gguf.common.progress import progress
from mc_gguf.common.units import format_size
from mc_gguf.evaluate.files import model_sha256
from mc_gguf.evaluate.reference import Reference, file_size, is_reference
from mc_gguf.evaluate.scorer import Scorer
from mc_gguf.evaluate.text import Text
from mc_gguf.runtime import upstream

SPARE_BYTES = 256 << 20  # beside a reference, to be left free on the disk
FORMAT = 2  # raise it when the same inputs would give another file


def references(
    source: Path,
    texts: Sequence[Text],
    n_ctx: int = 512,
    n_tokens: int | None = None,
    n_threads: int = 0,
    quiet: bool = False,
) -> list[Reference]:
    """One open reference for each text.

    `source` is the reference model, a GGUF, whose log-probabilities are computed unless they are stored
    already; or, for a single text, a file of stored log-probabilities, which llama-perplexity may have
    written. Raises ArtifactError when there is no such file, and McError, before anything is computed, when
    the disk is too full.
    """
    if is_stored(source):
        if len(texts) != 1:
            raise McError(
                f"{source} belongs to one text, but {len(texts)} are given: evaluate on one at a time"
            )
        return [Reference.open(source)]
    found = []
    with ExitStack() as stack:
        scorer: Scorer | None = None
        for text in texts:
            path = cached_path(source, text, n_ctx, n_tokens)
            if not path.is_file():
                scorer = scorer or stack.enter_context(Scorer(source, n_ctx, n_threads=n_threads))
                store(scorer, text, n_tokens, path, quiet)
            found.append(Reference.open(path))
    return found


def is_stored(source: Path) -> bool:
    """Whether the reference `source` is a file of stored log-probabilities. Raises ArtifactError when it is
    no file.
    """
    if not source.is_file():
        what = "is a directory" if source.is_dir() else "is no file" if source.exists() else "does not exist"
        raise ArtifactError(f"{source} {what}; give a 16-bit GGUF, or stored log-probabilities")
    return is_reference(source)


def store(scorer: Scorer, text: Text, n_tokens: int | None, path: Path, quiet: bool = False) -> None:
    """Compute and write one reference, after saying how large it will be."""
    chunks = scorer.cut(text, n_tokens)
    size = file_size(scorer.n_ctx, scorer.llm.vocabulary, len(chunks))
    remedy = "score fewer tokens, or set MC_GGUF_CACHE to a folder on another disk"
    with about("tokens"):
        check_space(path.parent, size + SPARE_BYTES, "storing the reference's log-probabilities", remedy)
    with progress(f"reference on {text.name}", chunks.size, "tokens", quiet) as bar:
        bar.say(f"storing log-probabilities of {scorer.model.name}, {format_size(size)}, in {path}")
        scorer.store(chunks, path, bar.advance)


def cached_path(model: Path, text: Text, n_ctx: int, n_tokens: int | None) -> Path:
    """Where the reference of `model` on `text` belongs."""
    runtime = (upstream.pin().commit, upstream.patchset_digest())
    parts = (FORMAT, model_sha256(model), text.sha256, n_ctx, n_tokens, *runtime)
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]
    names = [re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:40] for name in (model.stem, text.name)]
    return upstream.cache_dir() / "references" / f"{'-'.join(names)}-{key}.logits"
