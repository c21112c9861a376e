"""What a source model looks like to the rest of mc_gguf, however it is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import (
    ALL_PROJECTIONS,
    EXPERT_STACK,
    ModelInfo,
    TensorSpec,
    expert_tensor_name,
    whole_set,
)
from mc_gguf.common.errors import SourceError
from mc_gguf.ggml.gguf_file import ARRAY, FLOAT32, UINT32, Value
from mc_gguf.ggml.gguf_writer import add_values
from mc_gguf.source.architecture import MAX_EXPERTS, MAX_LAYERS
from mc_gguf.source.tensors import check_layout, check_tensors, count_of, n_vocab_of

# What all architectures store in one type.
_REALS = ("rope.freq_base", "rope.scaling.factor", "attention.layer_norm_rms_epsilon", "expert_weights_scale")
_COUNTS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length", "rope.dimension_count"),
)
SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 3

# What an output gets anew, so it is never copied. The prefixes are gguf-split's and ours (container/keys.py).
_NOT_COPIED = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
)
_NOT_COPIED_PREFIXES = ("split.", "mc_gguf.")
# Metadata of which no weight depends: the name, what the model card says, and what is for chat alone.
_OF_NO_WEIGHT = ("general.", "tokenizer.chat_template")


class Checkpoint(Protocol):
    """A MoE model whose weights are read one at a time. Names, order and permutations are GGUF's.

    `gguf` is the file (the first shard) of a model that is a GGUF. `hparams` is the GGUF metadata of the
    architecture without its prefix ("attention.head_count", "rope.freq_base", "expert_used_count", ...).
    Reading raises SourceError.
    """

    info: ModelInfo
    hparams: Mapping[str, Any]
    gguf: Path | None
    bos_id: int | None
    add_bos: bool

    def copy_kv(self, writer: Any) -> None:
        """Add the metadata that an output keeps to a gguf.GGUFWriter, always in the same order."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A whole tensor that is not an expert stack, numpy order: (rows, cols) or (n,)."""

    def expert(self, layer: int, projection: str, expert: int) -> NDArray[np.float32]:
        """One expert's matrix, (rows, cols)."""

    def raw(self, name: str, expert: int | None = None) -> NDArray[np.uint8]:
        """The bytes of a tensor, or of one expert of a stack, in the type that `info.tensors` gives."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`: no BOS is added, and what looks like a special token is plain text."""


def select_metadata(kv: Mapping[str, Value]) -> dict[str, Value]:
    """The metadata that an output keeps: not what mc_gguf writes itself, nor empty arrays and strings, nor
    keys that are not ASCII, which GGUF does not allow.
    """
    return {
        key: value
        for key, value in kv.items()
        if key.isascii()
        and key not in _NOT_COPIED
        and not key.startswith(_NOT_COPIED_PREFIXES)
        and value.value not in ("", [])
    }


def measure_metadata(kv: Mapping[str, Value], architecture: str) -> int:
    """The bytes that `kv` takes in an output's header, with general.architecture, which the writer adds."""
    from mc_gguf.runtime.packages import load_gguf

    writer = load_gguf().GGUFWriter(None, architecture)
    add_values(writer, kv)
    return sum(
        len(writer._pack_val(key, load_gguf().GGUFValueType.STRING, add_vtype=False))
        + len(writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type))
        for key, value in writer.kv_data[0].items()
    )


def hparams_of(kv: Mapping[str, Value], architecture: str) -> dict[str, Any]:
    """The metadata under the architecture's prefix, with the prefix cut off."""
    prefix = f"{architecture}."
    return {key.removeprefix(prefix): value.value for key, value in kv.items() if key.startswith(prefix)}


def bos_of(kv: Mapping[str, Value]) -> tuple[int | None, bool]:
    """(BOS id, whether llama.cpp puts it before every text)."""
    bos = kv.get("tokenizer.ggml.bos_token_id")
    model = kv.get("tokenizer.ggml.model")
    add = kv.get("tokenizer.ggml.add_bos_token")
    default = model is not None and model.value == "llama"  # llama.cpp: SentencePiece models add it
    if bos is not None and not isinstance(bos.value, int):
        raise SourceError(f"tokenizer.ggml.bos_token_id is {bos.value!r}, not the number of a token")
    return (None if bos is None else bos.value), bool(default if add is None else add.value)


def make_info(
    path: Path,
    kv: Mapping[str, Value],
    architecture: str,
    tensors: Sequence[TensorSpec],
    samples: Iterable[bytes],
) -> ModelInfo:
    """The ModelInfo of a source. Raises SourceError unless it is a MoE model of a kind that mc_gguf supports:
    routed experts of a known set of matrices, the same in all layers.
    """
    hparams = hparams_of(kv, architecture)
    if not hparams.get("expert_count"):
        raise SourceError(f"{path} is no Mixture-of-Experts model ({architecture} without an expert count)")
    check_layout(path, tensors)
    n_layer = count_of(path, hparams, "block_count", MAX_LAYERS)
    n_expert = count_of(path, hparams, "expert_count", MAX_EXPERTS)
    n_used = _n_used(path, hparams, n_layer, n_expert)
    n_ff = _check_stacks(path, tensors, n_expert)
    n_layer -= _n_predict(path, hparams, n_layer)
    _check_stored_types(path, kv, architecture)
    check_tensors(path, architecture, hparams, n_vocab_of(kv), tensors)
    kept = select_metadata(kv)
    return ModelInfo(
        architecture=architecture,
        n_layer=n_layer,
        n_expert=n_expert,
        n_expert_used=n_used,
        n_embd=count_of(path, hparams, "embedding_length"),
        n_ff=n_ff,
        fingerprint=fingerprint(kept, architecture, tensors, samples),
        kv_bytes=measure_metadata(kept, architecture),
        n_kv=len(kept) + 1,
        tensors=tuple(tensors),
    )


