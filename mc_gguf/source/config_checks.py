"""config.json of a Hugging Face directory against the tensors that are stored there. It needs the standard
library only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc_gguf.common.arguments import FLOAT32_MAX
from mc_gguf.common.errors import SourceError
from mc_gguf.source.architecture import MAX_EXPERTS, MAX_LAYERS
from mc_gguf.source.safetensors_files import StoredTensor

Stored = Mapping[str, StoredTensor]

_N_EXPERT = ("num_local_experts", "num_experts", "n_routed_experts")
_N_USED = ("num_experts_per_tok", "num_experts_per_token")
_N_LAYER = ("num_hidden_layers", "n_layers", "n_layer")
_SIZES = ("hidden_size", "head_dim")
_SIZES_OF_LAYERS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")  # or a list of them
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "rope_theta")
_SWITCHES = ("tie_word_embeddings", "norm_topk_prob", "use_sliding_window")
_EXPERT = re.compile(r"(?P<block>.*\blayers\.\d+\..*\bexperts)\.(?P<number>\d{1,6})\.(?P<part>.+)")
# Of the text model: towers for images and layers that predict further tokens have others.
_LAYER = re.compile(r"(?:(?:model|language_model|transformer|decoder)\.)*layers\.(\d{1,6})\.")
_EMBEDDINGS = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
_OUTPUT = "lm_head.weight"
# Families whose output matrix is one of its own unless config.json says otherwise.
_UNTIED = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")


def check_config(path: Path, config: Mapping[str, Any], stored: Stored) -> None:
    """Raises SourceError when config.json (`path`) and the tensors that are stored do not fit together."""
    _check_values(path, config)
    n_expert = _count(path, config, _N_EXPERT, MAX_EXPERTS)
    _check_used(path, config, n_expert)
    _check_layers(path, config, stored)
    if n_expert is not None:
        _check_experts(path, n_expert, stored)
    _check_output(path, config, stored)
    _check_vocabulary(path, config, stored)


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Raises SourceError for a value that is not of its key's kind."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        wrong = "is missing" if names is None else f"is {names!r}, not a list with the name of a class"
        raise SourceError(f"{path}: architectures {wrong}; download config.json again")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if key in config and config[key] is None:
            raise SourceError(f"{path}: {key} is null, not a whole number above 0; correct it")
    for key in _SIZES:
        _count(path, config, (key,))
    for key in _SIZES_OF_LAYERS:
        values = config.get(key)
        for value in values if isinstance(values, list) else [values]:
            _count(path, {key: value}, (key,))
    for key in _NUMBERS:
        value = config.get(key)
        if value is not None and not (_is_number(value) and 0 < value <= FLOAT32_MAX):
            raise SourceError(f"{path}: {key} is {value!r}, not a float32 above 0; correct it")
    window, layers = config.get("sliding_window"), config.get("layer_types")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise SourceError(f"{path}: sliding_window is {window!r}, not a whole number; correct it")
    if layers is not None and not isinstance(layers, list):
        raise SourceError(f"{path}: layer_types is {layers!r}, not a list; correct it")
    for key, kind, words in (("model_type", str, "a name"), *((x, bool, "true or false") for x in _SWITCHES)):
        if not isinstance(config.get(key), kind | None):
            raise SourceError(f"{path}: {key} is {config[key]!r}, not {words}; correct it")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _find(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any] | None:
    """The first of `keys` that is set, and its value."""
    return next(((key, config[key]) for key in keys if config.get(key) is not None), None)


def _count(
    path: Path, config: Mapping[str, Any], keys: tuple[str, ...], limit: int | None = None
) -> int | None:
    """The whole number that one of `keys` gives; None where none is set."""
    found = _find(config, keys)
    if found is None:
        return None
    key, value = found
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value > (limit or value):
        wanted = f"a whole number from 1 to {limit}" if limit else "a whole number above 0"
        raise SourceError(f"{path}: {key} is {value!r}, not {wanted}; correct it")
    return value


def _check_used(path: Path, config: Mapping[str, Any], n_expert: int | None) -> None:
    n_used, found = _count(path, config, _N_USED), _find(config, _N_USED)
    if n_used is not None and n_expert is not None and n_used > n_expert:
        assert found is not None
        raise SourceError(
            f"{path}: {found[0]} is {n_used}, but the model has {n_expert} experts; correct config.json"
        )


def _check_layers(path: Path, config: Mapping[str, Any], stored: Stored) -> None:
    n_layer, found = _count(path, config, _N_LAYER, MAX_LAYERS), _find(config, _N_LAYER)
    layers = {int(match[1]) for name in stored if (match := _LAYER.match(name))}
    if n_layer is None or found is None or not layers:
        return
    if missing := sorted(set(range(n_layer)) - layers):
        raise SourceError(
            f"{path}: {found[0]} is {n_layer}, but no tensor of layer {_names(missing)} is stored; download "
            "the missing files, or correct config.json"
        )
    more = config.get("num_nextn_predict_layers")  # layers that predict further tokens come after the others
    if max(layers) >= n_layer + (more if isinstance(more, int) else 0):
        raise SourceError(
            f"{path}: {found[0]} is {n_layer}, but tensors of {max(layers) + 1} layers are stored; correct "
            "config.json, or remove the files that do not belong to the model"
        )


def _check_experts(path: Path, n_expert: int, stored: Stored) -> None:
    """Every block of experts must have experts 0 to n_expert - 1, with the same parts in the same shapes."""
    blocks: dict[str, dict[int, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in stored.items():
        if found := _EXPERT.fullmatch(name):
            blocks[found["block"]][int(found["number"])][found["part"]] = tensor.shape
    for block, experts in sorted(blocks.items()):
        if len(experts) != n_expert or max(experts) != n_expert - 1:
            missing = sorted(set(range(n_expert)) - experts.keys())
            what = f", {block}.{missing[0]} is missing" if missing else ""
            raise SourceError(
                f"{path} says that the model has {n_expert} experts, but {len(experts)} are stored in {block}"
                f"{what}; download the missing files, or correct config.json"
            )
        _check_parts(path.parent, block, experts)


def _check_parts(folder: Path, block: str, experts: Mapping[int, Mapping[str, tuple[int, ...]]]) -> None:
    seen: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for parts in experts.values():
        for part, shape in parts.items():
            seen[part][shape] += 1
    shapes = {part: counts.most_common(1)[0][0] for part, counts in seen.items()}
    for number, parts in sorted(experts.items()):
        for part, shape in shapes.items():
            if part not in parts:
                raise SourceError(
                    f"{folder} lacks {block}.{number}.{part}, which other experts have; download the missing "
                    "files"
                )
            if parts[part] != shape:
                raise SourceError(
                    f"{folder}: {block}.{number}.{part} has the shape {list(parts[part])}, that of other "
                    f"experts is {list(shape)}; download the files again"
                )


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the output matrix is the embeddings; None where config.json leaves it open."""
    tied = config.get("tie_word_embeddings")
    if isinstance(tied, bool):
        return tied
    return False if config.get("model_type") in _UNTIED else None


