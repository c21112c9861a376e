"""The tensors that llama.cpp demands of a model, with their shapes: a file that lacks one, has one more, or
one of another shape does not load, however long it took to make.

The table follows src/models/ARCHITECTURE.cpp of the pinned llama.cpp. Of architectures that are not in it,
only what all models share is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mc_gguf.artifacts import PROJECTIONS, TensorSpec
from mc_gguf.common.errors import SourceError
from mc_gguf.ggml.gguf_file import Value
from mc_gguf.source.architecture import ARCHITECTURES, MAX_LAYERS

Shape = tuple[int, ...]

_UNUSED = 5  # LLAMA_TOKEN_TYPE_UNUSED
_OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_LAYER = re.compile(r"blk\.(\d{1,6})\.")
# Architectures that may use the embeddings as the output matrix, and norms of Q and K.
_TIED = ("llama", "qwen3moe")
_QK_NORMS = ("qwen3moe", "olmoe")
_EPSILON = "attention.layer_norm_rms_epsilon"
# Keys that may have a number for every layer.
_MAY_DIFFER = (
    *("attention.head_count", "attention.head_count_kv", "feed_forward_length"),
    "expert_feed_forward_length",
)


@dataclass(frozen=True)
class _Sizes:
    """Numbers from the metadata that shapes are made of."""

    n_layer: int
    n_embd: int
    n_vocab: int | None
    q: int  # outputs of all query heads
    k: int
    v: int
    head: int
    n_expert: int
    n_ff: int
    n_ff_shared: int


def count_of(path: Path, hparams: Mapping[str, Any], key: str, limit: int | None = None) -> int:
    """A whole number above 0 from the metadata, at most `limit`. Raises SourceError for anything else."""
    value = hparams.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value > (limit or value):
        wanted = f"a whole number from 1 to {limit}" if limit else "a whole number above 0"
        raise SourceError(f"{path}: {key} is {'missing' if value is None else repr(value)}, not {wanted}")
    return value


def check_layout(path: Path, tensors: Iterable[TensorSpec]) -> None:
    """Raises SourceError for a model whose experts are stored one by one, or in groups of a type each."""
    tensors = list(tensors)
    if grouped := next((t.name for t in tensors if t.name.endswith("_exps.weight.map")), None):
        raise SourceError(
            f"{path} is a mixed-expert file that mc_gguf made ({grouped}); give the model that it was made "
            "from"
        )
    if old := next((t.name for t in tensors if _OLD_EXPERT.fullmatch(t.name)), None):
        raise SourceError(
            f"{path} stores one tensor per expert ({old}), as GGUFs did before April 2024; llama.cpp no "
            "longer reads them: convert the original model again"
        )


def check_tensors(
    path: Path,
    architecture: str,
    hparams: Mapping[str, Any],
    n_vocab: int | None,
    tensors: Iterable[TensorSpec],
) -> None:
    """Raises SourceError unless llama.cpp would load a model with these tensors and this metadata.

    `hparams` are as in Checkpoint, `n_vocab` as from n_vocab_of().
    """
    found = {t.name: t.shape for t in tensors}
    if scalar := next((name for name, shape in found.items() if not shape), None):
        raise SourceError(f"{path}: {scalar} is a single number, not a matrix or a vector; download it again")
    n_layer = count_of(path, hparams, "block_count", MAX_LAYERS)
    predicting = hparams.get("nextn_predict_layers") or 0
    _check_layers(path, n_layer, n_layer - predicting if isinstance(predicting, int) else n_layer, found)
    for key in ("embedding_length", "context_length"):
        count_of(path, hparams, key)
    _check_vocabulary(path, n_vocab, found)
    sizes = _sizes(path, architecture, hparams, n_vocab, n_layer)
    if sizes is None:
        return
    if _EPSILON not in hparams:
        raise SourceError(f"{path}: {_EPSILON} is missing, so llama.cpp cannot load the model")
    required, optional = dict(_required(architecture, sizes, found)), dict(_optional(architecture, sizes))
    if missing := next((name for name in required if name not in found), None):
        raise SourceError(
            f"{path} lacks the tensor {missing}, which {architecture} models have; is it complete?"
        )
    for name, shape in found.items():
        wanted = required.get(name) or optional.get(name)
        if wanted is None and not _is_free(name):
            raise SourceError(
                f"{path} has a tensor {name}, which llama.cpp does not know in {architecture} models"
            )
        if wanted is not None and _trimmed(shape) != _trimmed(wanted):
            raise SourceError(
                f"{path}: {name} has the shape {list(shape)}, but the metadata ask for {list(wanted)}"
            )


def _check_layers(path: Path, n_layer: int, n_needed: int, found: Mapping[str, Shape]) -> None:
    """The first `n_needed` layers must be there; the others predict further tokens."""
    layers = {int(match[1]) for name in found if (match := _LAYER.match(name))}
    if missing := sorted(set(range(n_needed)) - layers):
        raise SourceError(
            f"{path}: block_count is {n_layer}, but there is no tensor of layer {missing[0]}; is it complete?"
        )
    if max(layers) >= n_layer:
        raise SourceError(f"{path}: block_count is {n_layer}, but there are tensors of layer {max(layers)}")


def _check_vocabulary(path: Path, n_vocab: int | None, found: Mapping[str, Shape]) -> None:
    """llama.cpp takes the number of rows from the tokenizer's list."""
    for name in ("token_embd.weight", "output.weight"):
        if n_vocab is not None and name in found and found[name][-1] != n_vocab:
            raise SourceError(
                f"{path}: {name} has {found[name][-1]} rows, but the tokenizer has {n_vocab} tokens, so "
                "llama.cpp cannot load the model; convert the original model with the tokenizer that belongs "
                "to it"
            )


