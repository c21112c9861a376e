"""Source models: HF directories (one shard and several) and GGUFs against safetensors and gguf-py, and what
is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_gguf.artifacts import PROJECTIONS, TensorSpec, expert_tensor_name
from mc_gguf.common.errors import SourceError
from mc_gguf.ggml.gguf_file import ARRAY, STRING, UINT32, Value
from mc_gguf.ggml.types import TYPES_BY_NAME
from mc_gguf.runtime.packages import load_gguf
from mc_gguf.source import Checkpoint, open_checkpoint
from mc_gguf.source.base import SAMPLE_BYTES, bos_of, make_info, sample_offsets
from tests.support import TINY
from tests.support.gguf_models import (
    RandomCheckpoint,
    mixed,
    model_kv,
    model_tensors,
    quantized_gguf,
    take_apart,
    uniform,
    write_parts,
    write_random,
)
from tests.support.moe_directories import random_moe, save_moe

pytestmark = pytest.mark.native

HF_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return open_checkpoint(TINY)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """What safetensors reads from the bundled model."""
    from safetensors.torch import load_file

    return dict(load_file(TINY / "model.safetensors"))


def test_what_the_model_is(tiny: Checkpoint) -> None:
    info = tiny.info
    assert (info.architecture, info.n_layer, info.n_expert, info.n_expert_used) == ("llama", 6, 8, 2)
    assert (info.n_embd, info.n_ff, info.expert_layers) == (256, 256, tuple(range(6)))
    assert len(info.tensors) == 63
    expected = {
        "block_count": 6,
        "embedding_length": 256,
        "context_length": 1024,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 32,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 32,
        "expert_count": 8,
        "expert_used_count": 2,
    }
    assert expected.items() <= tiny.hparams.items()
    assert tiny.hparams["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert (tiny.bos_id, tiny.add_bos) == (1, True)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_experts_are_the_stored_ones(tiny: Checkpoint, stored: dict[str, Any], projection: str) -> None:
    import torch

    for layer, expert in ((0, 0), (3, 7), (5, 2)):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{HF_NAMES[projection]}.weight"
        weights = stored[name]
        np.testing.assert_array_equal(tiny.expert(layer, projection, expert), weights.float().numpy())
        raw = tiny.raw(expert_tensor_name(layer, projection), expert)
        np.testing.assert_array_equal(raw, weights.view(torch.uint8).numpy().reshape(-1))


def test_q_and_k_are_permuted_v_is_not(tiny: Checkpoint, stored: dict[str, Any]) -> None:
    for name, heads in (("q", 8), ("k", 4), ("v", None)):
        weights = stored[f"model.layers.2.self_attn.{name}_proj.weight"].float().numpy()
        if heads:  # halves of each head to neighbouring rows
            weights = weights.reshape(heads, 2, -1, 256).swapaxes(1, 2).reshape(weights.shape)
        np.testing.assert_array_equal(tiny.tensor(f"blk.2.attn_{name}.weight"), weights)


def test_router_and_norms_are_f32(tiny: Checkpoint) -> None:
    types = {t.name: t.type for t in tiny.info.tensors}
    assert {t for name, t in types.items() if "norm" in name or "gate_inp" in name} == {"F32"}
    assert {t for name, t in types.items() if "norm" not in name and "gate_inp" not in name} == {"BF16"}
    norm = tiny.tensor("output_norm.weight")
    np.testing.assert_array_equal(tiny.raw("output_norm.weight").view(np.float32), norm)


def test_the_gguf_of_the_converter_is_the_same_source(tiny: Checkpoint, tiny_gguf: Path) -> None:
    gguf = open_checkpoint(tiny_gguf)
    assert gguf.hparams == tiny.hparams
    assert gguf.info.tensors == tiny.info.tensors
    assert (gguf.info.kv_bytes, gguf.info.n_kv) == (tiny.info.kv_bytes, tiny.info.n_kv)
    assert (gguf.bos_id, gguf.add_bos) == (tiny.bos_id, tiny.add_bos)
    for spec in tiny.info.tensors:
        if "_exps" not in spec.name:
            np.testing.assert_array_equal(gguf.tensor(spec.name), tiny.tensor(spec.name))
            np.testing.assert_array_equal(gguf.raw(spec.name), tiny.raw(spec.name))
    for layer, projection, expert in ((0, "gate", 1), (4, "down", 7), (5, "up", 0)):
        weights = tiny.expert(layer, projection, expert)
        np.testing.assert_array_equal(gguf.expert(layer, projection, expert), weights)


def test_copied_metadata_is_complete(tiny: Checkpoint, tiny_gguf: Path) -> None:
    gguf = load_gguf()
    reader = gguf.GGUFReader(tiny_gguf)
    writer = gguf.GGUFWriter(None, "llama")
    tiny.copy_kv(writer)
    ours = {"general.file_type", "general.quantization_version"}
    expected = {key for key in reader.fields if not key.startswith("GGUF.")} - ours
    assert set(writer.kv_data[0]) == expected
    assert len(expected) == tiny.info.n_kv


def test_nothing_stays_in_memory(tiny: Checkpoint) -> None:
    """LazyBase.to_eager would leave every weight in the converter's tree."""
    for expert in range(8):
        tiny.expert(0, "gate", expert)
    tiny.tensor("token_embd.weight")
    seen: list[Any] = [*tiny._lazy.values()]  # type: ignore[attr-defined]
    n_node = 0
    while seen:
        node = seen.pop()
        if isinstance(node, list | tuple):
            seen += node
        elif hasattr(node, "_args"):
            assert node._data is None
            seen.append(node._args)
            n_node += 1
    assert n_node > len(tiny.info.tensors)