def _check_output(path: Path, config: Mapping[str, Any], stored: Stored) -> None:
    is_language_model = any(name in stored for name in _EMBEDDINGS)
    if is_language_model and _OUTPUT not in stored and _is_tied(config) is False:
        raise SourceError(
            f"{path.parent} lacks {_OUTPUT}, the output matrix, and {path.name} does not say that it is the "
            "embeddings (tie_word_embeddings); download the missing files, or correct config.json"
        )
    table = next((stored[name] for name in _EMBEDDINGS if name in stored), None)
    if table and _is_tied(config) and _OUTPUT in stored and not _same(table, stored[_OUTPUT]):
        raise SourceError(
            f"{path}: tie_word_embeddings is true, but {_OUTPUT} is stored and differs from the embeddings; "
            "set it to false, or remove the tensor"
        )


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal, as far as their first and last bytes tell."""
    return one.shape == other.shape and _ends(one) == _ends(other)


def _ends(tensor: StoredTensor) -> tuple[bytes, bytes]:
    length = min(tensor.n_bytes, 1 << 16)
    with tensor.shard.open("rb") as file:
        file.seek(tensor.offset)
        first = file.read(length)
        file.seek(tensor.offset + tensor.n_bytes - length)
        return first, file.read(length)


def _check_vocabulary(path: Path, config: Mapping[str, Any], stored: Stored) -> None:
    n_vocab = _count(path, config, ("vocab_size",))
    for name in (*_EMBEDDINGS, _OUTPUT):
        if n_vocab is None or name not in stored or not stored[name].shape:
            continue
        rows = stored[name].shape[0]
        if rows > n_vocab:
            raise SourceError(
                f"{path}: vocab_size is {n_vocab}, but {name} has {rows} rows; if the rows after {n_vocab} "
                f"are padding, set vocab_size to {rows}"
            )
        if rows < n_vocab:
            raise SourceError(
                f"{path}: vocab_size is {n_vocab}, but {name} has only {rows} rows; config.json or the "
                "tokenizer is of another model"
            )


def _names(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