def n_vocab_of(kv: Mapping[str, Value]) -> int | None:
    """Number of the tokenizer's tokens; None where the metadata have no list of them."""
    tokens = kv.get("tokenizer.ggml.tokens")
    return len(tokens.value) if tokens and isinstance(tokens.value, list) and tokens.value else None


def _sizes(
    path: Path, architecture: str, hparams: Mapping[str, Any], n_vocab: int | None, n_layer: int
) -> _Sizes | None:
    """None where the table does not describe the model: another architecture, or layers that differ."""
    if architecture not in ARCHITECTURES:
        return None
    if any(len(set(_of_layers(hparams, key, n_layer))) > 1 for key in _MAY_DIFFER):
        return None

    def number(key: str, default: int = 0) -> int:
        """A whole number above 0, for all layers; `default`, unless it is 0, where there is none."""
        values = _of_layers(hparams, key, n_layer)
        value = values[0] if values else hparams.get(key)
        return default if default and not value else count_of(path, {key: value}, key)

    n_embd, n_head, n_expert = map(number, ("embedding_length", "attention.head_count", "expert_count"))
    n_head_kv = number("attention.head_count_kv", n_head)
    if n_head % n_head_kv != 0:
        raise SourceError(
            f"{path}: attention.head_count is {n_head}, and attention.head_count_kv, {n_head_kv}, does not "
            "divide it"
        )
    head, head_v = (number(f"attention.{x}_length", n_embd // n_head) for x in ("key", "value"))
    if architecture in ("qwen3moe", "qwen2moe"):
        n_ff = number("expert_feed_forward_length") if hparams.get("expert_feed_forward_length") else 0
        n_ff = n_ff or number("feed_forward_length") // number("expert_used_count")
    else:
        n_ff = number("feed_forward_length")
    shared = number("expert_shared_feed_forward_length", number("feed_forward_length", n_ff))
    q, k, v = head * n_head, head * n_head_kv, head_v * n_head_kv
    return _Sizes(n_layer, n_embd, n_vocab, q, k, v, head, n_expert, n_ff, shared)


def _of_layers(hparams: Mapping[str, Any], key: str, n_layer: int) -> list[Any]:
    """The values of a key that has a list of one per layer; an empty list for anything else."""
    values = hparams.get(key)
    if key not in _MAY_DIFFER or not isinstance(values, list) or len(values) != n_layer:
        return []
    return values if all(isinstance(x, int) for x in values) else []


def _required(architecture: str, s: _Sizes, found: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    rows = s.n_vocab or found.get("token_embd.weight", (0, 0))[-1]
    yield "token_embd.weight", (s.n_embd, rows)
    yield "output_norm.weight", (s.n_embd,)
    if architecture not in _TIED:
        yield "output.weight", (s.n_embd, rows)
    for layer in range(s.n_layer):
        blk = f"blk.{layer}"
        yield f"{blk}.attn_norm.weight", (s.n_embd,)
        if f"{blk}.attn_qkv.weight" in found:
            yield f"{blk}.attn_qkv.weight", (s.n_embd, s.q + s.k + s.v)
        else:
            yield f"{blk}.attn_q.weight", (s.n_embd, s.q)
            yield f"{blk}.attn_k.weight", (s.n_embd, s.k)
            yield f"{blk}.attn_v.weight", (s.n_embd, s.v)
        yield f"{blk}.attn_output.weight", (s.q, s.n_embd)
        if architecture in _QK_NORMS:
            width = s.n_embd if architecture == "olmoe" else s.head
            yield f"{blk}.attn_q_norm.weight", (width,)
            yield f"{blk}.attn_k_norm.weight", (width,)
        yield from _feed_forward(architecture, blk, s)


def _feed_forward(architecture: str, blk: str, s: _Sizes) -> Iterator[tuple[str, Shape]]:
    yield f"{blk}.ffn_norm.weight", (s.n_embd,)
    yield f"{blk}.ffn_gate_inp.weight", (s.n_embd, s.n_expert)
    for projection in PROJECTIONS:
        shape = (s.n_ff, s.n_embd) if projection == "down" else (s.n_embd, s.n_ff)
        yield f"{blk}.ffn_{projection}_exps.weight", (*shape, s.n_expert)
    if architecture == "qwen2moe":
        yield f"{blk}.ffn_gate_inp_shexp.weight", (s.n_embd,)
        for projection in PROJECTIONS:
            shape = (s.n_ff_shared, s.n_embd) if projection == "down" else (s.n_embd, s.n_ff_shared)
            yield f"{blk}.ffn_{projection}_shexp.weight", shape


def _optional(architecture: str, s: _Sizes) -> Iterator[tuple[str, Shape]]:
    if architecture in _TIED and s.n_vocab:
        yield "output.weight", (s.n_embd, s.n_vocab)
    for layer in range(s.n_layer):
        for part, n in (("q", s.q), ("k", s.k), ("v", s.v), ("qkv", s.q + s.k + s.v)):
            yield f"blk.{layer}.attn_{part}.bias", (n,)
        if architecture == "llama":
            yield f"blk.{layer}.attn_output.bias", (s.n_embd,)


def _trimmed(shape: Shape) -> Shape:
    """ggml makes no difference between [64] and [64, 1]."""
    return shape if len(shape) == 1 or shape[-1] != 1 else _trimmed(shape[:-1])


def _is_free(name: str) -> bool:
    """Tensors that models may have, in shapes that are not checked here."""
    is_scale = name.endswith((".scale", ".input_scale"))  # of NVFP4 weights
    return is_scale or name == "output.weight" or name.startswith(("rope_freqs.", "rope_factors_"))


def pad_vocabulary(kv: Mapping[str, Value], tensors: Iterable[TensorSpec]) -> dict[str, Value]:
    """`kv` with as many tokens as the embeddings have rows: the rows after the tokenizer's last token get
    unused tokens, as the converter gives them to some kinds of tokenizers. llama.cpp does not load the model
    otherwise.
    """
    rows = next((t.shape[-1] for t in tensors if t.name == "token_embd.weight"), 0)
    n_vocab = n_vocab_of(kv)
    if n_vocab is None or rows <= n_vocab:
        return dict(kv)
    padding: dict[str, list[Any]] = {
        "tokens": [f"[PAD{i}]" for i in range(n_vocab, rows)],
        "scores": [-1000.0] * (rows - n_vocab),
        "token_type": [_UNUSED] * (rows - n_vocab),
    }
    changed = dict(kv)
    for name, more in padding.items():
        key = f"tokenizer.ggml.{name}"
        if key in kv:
            changed[key] = replace(kv[key], value=[*kv[key].value, *more])
    return changed
