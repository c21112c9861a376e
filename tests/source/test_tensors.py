"""Models that llama.cpp would not load: missing, unknown and misshapen tensors, odd numbers, vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf import Llama
from mc_gguf.artifacts import TensorSpec
from mc_gguf.common.errors import SourceError
from mc_gguf.ggml.gguf_file import ARRAY, FLOAT32, STRING, UINT32, Value
from mc_gguf.runtime import packages
from mc_gguf.source import open_checkpoint
from mc_gguf.source.architecture import MAX_EXPERTS, MAX_LAYERS
from mc_gguf.source.base import make_info
from tests.support.gguf_models import Part, model_kv, model_tensors, take_apart, write_parts
from tests.support.hf_directories import EXPERT, N_EMBD, mixtral_tensors, write_directory
from tests.support.moe_directories import CONFIGS, random_moe, save_moe, write_f32

pytestmark = pytest.mark.native

Kv = dict[str, Value]
Model = tuple[Kv, list[TensorSpec]]


@pytest.fixture
def model() -> Model:
    """Metadata and tensors of two layers with 4 experts."""
    kv = model_kv(2, 4, 32, 64) | {"llama.attention.head_count_kv": Value(UINT32, 2)}
    return kv, model_tensors(2, 4, 32, 64, "F16")


def _set(key: str, value: Any, kind: int = UINT32) -> Callable[[Model], Model]:
    return lambda model: ({**model[0], f"llama.{key}": Value(kind, value)}, model[1])


def _used(values: list[Any], kind: int = UINT32) -> Callable[[Model], Model]:
    return lambda model: ({**model[0], "llama.expert_used_count": Value(ARRAY, values, kind)}, model[1])


def _without_key(key: str) -> Callable[[Model], Model]:
    return lambda model: ({k: v for k, v in model[0].items() if k != f"llama.{key}"}, model[1])


def _without(part: str) -> Callable[[Model], Model]:
    return lambda model: (model[0], [t for t in model[1] if part not in t.name])


def _with(name: str, *shape: int) -> Callable[[Model], Model]:
    return lambda model: (
        model[0],
        [*(t for t in model[1] if t.name != name), TensorSpec(name, shape, "F16")],
    )


REFUSED: dict[str, tuple[Callable[[Model], Model], str]] = {
    "uses 5 of 4": (_set("expert_used_count", 5), r"expert_used_count is 5, not a whole number from 1 to 4"),
    "uses 0": (_set("expert_used_count", 0), "expert_used_count is 0"),
    "uses -1": (_set("expert_used_count", -1, 5), "expert_used_count is -1"),
    "uses 1.5": (_set("expert_used_count", 1.5, FLOAT32), "expert_used_count is 1.5"),
    "uses text": (_set("expert_used_count", "2", STRING), "expert_used_count is '2'"),
    "uses a list of 5 and 2 of 4": (_used([5, 2]), r"expert_used_count is 5, not a whole number from 1 to 4"),
    "uses a list that is too short": (_used([2]), r"expert_used_count is \[2\], not a whole number"),
    "uses a list of texts": (_used(["2", "2"], STRING), "expert_used_count is '2', not a whole number"),
    "1025 experts": (_set("expert_count", 1025), "expert_count is 1025, not a whole number from 1 to 1024"),
    "no layers": (_set("block_count", 0), "block_count is 0"),
    "2^40 layers": (
        _set("block_count", 1 << 40),
        "block_count is 1099511627776, not a whole number from 1 to",
    ),
    "no heads": (_set("attention.head_count", 0), "head_count is 0, not a whole number above 0"),
    "a list for a width": (
        _set("attention.key_length", [8, 8], ARRAY),
        r"attention.key_length is \[8, 8\], not a whole number",
    ),
    "a list that is too short": (
        _set("feed_forward_length", [64], ARRAY),
        r"feed_forward_length is \[64\], not a whole number",
    ),
    "no width of experts": (_without_key("feed_forward_length"), "feed_forward_length is missing"),
    "a scalar": (_with("output_norm.weight"), "output_norm.weight is a single number"),
    "no context": (_without_key("context_length"), "context_length is missing"),
    "no epsilon": (_without_key("attention.layer_norm_rms_epsilon"), "rms_epsilon is missing, so llama.cpp"),
    "heads that do not share": (_set("attention.head_count_kv", 3), "head_count_kv, 3, does not divide it"),
    "more layers": (_set("block_count", 3), "block_count is 3, but there is no tensor of layer 2"),
    "fewer layers": (_set("block_count", 1), "block_count is 1, but there are tensors of layer 1"),
    "no experts in a layer": (_without("blk.1.ffn_gate_exps"), "expected blk.1.ffn_gate_exps"),
    "no matrix": (
        _without("blk.1.attn_q"),
        r"lacks the tensor blk\.1\.attn_q\.weight, which llama models have",
    ),
    "no norm": (_without("blk.0.ffn_norm"), r"lacks the tensor blk\.0\.ffn_norm\.weight"),
    "no router": (_without("blk.1.ffn_gate_inp"), r"lacks the tensor blk\.1\.ffn_gate_inp\.weight"),
    "no last norm": (_without("output_norm"), r"lacks the tensor output_norm\.weight"),
    "no embeddings": (_without("token_embd"), r"lacks the tensor token_embd\.weight"),
    "unknown": (
        _with("blk.0.attn_z.weight", 32, 32),
        r"a tensor blk\.0\.attn_z\.weight, which llama\.cpp does",
    ),
    "shape": (_with("blk.0.attn_k.weight", 32, 16), r"has the shape \[32, 16\], but the metadata ask for"),
    "router": (_with("blk.0.ffn_gate_inp.weight", 32, 5), r"ask for \[32, 4\]"),
    "width": (_set("embedding_length", 64), "ask for"),
    "width of experts": (_set("feed_forward_length", 32), r"ffn_gate_exps\.weight has the shape"),
    "rows": (
        _with("token_embd.weight", 32, 4),
        "token_embd.weight has 4 rows, but the tokenizer has 3 tokens",
    ),
    "output rows": (
        _with("output.weight", 32, 2),
        "output.weight has 2 rows, but the tokenizer has 3 tokens",
    ),
    "one tensor per expert": (
        lambda m: (m[0], [replace(t, name=t.name.replace("_exps", ".3")) for t in m[1]]),
        r"one tensor per expert \(blk\.0\.ffn_gate\.3\.weight\), as GGUFs did before April 2024",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_not_load(model: Model, case: str) -> None:
    change, message = REFUSED[case]
    make_info(Path("m.gguf"), model[0], "llama", model[1], [])
    kv, tensors = change(model)
    with pytest.raises(SourceError, match=message):
        make_info(Path("m.gguf"), kv, "llama", tensors, [])


def test_limit_of_the_runtime() -> None:
    text = (packages.source_dir() / "src" / "llama-hparams.h").read_text()
    assert f"#define LLAMA_MAX_EXPERTS {MAX_EXPERTS} " in text
    assert f"#define LLAMA_MAX_LAYERS  {MAX_LAYERS}\n" in text


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_numbers_may_be_given_per_layer(model: Model, key: str) -> None:
    value = model[0][f"llama.{key}"].value
    kv, tensors = _set(key, [value] * 2, ARRAY)(model)
    make_info(Path("m.gguf"), kv, "llama", tensors, [])
    with pytest.raises(SourceError, match=r"ask for|does not divide it"):
        make_info(Path("m.gguf"), _set(key, [2 * value] * 2, ARRAY)(model)[0], "llama", tensors, [])


def test_what_is_optional(model: Model) -> None:
    kv, tensors = model
    more = [
        TensorSpec("blk.0.attn_q.bias", (32,), "F32"),
        TensorSpec("blk.1.attn_output.bias", (32,), "F32"),
        TensorSpec("rope_freqs.weight", (8,), "F32"),
    ]
    make_info(Path("m"), kv, "llama", [*tensors, *more], [])
    make_info(Path("m"), kv, "llama", [t for t in tensors if t.name != "output.weight"], [])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_has_exactly_the_tensors_of_the_table(name: str, tmp_path: Path) -> None:
    """The runtime loads what passes, and the table demands nothing that the models lack. What is missing is
    said for every tensor but those that may be missing.
    """
    checkpoint = open_checkpoint(save_moe(random_moe(name), tmp_path / "hf"))
    path = write_f32(checkpoint, tmp_path / "m.gguf")
    Llama(path, n_ctx=64, n_threads=1).close()
    kv, parts = take_apart(path)
    optional = {"output.weight"} if checkpoint.info.architecture in ("llama", "qwen3moe") else set()
    for part in parts:
        specs = [TensorSpec(p.name, p.shape, "F32") for p in parts if p.name != part.name]
        if part.name in optional or part.name.endswith(".bias"):
            make_info(path, kv, checkpoint.info.architecture, specs, [])
            continue
        with pytest.raises(SourceError, match=part.name.replace(".", r"\.") + "|is it complete"):
            make_info(path, kv, checkpoint.info.architecture, specs, [])


@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "tokenizer.json"])
def test_padded_vocabularies_load(tokenizer: str, tmp_path: Path, runtime: object) -> None:
    """The rows of the embeddings after the tokenizer's last token get tokens that text never becomes."""
    tensors = mixtral_tensors()
    tensors |= {n: ("BF16", (4160, N_EMBD)) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    folder = write_directory(tmp_path / "hf", tensors, vocab_size=4160)
    for name in {"tokenizer.model", "tokenizer.json"} - {tokenizer}:
        (folder / name).unlink()
    llm = Llama(write_f32(open_checkpoint(folder), tmp_path / "m.gguf"), n_ctx=64, n_threads=1)
    assert llm.n_vocab() == 4160
    assert 4159 not in llm.tokenize(b"[PAD4159]", add_bos=False)
    llm.close()


# --- GGUF files


@pytest.fixture
def parts(tmp_path: Path, model: Model) -> tuple[Kv, list[Part]]:
    """The model with ones for weights."""
    kinds = {"F16": (1, np.float16), "F32": (0, np.float32)}
    found = []
    for t in model[1]:
        kind, dtype = kinds[t.type]
        found.append(Part(t.name, t.shape, kind, np.ones(int(np.prod(t.shape)), dtype).tobytes()))
    return model[0], found


def _split(folder: Path, kv: Kv, parts: list[Part], **keys: int) -> list[Path]:
    paths = [folder / f"m-{i + 1:05d}-of-00002.gguf" for i in range(2)]
    half = len(parts) // 2
    for i, (path, some) in enumerate(zip(paths, (parts[:half], parts[half:]), strict=True)):
        numbers = {"no": i, "count": 2, "tensors.count": len(parts)} | keys
        split = {f"split.{name}": Value(5 if "." in name else 2, number) for name, number in numbers.items()}
        write_parts(path, {**(kv if i == 0 else {}), **split}, some)
    return paths


def test_shards_of_two_models(tmp_path: Path, parts: tuple[Kv, list[Part]]) -> None:
    paths = _split(tmp_path, *parts)
    open_checkpoint(paths[1])
    first = paths[0].read_bytes()
    _split(tmp_path, *parts, count=3)
    paths[0].write_bytes(first)
    with pytest.raises(SourceError, match=r"m-00002-of-00002\.gguf is not shard 2 of 2 of one model"):
        open_checkpoint(paths[0])
    paths[1].write_bytes(first)
    with pytest.raises(
        SourceError, match=r"is not shard 2 of 2 of one model: its keys .* are 0 and 2, not 1 and 2"
    ):
        open_checkpoint(paths[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7e4, 1e30])
@pytest.mark.parametrize("name", ["blk.1.ffn_gate_inp.weight", "output_norm.weight"])
def test_weights_of_a_gguf_are_checked(
    tmp_path: Path, parts: tuple[Kv, list[Part]], name: str, value: float
) -> None:
    kv, tensors = parts
    for i, part in enumerate(tensors):
        if part.name == name:
            data = np.frombuffer(part.data, np.float32).copy()
            data[3] = value
            tensors[i] = replace(part, data=data.tobytes())
    write_parts(tmp_path / "m.gguf", kv, tensors)
    source = open_checkpoint(tmp_path / "m.gguf")
    for read in (source.tensor, source.raw):
        with pytest.raises(
            SourceError, match=f"m.gguf: {name}: {value:g}; the source is damaged".replace("+", r"\+")
        ):
            read(name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_experts_of_a_gguf_are_checked_one_by_one(
    tmp_path: Path, parts: tuple[Kv, list[Part]], kind: str
) -> None:
    kv, tensors = parts
    type_id, dtype, infinite = {
        "F16": (1, np.uint16, 0xFC00),
        "BF16": (30, np.uint16, 0xFF80),
        "F32": (0, np.uint32, 0xFF800000),
    }[kind]
    for i, part in enumerate(tensors):
        if part.name == "blk.1.ffn_up_exps.weight":
            data = np.zeros(int(np.prod(part.shape)), dtype)
            data[3 * 32 * 64 + 5] = infinite
            tensors[i] = replace(part, type_id=type_id, data=data.tobytes())
    write_parts(tmp_path / "m.gguf", kv, tensors)
    source = open_checkpoint(tmp_path / "m.gguf")
    source.expert(1, "up", 2)
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up_exps\.weight, expert 3: -inf; the source is"):
        source.expert(1, "up", 3)
    with pytest.raises(SourceError, match=r"expert 3: -inf"):
        source.raw("blk.1.ffn_up_exps.weight", 3)


def test_fp8_with_scales_is_read(tmp_path: Path) -> None:
    """Each block of 16 x 16 weights has a scale."""
    import torch
    from safetensors.torch import load_file, save_file

    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    folder = write_directory(tmp_path, quantization_config=quantization)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = torch.randn(N_EMBD, N_EMBD).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scales = tensors[f"{EXPERT}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    expected = (tensors[EXPERT].float() * scales).numpy()
    np.testing.assert_array_equal(open_checkpoint(folder).expert(1, "gate", 2), expected)