def _n_used(path: Path, hparams: Mapping[str, Any], n_layer: int, n_expert: int) -> int:
    """The most experts that a token uses in one layer: one number for all layers, or one for each."""
    key = "expert_used_count"
    found = hparams.get(key)
    if not isinstance(found, list) or len(found) != n_layer:
        return count_of(path, hparams, key, n_expert)
    return max((count_of(path, {key: n}, key, n_expert) for n in found if n != 0), default=1)


def _n_predict(path: Path, hparams: Mapping[str, Any], n_layer: int) -> int:
    """How many of the layers, the last ones, predict further tokens (MTP) and are no part of the model's own
    pass.
    """
    key = "nextn_predict_layers"
    return count_of(path, hparams, key, n_layer - 1) if hparams.get(key) else 0


def _check_stacks(path: Path, tensors: Sequence[TensorSpec], n_expert: int) -> int:
    """The width of an expert, the largest where layers differ. Raises SourceError unless every layer with
    experts has a whole set of stacks, the same in all, whose shapes go together.
    """
    stacks: dict[int, dict[str, tuple[int, ...]]] = {}
    for spec in tensors:
        if match := EXPERT_STACK.fullmatch(spec.name):
            stacks.setdefault(int(match[1]), {})[match[2]] = spec.shape
    if not any("down" in found for found in stacks.values()):
        raise SourceError(f"{path} has no whole layer of {n_expert} routed experts; is it complete?")
    projections = sorted({p for found in stacks.values() for p in found}, key=ALL_PROJECTIONS.index)
    wanted = whole_set(projections)
    if not wanted:
        raise SourceError(f"{path}: no expert has {', '.join(projections)} together; is it a whole model?")
    for layer, found in sorted(stacks.items()):
        if (down := found.get("down")) is None:
            raise SourceError(
                f"{path}: expected {expert_tensor_name(layer, 'down')} beside {', '.join(sorted(found))}, "
                "found nothing; such a model is not supported"
            )
        for projection in wanted:
            n_row = down[0] * (2 if projection == "gate_up" else 1)
            expected = down if projection == "down" else (down[1], n_row, n_expert)
            if found.get(projection) != expected or expected[2:] != (n_expert,) or not all(expected):
                raise SourceError(
                    f"{path}: expected {expert_tensor_name(layer, projection)} of shape {list(expected)}, "
                    f"found {list(found.get(projection, ())) or 'nothing'}; such a model is not supported"
                )
    return max(found["down"][0] for found in stacks.values())


def _check_stored_types(path: Path, kv: Mapping[str, Value], architecture: str) -> None:
    """Raises SourceError for a number that llama.cpp would not read in the type in which it is stored."""
    for kind, name, keys in ((FLOAT32, "a float32", _REALS), (UINT32, "a uint32", _COUNTS)):
        for key in (f"{architecture}.{key}" for key in keys):
            if key in kv and kv[key].type not in (kind, ARRAY):
                raise SourceError(
                    f"{path}: {key} is not stored as {name}, so llama.cpp cannot load the model"
                )


def fingerprint(
    kv: Mapping[str, Value], architecture: str, tensors: Sequence[TensorSpec], samples: Iterable[bytes]
) -> str:
    """SHA-256 over the metadata that decides what the weights mean, the tensors' names, shapes and types, and
    samples of the weights. The name of the model, what its card says, and chat templates do not count.

    The samples are SAMPLE_BYTES at the start, the middle and the end of every stored tensor (in a GGUF: of
    every expert), because hashing 90 GB takes longer than quantizing some of it. A change between the samples
    is not noticed.
    """
    digest = hashlib.sha256(architecture.encode())
    for key in sorted(key for key in kv if not key.startswith(_OF_NO_WEIGHT)):
        digest.update(json.dumps([key, kv[key].type, kv[key].item_type, kv[key].value]).encode())
    for spec in sorted(tensors, key=lambda t: t.name):
        digest.update(json.dumps([spec.name, spec.shape, spec.type]).encode())
    for sample in samples:
        digest.update(hashlib.sha256(sample).digest())
    return digest.hexdigest()


def sample_offsets(n_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the samples of a stored tensor of `n_bytes`."""
    last = max(0, n_bytes - SAMPLE_BYTES)
    starts = sorted({last * i // (SAMPLES_PER_TENSOR - 1) for i in range(SAMPLES_PER_TENSOR)})
    return [(start, min(SAMPLE_BYTES, n_bytes)) for start in starts]
