"""What can be refused about a Hugging Face directory before torch and llama.cpp's converter are loaded.

Standard library only: the kind of the directory, the files that belong to it, config.json against the tensors
that are stored (config_checks.py), and how these are stored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc_gguf.common.downloads import placeholder_at
from mc_gguf.common.errors import SourceError
from mc_gguf.source.config_checks import check_config
from mc_gguf.source.not_followed import check_activation, not_followed
from mc_gguf.source.safetensors_files import INDEX, StoredTensor, read_stored
from mc_gguf.source.token_ids import check_token_ids

log = logging.getLogger(__name__)

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
# Files beside the weights that the converter reads.
_READ = (
    *(CONFIG, INDEX, *TOKENIZERS, "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_TEMPLATES = ("chat_template.json", "chat_template.jinja")  # which may be empty

_FLOATS = ("F64", "F32", "F16", "BF16")
# The converter leaves these out.
_IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
# Blocks and scales of MXFP4.
_MXFP4 = ("_blocks", "_scales")
# What the scales of FP8 weights are called, after the name of the weight.
_SCALE = "_scale_inv"

# What is in a directory instead of safetensors or beside a config.json that is missing: what to do with it.
_INSTEAD = {
    "adapter_config.json": "an adapter, not a model: merge it into its base model (with merge_and_unload() "
    "of peft), and give the result",
    "*.gguf": "GGUF files: give one of them by name",
    "consolidated*": "the weights in their authors' own layout: give a directory in the layout of Hugging "
    "Face, with config.json and model*.safetensors",
    "pytorch_model*.bin": "pickled PyTorch weights: load it with transformers, and save it with "
    "save_pretrained(), which writes safetensors",
    "snapshots/*/config.json": "a folder of the Hugging Face cache: give the directory in snapshots/",
    "*/config.json": "subdirectories with a model: give one of them",
    "*.safetensors": "safetensors with other names than model.safetensors or "
    "model-00001-of-0000N.safetensors: rename them",
}


def check_directory(folder: Path) -> dict[str, StoredTensor]:
    """The tensors that are stored in a Hugging Face directory. Raises SourceError with the first thing that
    makes a conversion impossible or wrong, as far as it shows without reading weights.
    """
    _check_kind(folder)
    _check_name(folder)
    _check_files(folder)
    config = read_config(folder)
    _check_quantization(folder, config)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise SourceError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); download it too")
    stored = read_stored(folder)
    _check_types(folder, stored)
    check_config(folder / CONFIG, config, stored)
    check_activation(folder / CONFIG, config)
    if sentences := not_followed(config):
        log.warning("%s: the runtime does not follow this: %s", folder / CONFIG, "; ".join(sentences))
    check_token_ids(folder, config.get("vocab_size"))
    return stored


def _check_name(folder: Path) -> None:
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SourceError(
            f"the name {str(folder)!r} is not UTF-8, which the libraries that read a tokenizer need; rename "
            "the directory, or give it through a link with another name"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, an object; what is in text_config counts as if it were at the top."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    nested = config.get("text_config")
    return config | nested if isinstance(nested, dict) else config


def _check_kind(folder: Path) -> None:
    has_config = (folder / CONFIG).is_file()
    if has_config and (any(folder.glob("model*.safetensors")) or (folder / INDEX).is_file()):
        return
    for pattern, what in _INSTEAD.items():
        if found := sorted(path for path in folder.glob(pattern) if not path.match("model*.safetensors")):
            raise SourceError(f"{folder} has {what} (found {found[0].relative_to(folder)})")
    if not has_config:
        raise SourceError(
            f"{folder} has no config.json; give a Hugging Face checkpoint directory or a GGUF file"
        )
    raise SourceError(f"{folder} has no model*.safetensors; only safetensors checkpoints are supported")


def _check_files(folder: Path) -> None:
    """Raises SourceError for a file beside the weights that is a placeholder, or no JSON though named so."""
    for path in (folder / name for name in (*_READ, *_TEMPLATES)):
        is_template = path.name in _TEMPLATES
        if not path.is_file() or (is_template and path.stat().st_size == 0):
            continue
        try:
            if what := placeholder_at(path):
                raise SourceError(f"{path} {what}")
            if path.suffix != ".json" or is_template:
                continue
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise SourceError(f"{path} is not a JSON object; download it again")
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path} is not valid JSON ({error}); download the file again") from error


def _check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises SourceError for a quantized checkpoint. FP8 with scales and MXFP4 count as 16-bit ones: they are
    what some models are published in.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in ("fp8", "mxfp4"):
        raise SourceError(
            f"{folder} is quantized ({CONFIG}: quantization_config, {method or 'without quant_method'}); "
            "give the 16-bit model that it was made from"
        )


def _is_mxfp4(folder: Path) -> bool:
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"


def _check_types(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    for tensor in stored.values():
        if tensor.dtype in _FLOATS or tensor.name.endswith(_IGNORED):
            continue
        if tensor.dtype == "U8" and tensor.name.endswith(_MXFP4) and _is_mxfp4(folder):
            continue
        if not tensor.dtype.startswith("F8_E4M3") and not tensor.dtype.startswith("F8_E5M2"):
            raise SourceError(
                f"{tensor.shard}: {tensor.name} is stored as {tensor.dtype}, so the checkpoint is quantized; "
                "give the 16-bit or 32-bit one"
            )
        if f"{tensor.name}{_SCALE}" not in stored:
            raise SourceError(
                f"{tensor.shard}: {tensor.name} is stored as {tensor.dtype}, and its scales "
                f"({tensor.name}{_SCALE}) are missing; give the complete checkpoint, or the 16-bit one"
            )
        config = read_config(folder)
        if not config.get("quantization_config"):
            raise SourceError(
                f"{tensor.shard}: {tensor.name} is stored as {tensor.dtype}, but {CONFIG} has no "
                "quantization_config that says how; give the complete checkpoint, or the 16-bit one"
            )
