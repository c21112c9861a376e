"""A Hugging Face checkpoint directory, read through llama.cpp's own converter.

The converter (conversion/ of the pinned source) decides on names, metadata, tokenizer and permutations. It
builds a tree of lazy tensors, which is kept and evaluated for one tensor, or one expert of a stack, at a
time (lazy.py). Weights are mapped only while they are copied. What a checkpoint stores in blocks that are
ggml's, too (MXFP4), is read as it is.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import TensorSpec, expert_tensor_name
from mc_gguf.common.errors import McError, SourceError
from mc_gguf.ggml.gguf_file import FLOAT32, Value
from mc_gguf.ggml.gguf_writer import add_values
from mc_gguf.ggml.types import READABLE
from mc_gguf.runtime.packages import load_conversion, load_gguf
from mc_gguf.source.base import bos_of, hparams_of, make_info, sample_offsets, select_metadata
from mc_gguf.source.converter_view import converter_view
from mc_gguf.source.directory import TOKENIZERS, check_directory
from mc_gguf.source.lazy import evaluate, evaluate_expert
from mc_gguf.source.safetensors_files import StoredTensor
from mc_gguf.source.tensors import pad_vocabulary
from mc_gguf.source.values import as_float32, check_weights

# What upstream's converter raises on checkpoints it cannot take.
_CONVERTER_ERRORS = (
    RuntimeError,  # NotImplementedError is one
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AssertionError,
    ArithmeticError,  # of numbers that are no float32
    AttributeError,  # of lists where it expects dicts
    struct.error,  # of values where it expects numbers
    OSError,
    ImportError,
)


class HfCheckpoint:
    """The Checkpoint (mc_gguf.source) of a Hugging Face directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.gguf: Path | None = None
        stored = check_directory(path)
        conversion = load_conversion()
        self._gguf_py = load_gguf()
        try:
            model, self._lazy = _convert(path, conversion)
        except _CONVERTER_ERRORS as error:
            raise SourceError(f"llama.cpp's converter cannot read {path}: {_one_line(error)}") from error
        writer = model.gguf_writer
        architecture = writer.arch
        kv = {key: _stored_value(path, key, value, writer) for key, value in writer.kv_data[0].items()}
        infos: dict[str, Any] = writer.tensors[0]
        self._types = {name: info.dtype.name for name, info in infos.items()}
        self._packed = {name: info.tensor for name, info in infos.items() if name not in self._lazy}
        for name in self._packed:
            if self._types[name] not in (*READABLE, "F32"):
                raise SourceError(
                    f"{path}: {name} is stored as {self._types[name]}, which this mc_gguf cannot read; give "
                    "the 16-bit or 32-bit checkpoint"
                )
        specs = [
            TensorSpec(n, tuple(int(d) for d in reversed(i.shape)), i.dtype.name) for n, i in infos.items()
        ]
        kv = pad_vocabulary(kv, specs)
        self._kv = select_metadata(kv)
        self.hparams: Mapping[str, Any] = hparams_of(kv, architecture)
        self.bos_id, self.add_bos = bos_of(kv)
        self.info = make_info(path, kv, architecture, specs, _samples(stored))
        self._stacks = {stack.name for stack in self.info.stacks.values()}

    def copy_kv(self, writer: Any) -> None:
        add_values(writer, self._kv)

    def tensor(self, name: str) -> NDArray[np.float32]:
        if name not in self._types or name in self._stacks:
            raise SourceError(f"{self._path} has no tensor {name} that is not an expert stack")
        return self._read(name)

    def expert(self, layer: int, projection: str, expert: int) -> NDArray[np.float32]:
        return self._read(expert_tensor_name(layer, projection), expert)

    def raw(self, name: str, expert: int | None = None) -> NDArray[np.uint8]:
        gguf = self._gguf_py
        if name in self._packed:
            return self._bytes(name, expert)
        weights = self._read(name, expert)
        data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[self._types[name]])
        return np.ascontiguousarray(data).view(np.uint8).reshape(-1)

    def _read(self, name: str, expert: int | None = None) -> NDArray[np.float32]:
        if name in self._packed:
            cols = next(t.shape[0] for t in self.info.tensors if t.name == name)
            return as_float32(self._bytes(name, expert), self._types[name], cols)
        node = self._lazy[name]
        where = name if expert is None else f"{name}, expert {expert}"
        try:
            value = evaluate(node) if expert is None else evaluate_expert(node, expert)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read the weights of {where}: {_one_line(error)}") from error
        weights: NDArray[np.float32] = np.ascontiguousarray(value.float().numpy())
        check_weights(self._path, name, weights, "F32", expert)
        return weights

    def _bytes(self, name: str, expert: int | None) -> NDArray[np.uint8]:
        """The blocks of what the checkpoint stores quantized."""
        node = self._packed[name]
        data = evaluate(node) if expert is None else evaluate_expert(node, expert)
        return np.ascontiguousarray(data).view(np.uint8).reshape(-1)

    def tokenize(self, text: str) -> list[int]:
        with tokenizer_errors(self._path):
            return list(self._encode(text))

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        """The encoder of tokenizer.json, or of tokenizer.model; without both, what transformers makes of the
        directory.
        """
        file, model = self._path / "tokenizer.json", self._path / "tokenizer.model"
        with tokenizer_errors(self._path):
            if file.is_file():
                from tokenizers import Tokenizer

                tokenizer = Tokenizer.from_file(str(file))
                tokenizer.encode_special_tokens = True
                tokenizer.no_truncation()
                return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
            if model.is_file():
                from sentencepiece import SentencePieceProcessor

                return SentencePieceProcessor(model_file=str(model)).encode_as_ids
            from transformers import AutoTokenizer

            return partial(
                AutoTokenizer.from_pretrained(self._path).encode,
                add_special_tokens=False,
                split_special_tokens=True,
            )


