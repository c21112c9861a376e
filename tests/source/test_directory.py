"""Hugging Face directories that are refused before torch is loaded, and what is said."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mc_gguf.common.errors import SourceError
from mc_gguf.source.directory import check_directory
from tests.support.hf_directories import (
    EXPERT,
    N_EMBD,
    Tensors,
    mixtral_tensors,
    write_directory,
    write_shard,
    write_shards,
)

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Hugging Face</title></head></html>\n"
MOE = "model.layers.1.block_sparse_moe"


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        check_directory(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(*parts: str) -> Tensors:
    """The model's tensors but those whose name contains one of `parts`."""
    return {n: t for n, t in mixtral_tensors().items() if not any(part in n for part in parts)}


def test_a_whole_model_is_fine(tmp_path: Path) -> None:
    stored = check_directory(write_directory(tmp_path))
    assert stored.keys() == mixtral_tensors().keys()
    tensor = stored[EXPERT]
    assert (tensor.dtype, tensor.shape, tensor.n_bytes) == ("BF16", (N_EMBD, N_EMBD), 2 * N_EMBD**2)


# --- files that are something else


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a Git LFS pointer, not the file itself; run: git lfs pull"),
        (HTML, "is a web page or an error message"),
        (b"Entry not found", "is a web page or an error message"),
        (b'{"error":"Repository not found"}', "is a web page or an error message"),
        (b"", "is empty; download the file again"),
    ],
)
def test_what_a_download_left_behind(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = write_directory(tmp_path)
    (folder / name).write_bytes(content)
    assert f"{folder / name} {message}" in refused(folder)


@pytest.mark.parametrize("content", [LFS, HTML])
def test_index_and_shards_that_were_not_downloaded(tmp_path: Path, content: bytes) -> None:
    folder = write_directory(tmp_path)
    (folder / "model.safetensors").unlink()
    paths = write_shards(folder, mixtral_tensors(), 3, index=True)
    check_directory(folder)
    paths[1].write_bytes(content)
    assert f"{paths[1]} is a" in refused(folder)
    (folder / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json is a" in refused(folder)


def test_a_zip_archive_under_the_name_of_safetensors(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(600))
    assert "is a ZIP archive (pickled PyTorch weights are one)" in refused(folder)


INSTEAD = {
    "adapter_model.safetensors": ("adapter_config.json", "an adapter, not a model: merge it"),
    "model.gguf": ("model.gguf", "GGUF files: give one of them by name"),
    "pytorch_model-00001-of-00002.bin": ("pytorch_model", "save_pretrained"),
    "consolidated.safetensors": ("consolidated", "their authors' own layout"),
    "consolidated.00.pth": ("consolidated", "their authors' own layout"),
    "weights.safetensors": ("weights", "other names than model.safetensors"),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_directories_without_safetensors(tmp_path: Path, name: str) -> None:
    folder = write_directory(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"x")
    if name.startswith("adapter"):
        (folder / "adapter_config.json").write_text("{}")
    found, message = INSTEAD[name]
    assert message in (text := refused(folder))
    assert found in text


def test_directories_without_config(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "snapshots" / "abc")
    assert "has a folder of the Hugging Face cache: give the directory in snapshots/" in refused(tmp_path)
    assert "give one of them (found abc/config.json)" in refused(tmp_path / "snapshots")
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)
    assert "has no config.json" in refused(tmp_path)


# --- shards


def test_a_missing_shard_is_named_without_an_index(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    (folder / "model.safetensors").unlink()
    write_shards(folder, mixtral_tensors(), 3)[1].unlink()
    assert "lacks 1 of 3 shards: model-00002-of-00003.safetensors" in refused(folder)


def test_old_shards_beside_new_ones(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    write_shards(folder, mixtral_tensors(), 3)
    text = refused(folder)
    assert "files of several models: model in 3 shards, model.safetensors" in text
    (folder / "model.safetensors").unlink()
    check_directory(folder)
    write_shards(folder, mixtral_tensors(), 2)
    assert "files of several models: model in 2 shards, model in 3 shards" in refused(folder)


def test_an_index_decides_between_sets_of_shards(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    write_shards(folder, mixtral_tensors(), 2)
    write_shards(folder, mixtral_tensors(), 3, index=True)
    assert "holds two models: model.safetensors, and 3 shards" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert {t.shard.name[-21:] for t in check_directory(folder).values()} == {
        f"{i}-of-00003.safetensors"[-21:] for i in (1, 2, 3)
    }


def test_tensors_that_are_stored_twice(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    (folder / "model.safetensors").unlink()
    write_shards(folder, mixtral_tensors(), 2)
    write_shard(folder / "model-00002-of-00002.safetensors", mixtral_tensors())
    assert "is both in" in refused(folder)


def test_index_of_another_model(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    (folder / "model.safetensors").unlink()
    paths = write_shards(folder, mixtral_tensors(), 2, index=True)
    one, two = (path.read_bytes() for path in paths)
    paths[0].write_bytes(two)
    paths[1].write_bytes(one)
    assert "where it is not; index and shards are not of one model" in refused(folder)
    write_shards(folder, mixtral_tensors(3), 2)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3})
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {n: p.name for p in paths for n in list(_names(p))}
    index["weight_map"] = {n: p for n, p in stored.items() if "layers.2" not in n}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json does not know" in refused(folder)


def _names(shard: Path) -> set[str]:
    data = shard.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return set(header) - {"__metadata__"}


def _change_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(text: bytes) -> bytes:
        header = json.loads(text)
        change(header)
        return json.dumps(header).encode()

    return lambda path: _write_header(path, changed)


def _write_header(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].rstrip())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _move(header: dict[str, Any]) -> None:
    header[EXPERT]["data_offsets"] = [n - 64 for n in header[EXPERT]["data_offsets"]]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "overlap": (_change_header(_move), f"{EXPERT} begins at byte"),
    "shape": (_change_header(lambda h: h[EXPERT].update(shape=[3, 5])), "damaged safetensors header"),
    "negative": (_change_header(lambda h: h[EXPERT].update(shape=[-32, -32])), "damaged safetensors header"),
    "no offsets": (_change_header(lambda h: h[EXPERT].pop("data_offsets")), "damaged safetensors header"),
    "twice": (
        lambda p: _write_header(p, lambda text: text[:-1] + b"," + text[1:]),
        "damaged safetensors header",
    ),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + bytes(10)), "but its tensors end at"),
    "shorter": (lambda p: p.write_bytes(p.read_bytes()[:-10]), "is truncated"),
    "no header": (lambda p: p.write_bytes(b"\xff" * 4096), "is no safetensors file"),
    "a few bytes": (lambda p: p.write_bytes(b"abc"), "is truncated|no safetensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards(tmp_path: Path, case: str) -> None:
    folder = write_directory(tmp_path)
    damage, message = DAMAGE[case]
    damage(folder / "model.safetensors")
    with pytest.raises(SourceError, match=message):
        check_directory(folder)


# --- types


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", None])
def test_quantized_checkpoints_are_named(tmp_path: Path, method: str | None) -> None:
    folder = write_directory(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    text = refused(folder)
    assert f"quantization_config, {method or 'without quant_method'}" in text
    assert "give the 16-bit model" in text


def test_types_that_are_no_weights(tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    folder = write_directory(tmp_path, tensors | {EXPERT: ("I8", (N_EMBD, N_EMBD))})
    assert f"{EXPERT} is stored as I8, so the checkpoint is quantized" in refused(folder)
    fp8: Tensors = tensors | {EXPERT: ("F8_E4M3", (N_EMBD, N_EMBD))}
    write_shard(folder / "model.safetensors", fp8)
    assert f"its scales ({EXPERT}_scale_inv) are missing" in refused(folder)
    write_shard(folder / "model.safetensors", fp8 | {f"{EXPERT}_scale_inv": ("F32", (1, 1))})
    assert "has no quantization_config that says how" in refused(folder)
    buffers: Tensors = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("I32", (8,))}
    write_shard(folder / "model.safetensors", tensors | buffers)
    check_directory(folder)


def test_experts_in_one_tensor_are_left_to_the_converter(tmp_path: Path) -> None:
    """It knows which families are stored like that."""
    fused: Tensors = {
        f"{MOE}.experts.gate_up_proj": ("BF16", (4, 2 * N_EMBD, N_EMBD)),
        f"{MOE}.experts.down_proj": ("BF16", (4, N_EMBD, N_EMBD)),
    }
    tensors = without("layers.1.block_sparse_moe.experts") | fused
    assert check_directory(write_directory(tmp_path, tensors)).keys() == tensors.keys()


# --- config.json against the tensors


def _rows(name: str, rows: int) -> Tensors:
    return mixtral_tensors() | {name: ("BF16", (rows, N_EMBD))}


MISFITS: dict[str, tuple[Tensors | None, dict[str, Any], str]] = {
    "9 of 4 experts": (None, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but the model has 4"),
    "0 experts used": (
        None,
        {"num_experts_per_tok": 0},
        "num_experts_per_tok is 0, not a whole number above",
    ),
    "-1 experts used": (None, {"num_experts_per_tok": -1}, "is -1, not a whole number"),
    "half an expert": (None, {"num_experts_per_tok": 1.5}, "is 1.5, not a whole number"),
    "text": (None, {"num_experts_per_tok": "2"}, "is '2', not a whole number"),
    "true": (None, {"num_experts_per_tok": True}, "is True, not a whole number"),
    "2000 experts": (
        None,
        {"num_local_experts": 2000},
        "num_local_experts is 2000, not a whole number from 1",
    ),
    "list": (None, {"num_local_experts": [4, 4]}, r"is [4, 4], not a whole number"),
    "pruned": (
        without("experts.1.", "experts.3."),
        {},
        "says that the model has 4 experts, but 2 are stored in model.layers.0.block_sparse_moe.experts, "
        "model.layers.0.block_sparse_moe.experts.1 is missing",
    ),
    "pruned and renumbered": (
        without("experts.3."),
        {"num_local_experts": 3, "num_experts_per_tok": 4},
        "num_experts_per_tok is 4, but the model has 3 experts",
    ),
    "fewer than stored": (None, {"num_local_experts": 3}, "has 3 experts, but 4 are stored"),
    "part of an expert": (without(f"{MOE}.experts.2.w3"), {}, f"lacks {MOE}.experts.2.w3.weight"),
    "another shape": (
        mixtral_tensors() | {EXPERT: ("BF16", (N_EMBD, 16))},
        {},
        f"{EXPERT} has the shape [32, 16], that of other experts is [32, 32]",
    ),
    "more layers": (None, {"num_hidden_layers": 4}, "num_hidden_layers is 4, but no tensor of layer 2, 3"),
    "fewer layers": (None, {"num_hidden_layers": 1}, "is 1, but tensors of 2 layers are stored"),
    "no heads": (None, {"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number above 0"),
    "text for a size": (None, {"hidden_size": "32"}, "hidden_size is '32', not a whole number above 0"),
    "no layers": (None, {"num_hidden_layers": 0}, "num_hidden_layers is 0, not a whole number"),
    "a layer in between": (without("layers.0."), {}, "no tensor of layer 0 is stored"),
    "no output": (without("lm_head"), {}, "lacks lm_head.weight, the output matrix"),
    "no output, not said": (without("lm_head"), {"tie_word_embeddings": None}, "lacks lm_head.weight"),
    "rows": (
        _rows("model.embed_tokens.weight", 4160),
        {},
        "has 4160 rows; if the rows after 4096 are padding",
    ),
    "output rows": (_rows("lm_head.weight", 4160), {}, "lm_head.weight has 4160 rows"),
    "too few rows": (_rows("model.embed_tokens.weight", 4000), {}, "has only 4000 rows"),
}


ODD: list[Any] = [True, 0, -1, 1.5, 2**63, math.inf, math.nan, "", "x", "4", [], [4], {}, {"a": 1}, [[None]]]
# Keys of config.json, and which of these values (and null) are accepted for them.
ACCEPTED: dict[str, list[Any]] = {
    "architectures": [],
    "model_type": [None, "", "x", "4"],
    "vocab_size": [],
    "num_hidden_layers": [],
    "hidden_size": [2**63],  # compared with the shapes of tensors later, as the next
    "head_dim": [None, 2**63],
    "intermediate_size": [None, 2**63, [], [4]],  # in some families a list, with a size per layer
    "num_attention_heads": [None, 2**63, [], [4]],
    "num_key_value_heads": [None, 2**63, [], [4]],
    "num_local_experts": [None],
    "num_experts_per_tok": [None],
    "rms_norm_eps": [None, 1.5, 2**63],
    "rope_theta": [None, 1.5, 2**63],
    "tie_word_embeddings": [None, True],  # both matrices are zeros
    "norm_topk_prob": [None, True],
}


@pytest.mark.parametrize("key", ACCEPTED)
def test_odd_values_in_config_are_named(tmp_path: Path, key: str) -> None:
    folder = write_directory(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for value in [None, *ODD]:
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        if value in ACCEPTED[key]:
            check_directory(folder)
        else:
            assert f"config.json: {key} is " in refused(folder), value


@pytest.mark.parametrize("case", MISFITS)
def test_config_and_tensors_that_do_not_fit(tmp_path: Path, case: str) -> None:
    tensors, config, message = MISFITS[case]
    assert message in refused(write_directory(tmp_path, tensors, **config))


def test_output_matrix_that_is_tied_and_stored(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, tie_word_embeddings=True)
    check_directory(folder)  # both are zeros
    write_directory(tmp_path, without("lm_head"), tie_word_embeddings=True)
    check_directory(folder)
    write_directory(tmp_path, tie_word_embeddings=True)
    data = bytearray((folder / "model.safetensors").read_bytes())
    place = check_directory(folder)["lm_head.weight"]
    data[place.offset] = 1
    (folder / "model.safetensors").write_bytes(data)
    assert "tie_word_embeddings is true, but lm_head.weight is stored and differs" in refused(folder)


def test_layers_of_other_parts_do_not_count(tmp_path: Path) -> None:
    more: Tensors = {
        f"{part}.layers.{i}.x": ("BF16", (4,)) for part in ("vision_model", "mtp") for i in range(9)
    }
    check_directory(write_directory(tmp_path, mixtral_tensors() | more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e39}, "rope_theta is 1e+39, not a float32 above 0"),
        ({"layer_types": 5}, "layer_types is 5, not a list"),
        ({"sliding_window": "x"}, "sliding_window is 'x', not a whole number"),
    ],
)
def test_values_that_no_family_has(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused(write_directory(tmp_path, **changes))


def test_numbers_with_thousands_of_digits(tmp_path: Path) -> None:
    long = "9" * 5000
    names = (f"model.layers.{long}.x", f"model.layers.0.block_sparse_moe.experts.{long}.w1.weight")
    more: Tensors = {name: ("BF16", (4,)) for name in names}
    check_directory(
        write_directory(tmp_path, mixtral_tensors() | more)
    )  # the converter says that it has no place


def test_text_config_counts(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, text_config={"num_experts_per_tok": 9})
    assert "num_experts_per_tok is 9" in refused(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_json_that_was_cut_off(tmp_path: Path, name: str) -> None:
    folder = write_directory(tmp_path)
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(text[: len(text) // 2])
    assert f"{folder / name} is not valid JSON" in refused(folder)


@pytest.mark.parametrize("content", ["[]", "{", "\xff", "null"])
def test_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    folder = write_directory(tmp_path)
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refused(folder)


def test_a_link_into_nowhere(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    assert "model.safetensors" in refused(folder)
    shutil.rmtree(folder)


# --- tokens


def _tokenizer(folder: Path, own: int, added: int = 0) -> None:
    """Gives tokenizer.json `own` tokens, and then `added` ones."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = {f"t{i}": i for i in range(own)}
    data["added_tokens"] = [{"id": own + i, "content": f"<pad{i}>"} for i in range(added)]
    path.write_text(json.dumps(data))


def test_tokens_without_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_directory(tmp_path)
    _tokenizer(folder, 4000, 96)
    check_directory(folder)
    _tokenizer(folder, 4100)
    assert "token 't4096' has number 4096, but the embeddings have only 4096 rows; give the" in refused(
        folder
    )
    _tokenizer(folder, 4096, 2)
    check_directory(folder)
    assert "token '<pad0>' has number 4096" in caplog.text
    assert "2 such tokens are left out" in caplog.text
    (folder / "tokenizer.model").unlink()
    assert "token '<pad0>' has number 4096" in refused(folder)


def test_unigram_tokens_are_numbered_by_their_place(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    unigram = {"type": "Unigram", "vocab": [[f"t{i}", -1.0] for i in range(4097)]}
    (folder / "tokenizer.json").write_text(json.dumps({"model": unigram}))
    assert "token 't4096'" in refused(folder)
