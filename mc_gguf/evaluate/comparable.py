"""Whether models can be compared token by token: they must share a vocabulary, and not only its size."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mc_gguf.common.errors import FormatError, McError
from mc_gguf.ggml.shards import joined, read_shards
from mc_gguf.runtime.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_NOT_QUANTIZED = ("F64", "F32", "F16", "BF16", "I32")  # I32: the maps of mixed files


def check_vocabularies(models: Sequence[Path], reference: Path | None) -> None:
    """Raises McError when a model has another vocabulary than the `reference`, which is a GGUF. Without one,
    models with different vocabularies are warned about. Only vocabularies are loaded, no weights.
    """
    first, *others = [*([reference] if reference else []), *models]
    if not others:
        return
    expected = Vocabulary(first)
    for model in others:
        if not (where := difference(expected, first, Vocabulary(model), model)):
            continue
        if reference:
            raise McError(
                f"{model} has another vocabulary than the reference {reference}: {where}; only files of the "
                "same model can be compared",
                parameter="reference",
            )
        log.warning(
            "%s has another vocabulary than %s: %s; their perplexities are of different tokens, and cannot "
            "be compared",
            model,
            first,
            where,
        )


def difference(a: Vocabulary, a_path: Path, b: Vocabulary, b_path: Path) -> str:
    """Where two vocabularies differ, in words; empty when they do not. Tokens that are marked as unused in
    both may have any text.
    """
    if a.sha256 == b.sha256:
        return ""
    if len(a.tokens) != len(b.tokens):
        return f"{len(b.tokens)} tokens, not {len(a.tokens)}"
    differing = [i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y]
    first = differing[0]
    return (
        f"{len(differing)} of {len(a.tokens)} tokens differ, the first is {first}: {_shown(b.tokens[first])} "
        f"in {b_path.name}, {_shown(a.tokens[first])} in {a_path.name}"
    )


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "replace")[:40])


def warn_if_quantized(reference: Path) -> None:
    """A reference should be the 16-bit model: the divergence is measured from it."""
    try:
        header = joined(read_shards(reference))
    except FormatError:  # llama.cpp reads more than we do
        return
    n_bytes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        n_bytes[tensor.type.name] += tensor.n_bytes
    types = [name for name, _ in n_bytes.most_common() if name not in _NOT_QUANTIZED]
    if types:
        log.warning(
            "the reference %s is quantized itself (%s), so this is the divergence from that file, and not "
            "from the 16-bit model",
            reference,
            ", ".join(types[:4]),
        )