def split(source: Path, target: Path, n_shard: int) -> Path:
    """The same checkpoint in several shards, as transformers names them."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors, reverse=True)
    index: dict[str, str] = {}
    for i in range(n_shard):
        shard = f"model-{i + 1:05d}-of-{n_shard:05d}.safetensors"
        save_file(
            {name: tensors[name] for name in names[i::n_shard]}, target / shard, metadata={"format": "pt"}
        )
        index |= dict.fromkeys(names[i::n_shard], shard)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (target / "model.safetensors.index.json").write_text(text)
    return target


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards over which every layer's experts are spread; the directory has the model's name."""
    return split(TINY, tmp_path_factory.mktemp("shards") / "tiny-mixtral", 3)


def test_shards_make_no_difference(tiny: Checkpoint, sharded: Path) -> None:
    many = open_checkpoint(sharded)
    assert sorted(many.info.tensors, key=str) == sorted(tiny.info.tensors, key=str)
    assert many.info.fingerprint == tiny.info.fingerprint
    np.testing.assert_array_equal(many.expert(2, "down", 6), tiny.expert(2, "down", 6))


def test_fingerprint_sees_weights_and_configuration(sharded: Path, tmp_path: Path) -> None:
    original = open_checkpoint(sharded).info.fingerprint
    changed = tmp_path / "tiny-mixtral"
    shutil.copytree(sharded, changed)
    assert open_checkpoint(changed).info.fingerprint == original
    shard = changed / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert open_checkpoint(changed).info.fingerprint != original
    data[-1] ^= 1
    shard.write_bytes(data)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    assert open_checkpoint(changed).info.fingerprint != original


def test_samples() -> None:
    assert sample_offsets(100) == [(0, 100)]
    assert sample_offsets(SAMPLE_BYTES + 1) == [(0, SAMPLE_BYTES), (1, SAMPLE_BYTES)]
    assert sample_offsets(10 * SAMPLE_BYTES) == [(i * SAMPLE_BYTES, SAMPLE_BYTES) for i in (0, 4.5, 9)]


def test_tokens_as_transformers(tiny: Checkpoint) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for text in ("Hello world", " two  spaces\n\nand lines", "Größe 日本 🙂", ""):
        assert tiny.tokenize(text) == tokenizer.encode(text, add_special_tokens=False)
    assert 1 not in tiny.tokenize("<s> is text")


def test_tokens_of_a_gguf_are_the_same(tiny: Checkpoint, tiny_gguf: Path, runtime: object) -> None:
    gguf = open_checkpoint(tiny_gguf)
    for text in ("Hello world", "Once upon a time, there was 1 dog.", "naïve façade", "a <s> b </s>"):
        assert gguf.tokenize(text) == tiny.tokenize(text)


# --- what is refused
# ------------------------------------------------------------------------------------------------


def _shard(folder: Path) -> Path:
    return folder / "model-00002-of-00003.safetensors"


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _truncate(share: float) -> Callable[[Path], object]:
    return lambda folder: _shard(folder).write_bytes(
        _shard(folder).read_bytes()[: int(share * _shard(folder).stat().st_size)]
    )


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer.*"):
        path.unlink()