@contextmanager
def tokenizer_errors(folder: Path, view: Path | None = None) -> Iterator[None]:
    """What the libraries of tokenizers raise, plain Exceptions among it, is a SourceError about `folder`, of
    which they may have seen a `view`.
    """
    try:
        yield
    except (McError, NotImplementedError):  # a tokenizer that the converter does not know
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        files = ", ".join(name for name in TOKENIZERS if (folder / name).is_file())
        why = _one_line(error).replace(str(view), str(folder))
        raise SourceError(
            f"{folder}: the tokenizer ({files}) cannot be read: {why}; download its files again",
            parameter="source",
        ) from error


def _convert(path: Path, conversion: ModuleType) -> tuple[Any, dict[str, Any]]:
    """Run the converter, but write nothing: (its model object, lazy float tensors by GGUF name)."""
    gguf = load_gguf()
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    hparams = conversion.ModelBase.load_hparams(path, False)
    base = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
    lazy: dict[str, Any] = {}

    def modify_tensors(self: Any, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        for new_name, tensor in base.modify_tensors(self, data_torch, name, bid):
            lazy[new_name] = tensor
            yield new_name, tensor

    def set_vocab(self: Any) -> None:
        # For Qwen and OLMoE the converter wants a byte-level BPE that it knows; the runtime takes any.
        with tokenizer_errors(path, self.dir_model):
            try:
                base.set_vocab(self)
            except NotImplementedError:
                if not (path / "tokenizer.model").is_file():
                    raise
                self._set_vocab_sentencepiece()

    changes = {"model_arch": base.model_arch, "modify_tensors": modify_tensors, "set_vocab": set_vocab}
    recording = type(base.__name__, (base,), changes)
    # The output is never opened; a name that is not a directory keeps upstream from making one up.
    model = recording(path, gguf.LlamaFileType.GUESSED, path / "none.gguf", hparams=hparams)
    with converter_view(path) as view:
        model.dir_model = model.dir_model_card = view
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
    return model, lazy


def _stored_value(path: Path, key: str, value: Any, writer: Any) -> Value:
    """A GGUFValue of gguf-py as our Value. Raises SourceError for what a GGUF cannot hold: the converter
    copies numbers of config.json unseen.
    """
    try:
        writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
        return _plain_value(value)
    except _CONVERTER_ERRORS as error:
        raise SourceError(
            f"{path}: the metadata would have {value.value!r} as {key}, which is no {value.type.name}; "
            "correct config.json"
        ) from error


def _plain_value(value: Any) -> Value:
    """A GGUFValue of gguf-py as our Value. Text becomes str; some of upstream's tokenizers give bytes."""
    data = value.value
    if int(value.type) == FLOAT32:  # as it will be stored
        return Value(FLOAT32, float(np.float32(data)))
    item = None if value.sub_type is None else int(value.sub_type)
    if isinstance(data, list | tuple):
        data = [_text(x) for x in data]
        if item is None and data:
            item = int(load_gguf().GGUFValueType.get_type(data[0]))
    if item == FLOAT32:
        data = np.asarray(data, dtype=np.float32).tolist()
    return Value(int(value.type), _text(data), item)


def _text(item: Any) -> Any:
    if isinstance(item, bytes | bytearray):
        return bytes(item).decode("utf-8", "surrogateescape")
    return item.item() if isinstance(item, np.generic) else item


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:250] or type(error).__name__


def _samples(stored: Mapping[str, StoredTensor]) -> Iterator[bytes]:
    """Samples of every stored tensor, ordered by tensor name, so that they do not depend on the sharding."""
    for name in sorted(stored):
        tensor = stored[name]
        with tensor.shard.open("rb") as file:
            for start, length in sample_offsets(tensor.n_bytes):
                file.seek(tensor.offset + start)
                yield name.encode() + file.read(length)