def _no_shards(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def _bad_header(folder: Path) -> None:
    data = _shard(folder).read_bytes()
    _shard(folder).write_bytes(data[:8] + b"X" + data[9:])


def _missing_tensor(folder: Path) -> None:
    """A shard that lacks a tensor of the index."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.extra.weight"] = _shard(folder).name
    path.write_text(json.dumps(index))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (_no_tokenizer, "has no tokenizer"),
    "no shards": (_no_shards, r"has no model\*\.safetensors"),
    "missing shard": (lambda folder: _shard(folder).unlink(), "lacks 1 of 3 shards: model-00002-of-00003"),
    "truncated shard": (_truncate(0.9), r"model-00002-of-00003\.safetensors is truncated"),
    "truncated header": (_truncate(0.0001), r"model-00002-of-00003\.safetensors is truncated: its header"),
    "damaged header": (_bad_header, "has a damaged safetensors header"),
    "index of more": (_missing_tensor, r"says that model\.layers\.9\.extra\.weight is in"),
    "index damaged": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "has no readable weight_map",
    ),
    "unknown architecture": (_config(architectures=["NoSuchModel"]), "converter cannot read .*NoSuchModel"),
    "more experts than stored": (_config(num_local_experts=9), "has 9 experts, but 8 are stored"),
    "config damaged": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_directories(sharded: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    damage, message = REFUSED[case]
    damage(folder)
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_experts_in_one_tensor_where_the_converter_knows_none(tmp_path: Path, stored: dict[str, Any]) -> None:
    """The converter does not read a Mixtral that is stored as newer families are."""
    from safetensors.torch import save_file

    part = re.compile(r"(.*\.experts)\.(\d+)\.w2\.weight")
    found = [match for match in map(part.fullmatch, stored) if match]
    tensors = {name: value for name, value in stored.items() if ".experts." not in name}
    for experts in {match[1] for match in found}:
        halves = [torch.cat([stored[f"{experts}.{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(8)]
        tensors[f"{experts}.gate_up_proj"] = torch.stack(halves)
        tensors[f"{experts}.down_proj"] = torch.stack([stored[f"{experts}.{e}.w2.weight"] for e in range(8)])
    shutil.copytree(TINY, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"converter cannot read .*Unprocessed experts: ") as caught:
        open_checkpoint(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_refused_dense_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    with pytest.raises(SourceError, match="no Mixture-of-Experts model"):
        open_checkpoint(tmp_path)


def test_refused_paths(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"hf download owner/Mixtral-8x7B-v0\.1 --local-dir DIR"):
        open_checkpoint(Path("owner/Mixtral-8x7B-v0.1"))
    with pytest.raises(SourceError, match="/dev/null is no regular file"):
        open_checkpoint(Path("/dev/null"))
    with pytest.raises(SourceError, match="is one file of a checkpoint; give the directory"):
        open_checkpoint(TINY / "model.safetensors")
    for name, what in {"m.calib.safetensors": "a calibration", "m.plan.json": "a plan"}.items():
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(SourceError, match=f"{name} is {what}, not a model; give the directory or"):
            open_checkpoint(tmp_path / name)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match="is empty; download"):
        open_checkpoint(tmp_path / "empty.gguf")


def test_weights_that_vanish_while_reading(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    checkpoint = open_checkpoint(folder)
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    with pytest.raises(
        SourceError, match=r"cannot read the weights of blk\.0\.ffn_gate_exps\.weight, expert 1"
    ):
        checkpoint.expert(0, "gate", 1)


# --- GGUF
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def random_gguf(tmp_path: Path) -> Path:
    """A 16-bit GGUF with three experts, without keys of ours."""
    checkpoint = RandomCheckpoint(2, 3, kind="F16")
    write_random(tmp_path / "ours.gguf", checkpoint, uniform(checkpoint.info, "F16"))
    kv, parts = take_apart(tmp_path / "ours.gguf")
    kinds = {t.name: t.type for t in checkpoint.info.tensors}
    kv["llama.attention.head_count_kv"] = Value(UINT32, 2)  # as the tensors are
    for i, part in enumerate(parts):
        n = int(np.prod(part.shape))
        if part.type_id == 1:  # random bytes are no numbers
            data = np.random.default_rng(i).standard_normal(n).astype(np.float16)
            parts[i] = type(part)(part.name, part.shape, 1, data.tobytes())
        if part.type_id == 0:
            parts[i] = type(part)(part.name, part.shape, 0, np.ones(n, dtype=np.float32).tobytes())
        if part.type_id == 8:  # fixed types of a plan: back to 16 bits
            parts[i] = type(part)(part.name, part.shape, 1, np.arange(n, dtype=np.float16).tobytes())
        assert kinds[part.name] in ("F16", "F32")
    write_parts(tmp_path / "plain.gguf", {k: v for k, v in kv.items() if not k.startswith("mc_gguf.")}, parts)
    return tmp_path / "plain.gguf"


def split_gguf(path: Path, n_shard: int) -> Path:
    """As gguf-split does it: metadata in the first shard, split.* keys in all."""
    kv, parts = take_apart(path)
    size = -(-len(parts) // n_shard)
    for i in range(n_shard):
        keys = {
            "split.no": Value(2, i),
            "split.count": Value(2, n_shard),
            "split.tensors.count": Value(5, len(parts)),
        }
        name = path.with_name(f"part-{i + 1:05d}-of-{n_shard:05d}.gguf")
        write_parts(name, {**(kv if i == 0 else {}), **keys}, parts[i * size : (i + 1) * size])
    return path.with_name(f"part-00002-of-{n_shard:05d}.gguf")


def test_gguf_shards(random_gguf: Path) -> None:
    whole, shards = open_checkpoint(random_gguf), open_checkpoint(split_gguf(random_gguf, 3))
    assert shards.info == whole.info
    np.testing.assert_array_equal(shards.expert(1, "up", 2), whole.expert(1, "up", 2))
    assert shards.tensor("token_embd.weight").shape == (3, 32)
    writer = load_gguf().GGUFWriter(None, "llama")
    shards.copy_kv(writer)
    assert not any(key.startswith("split.") for key in writer.kv_data[0])


def test_gguf_shards_missing_or_misnamed(random_gguf: Path) -> None:
    second = split_gguf(random_gguf, 3)
    second.with_name("part-00003-of-00003.gguf").rename(second.with_name("elsewhere.gguf"))
    with pytest.raises(SourceError, match=r"lacks 1 of 3 shards: part-00003-of-00003\.gguf"):
        open_checkpoint(second)
    with pytest.raises(SourceError, match="is one of 3 shards, but is not named like"):
        open_checkpoint(second.with_name("elsewhere.gguf"))
    shutil.copy(second, second.with_name("part-00003-of-00003.gguf"))
    with pytest.raises(SourceError, match=r"part-00003-of-00003\.gguf is not shard 3 of 3 of one model"):
        open_checkpoint(second)


def _normal(shape: tuple[int, ...]) -> bytes:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32).tobytes()


def test_gguf_f32_experts(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(1, 3, kind="F32")
    write_random(tmp_path / "m.gguf", checkpoint, uniform(checkpoint.info, "F32"))
    kv, parts = take_apart(tmp_path / "m.gguf")
    kv["llama.attention.head_count_kv"] = Value(UINT32, 2)
    parts = [replace(p, type_id=0, data=_normal(p.shape)) for p in parts]
    write_parts(tmp_path / "f32.gguf", kv, parts)
    source = open_checkpoint(tmp_path / "f32.gguf")
    np.testing.assert_array_equal(
        source.expert(0, "down", 1).view(np.uint8).reshape(-1), source.raw(expert_tensor_name(0, "down"), 1)
    )


QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0", "MXFP4")


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_gguf_stands_for_its_own_values(tmp_path: Path, name: str) -> None:
    weights = quantized_gguf(tmp_path / "q.gguf", name)
    source = open_checkpoint(tmp_path / "q.gguf")
    assert source.gguf == tmp_path / "q.gguf"
    assert {t.type for t in source.info.tensors} == {name, "F32"}
    for tensor, expected in weights.items():
        if "_exps" not in tensor:
            np.testing.assert_array_equal(source.tensor(tensor), expected)
    for layer, projection, expert in ((0, "gate", 2), (1, "up", 0), (1, "down", 1)):
        stack = expert_tensor_name(layer, projection)
        found = source.expert(layer, projection, expert)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, weights[stack][expert])
    kind = TYPES_BY_NAME[name]
    assert source.raw(expert_tensor_name(0, "up"), 1).nbytes == 256 * kind.row_bytes(256)


def test_a_quantized_gguf_that_is_damaged(tmp_path: Path) -> None:
    """A scale that is no number, which is in the first two bytes of a block of Q8_0."""
    path, name = tmp_path / "q.gguf", expert_tensor_name(1, "down")
    quantized_gguf(path, "Q8_0")
    kv, parts = take_apart(path)
    i = next(i for i, part in enumerate(parts) if part.name == name)
    n = len(parts[i].data) // 3
    parts[i] = replace(parts[i], data=parts[i].data[:n] + b"\xff\x7f" + parts[i].data[n + 2 :])
    write_parts(path, kv, parts)
    source = open_checkpoint(path)
    source.expert(1, "down", 0)
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_down_exps\.weight, expert 1: nan, and 31 more"):
        source.expert(1, "down", 1)


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I8", "I32", "F64"])
def test_a_type_that_is_none_of_weights_is_refused(tmp_path: Path, name: str) -> None:
    path, kind = tmp_path / "q.gguf", TYPES_BY_NAME[name]
    quantized_gguf(path, "Q8_0")
    kv, parts = take_apart(path)
    i = next(i for i, part in enumerate(parts) if part.name == "blk.1.attn_v.weight")
    parts[i] = replace(parts[i], type_id=kind.id, data=bytes(256 * kind.row_bytes(256)))
    write_parts(path, kv, parts)
    with pytest.raises(
        SourceError, match=rf"blk\.1\.attn_v\.weight is {name}, which this mc_gguf cannot read"
    ):
        open_checkpoint(path)


def test_a_file_of_ours_is_no_source(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint()
    write_random(tmp_path / "m.gguf", checkpoint, mixed(checkpoint, ("Q4_0", "Q8_0")))
    with pytest.raises(
        SourceError, match=r"m\.gguf is a mixed-expert file that mc_gguf made \(blk\.0\..*\.map\)"
    ):
        open_checkpoint(tmp_path / "m.gguf")


def test_truncated_gguf_is_refused(random_gguf: Path) -> None:
    data = random_gguf.read_bytes()
    random_gguf.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="it is truncated"):
        open_checkpoint(random_gguf)


def test_gguf_that_shrinks_while_reading(random_gguf: Path) -> None:
    source = open_checkpoint(random_gguf)
    random_gguf.write_bytes(random_gguf.read_bytes()[:2000])
    with pytest.raises(SourceError, match="is cut off"):
        source.expert(1, "down", 2)
    with pytest.raises(SourceError, match=r"has no tensor blk\.7"):
        source.raw("blk.7.attn_q.weight")


def test_names_of_unknown_tensors(tiny: Checkpoint) -> None:
    for name in ("blk.0.nothing.weight", expert_tensor_name(0, "gate")):
        with pytest.raises(SourceError, match=name.replace(".", r"\.")):
            tiny.tensor(name)


def test_shapes_that_do_not_fit() -> None:
    kv, tensors = model_kv(1, 4, 32, 64), model_tensors(1, 4, 32, 64, "F16")
    kv["llama.attention.head_count_kv"] = Value(UINT32, 2)
    make_info(Path("m"), kv, "llama", tensors, [])
    with pytest.raises(SourceError, match=r"expected blk\.0\.ffn_up_exps\.weight .* found nothing"):
        make_info(Path("m"), kv, "llama", [t for t in tensors if "up_exps" not in t.name], [])
    with pytest.raises(SourceError, match="has no whole layer of 4 routed experts"):
        make_info(Path("m"), kv, "llama", [t for t in tensors if "exps" not in t.name], [])
    with pytest.raises(SourceError, match=r"expected blk\.0\.ffn_gate_exps\.weight of shape \[32, 64, 5\]"):
        make_info(Path("m"), {**kv, "llama.expert_count": Value(UINT32, 5)}, "llama", tensors, [])


@pytest.mark.parametrize("projections", [PROJECTIONS, ("gate_up", "down"), ("up", "down")])
def test_stacks_of_any_architecture(projections: tuple[str, ...]) -> None:
    kv = _of_another_architecture(model_kv(2, 4, 32, 64))
    tensors = model_tensors(2, 4, 32, 64, "F16", projections)
    info = make_info(Path("m"), kv, "other", tensors, [])
    assert info.projections == projections
    assert (info.n_embd, info.n_ff, info.n_expert, info.expert_width) == (32, 64, 4, 32)
    first = {"gate_up": (128, 32)}.get(projections[0], (64, 32))
    assert [info.expert_shape(p, 1) for p in (projections[0], "down")] == [first, (32, 64)]
    for projection in projections:
        name = expert_tensor_name(1, projection)
        fewer = [t for t in tensors if t.name != name]
        with pytest.raises(SourceError, match=rf"expected {re.escape(name)} .*, found nothing"):
            make_info(Path("m"), kv, "other", fewer, [])
        spec = next(t for t in tensors if t.name == name)
        for shape in ((32, 64, 3), (32, 32, 4), (64, 128, 4)):
            changed = [*fewer, replace(spec, shape=shape)]
            with pytest.raises(SourceError, match=r"expected blk\.1\.ffn_.*; such a model is not supported"):
                make_info(Path("m"), kv, "other", changed, [])


def _of_another_architecture(kv: dict[str, Value]) -> dict[str, Value]:
    return {key.replace("llama.", "other."): value for key, value in kv.items()}


def test_stacks_that_no_expert_has() -> None:
    kv = _of_another_architecture(model_kv(2, 4, 32, 64))
    both = [
        *model_tensors(2, 4, 32, 64, "F16"),
        TensorSpec(expert_tensor_name(1, "gate_up"), (32, 128, 4), "F16"),
    ]
    with pytest.raises(SourceError, match="no expert has gate, up, gate_up, down together"):
        make_info(Path("m"), kv, "other", both, [])


def test_layers_whose_experts_differ_in_width() -> None:
    """As in models that were pruned: n_ff is the largest."""
    kv = _of_another_architecture(model_kv(2, 4, 32, 64))
    narrow = {"gate": (32, 48, 4), "up": (32, 48, 4), "down": (48, 32, 4)}
    shapes = {expert_tensor_name(0, p): shape for p, shape in narrow.items()}
    tensors = [replace(t, shape=shapes.get(t.name, t.shape)) for t in model_tensors(2, 4, 32, 64, "F16")]
    info = make_info(Path("m"), kv, "other", tensors, [])
    assert info.n_ff == 64
    assert [info.expert_shape("up", layer) for layer in (0, 1)] == [(48, 32), (64, 32)]


def test_the_number_of_used_experts_may_differ_between_layers() -> None:
    kv = _of_another_architecture(model_kv(2, 4, 32, 64))
    tensors = model_tensors(2, 4, 32, 64, "F16")
    for values, expected in (([2, 3], 3), ([0, 2], 2)):
        used = {"other.expert_used_count": Value(ARRAY, values, UINT32)}
        assert make_info(Path("m"), kv | used, "other", tensors, []).n_expert_used == expected
    for values in ([2, 5], [-1, 2], [2, 2, 2]):
        used = {"other.expert_used_count": Value(ARRAY, values, UINT32)}
        with pytest.raises(SourceError, match="expert_used_count is "):
            make_info(Path("m"), kv | used, "other", tensors, [])


def test_bos_rules() -> None:
    model, bos = "tokenizer.ggml.model", "tokenizer.ggml.bos_token_id"
    assert bos_of({}) == (None, False)
    assert bos_of({model: Value(STRING, "llama"), bos: Value(UINT32, 1)}) == (1, True)
    assert bos_of({model: Value(STRING, "gpt2"), bos: Value(UINT32, 7)}) == (7, False)
    add = {"tokenizer.ggml.add_bos_token": Value(7, False)}
    assert bos_of({model: Value(STRING, "llama"), bos: Value(UINT32, 1), **add}) == (1, False)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Olmoe"])
def test_sentencepiece_where_the_converter_expects_another_tokenizer(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_moe(random_moe(name), tmp_path))
    writer = load_gguf().GGUFWriter(None, checkpoint.info.architecture)
    checkpoint.copy_kv(writer)
    assert writer.kv_data[0]["tokenizer.ggml.model"].value == b"llama"
    assert len(writer.kv_data[0]["tokenizer.ggml.scores"].value) == 4096
    assert (checkpoint.bos_id, checkpoint.add_bos) == (1, True)


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    save_moe(random_moe("Qwen3Moe"), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no SentencePiece model")
    with pytest.raises(SourceError, match=r"the tokenizer \(.*tokenizer.model\) cannot be read"):
        open_checkpoint(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(SourceError, match="BPE pre-tokenizer was not recognized"):
        open_checkpoint(tmp_path)
