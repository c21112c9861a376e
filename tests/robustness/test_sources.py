"""Every verb that reads a source, given a damaged one: one line, without torch. And absurd weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf.common.errors import SourceError
from mc_gguf.ggml.gguf_file import STRING, UINT32, Value
from mc_gguf.source import open_checkpoint
from tests.support.child import Outcome, run_command, run_python
from tests.support.gguf_models import RandomCheckpoint, changed_copy, make_calibration, make_plan, uniform
from tests.support.hf_directories import EXPERT, mixtral_tensors, write_directory

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
VERBS = {
    "calibrate": ["calibrate", "{source}", "-o", "{out}"],
    "convert": ["convert", "{source}", "-o", "{out}"],
    "convert to a size": ["convert", "{source}", "-o", "{out}", "--size", "1GiB"],
    "convert to 16 bits": ["convert", "{source}", "-o", "{out}", "--bpw", "16"],
    "convert and refine": ["convert", "{source}", "-o", "{out}", "--bpw", "3", "--refine", "1m"],
    "quantize": ["quantize", "{source}", "{plan}", "-o", "{out}"],
    "refine": ["refine", "{source}", "{plan}", "-o", "{out}"],
}
# Runs a command line, and says what was imported: torch alone takes seconds.
RUN = """
import sys
from mc_gguf.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = [name for name in ("torch", "transformers", "gguf", "scipy") if name in sys.modules]
print(code, heavy)
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan, with its calibration beside it."""
    folder = tmp_path_factory.mktemp("plan")
    info = RandomCheckpoint().info
    made = make_calibration(info, folder / "m.calib.safetensors")
    assert made.fingerprint is not None
    make_plan(info, uniform(info, "Q4_0"), folder / "m.plan.json", made.fingerprint)
    return folder / "m.plan.json"


def _damage(folder: Path, kind: str) -> tuple[Path, str]:
    """A source, and what has to be said of it."""
    if kind == "lfs":
        (write_directory(folder) / "model.safetensors").write_bytes(LFS)
        return folder, "is a Git LFS pointer"
    if kind == "config":
        return write_directory(folder, num_experts_per_tok=9), "num_experts_per_tok is 9"
    if kind == "expert":
        tensors = {name: t for name, t in mixtral_tensors().items() if name != EXPERT}
        return write_directory(folder, tensors), f"lacks {EXPERT}"
    (folder / "m.gguf").write_bytes(LFS)
    return folder / "m.gguf", "is a Git LFS pointer"


@pytest.mark.native
@pytest.mark.parametrize("kind", ["lfs", "config", "expert", "gguf"])
@pytest.mark.parametrize("verb", VERBS)
def test_cheap_checks_come_first(verb: str, kind: str, plan: Path, tmp_path: Path) -> None:
    source, message = _damage(tmp_path, kind)
    names = {"source": source, "plan": plan, "out": tmp_path / "out"}
    done = run_python(RUN, *(word.format(**names) for word in VERBS[verb]))
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    code, rest = done.stdout.strip().split(" ", 1)
    assert (code, rest) == ("1", "[]")
    assert not (tmp_path / "out").exists()


@pytest.mark.native
@pytest.mark.parametrize("verb", ["chat", "eval", "inspect", "routing show"])
@pytest.mark.parametrize("content", [LFS, b"<!DOCTYPE html><html></html>", b""])
def test_files_to_run_that_were_not_downloaded(verb: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    (tmp_path / "t.txt").write_text("some text")
    more = ["--text", tmp_path / "t.txt"] if verb == "eval" else []
    done = run_command(*verb.split(), tmp_path / "m.gguf", *more)
    assert done.code == 1
    assert done.is_clean
    what = {LFS: "is a Git LFS pointer", b"": "is empty"}.get(content, "is a web page")
    assert what in done.stderr


# --- absurd weights

FEW = ("--tokens", 256, "--ctx", 64, "--rows", 8, "--threads", 1, "--quiet", "--no-compensate")


@pytest.fixture(scope="module")
def tiny_tensors() -> dict[str, Any]:
    """Two layers of the bundled model, float32."""
    from safetensors.torch import load_file

    from tests.support import TINY

    tensors = load_file(TINY / "model.safetensors")
    kept = {k: v.float() for k, v in tensors.items() if "layers" not in k or int(k.split(".")[2]) < 2}
    return dict(kept)


def _model(folder: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    from safetensors.torch import save_file

    from tests.support import TINY

    sizes = {k: v for k, v in json.loads((TINY / "config.json").read_text()).items() if "_size" in k}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_local_experts": 8}
    write_directory(folder, {}, **(sizes | heads))
    save_file(tensors | changes, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _in_bfloat16(tensors: dict[str, Any]) -> dict[str, Any]:
    """As the models are published. In float16, which the converter makes of float32, activations overflow."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def _convert(source: Path, types: str) -> Outcome:
    return run_command("convert", source, "-o", source / "m.gguf", "--bpw", 3, "--types", types, *FEW)


W1 = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
ABSURD = {
    "expert": (W1, 1e30, r"blk.1.ffn_gate_exps.weight, expert 5: 1e+30"),
    "expert, infinite": (W1, -np.inf, r"blk.1.ffn_gate_exps.weight, expert 5: -inf"),
    "router": ("model.layers.1.block_sparse_moe.gate.weight", np.nan, "blk.1.ffn_gate_inp.weight: nan"),
    "attention": ("model.layers.0.self_attn.o_proj.weight", 7e4, "blk.0.attn_output.weight: 70000"),
    "embeddings": ("model.embed_tokens.weight", 1e20, "token_embd.weight: 1e+20"),
    "output": ("lm_head.weight", 1e20, "output.weight: 1e+20"),
    "norm": ("model.norm.weight", np.inf, "output_norm.weight: inf"),
}


# Converts every source twice, and prints the errors.
CONVERT = """
import sys
from pathlib import Path
from mc_gguf import convert
from mc_gguf.common.errors import McError
few = {"tokens": 256, "ctx": 64, "rows": 8, "threads": 1, "quiet": True, "types": "Q2_K,Q3_K"}
for source in map(Path, sys.argv[1:]):
    for bpw in (16, 3):
        try:
            convert(source, source / f"{bpw}.gguf", bpw=bpw, **few)
        except McError as error:
            print(source.name, bpw, error)
"""


@pytest.mark.native
def test_absurd_weights_are_named(tiny_tensors: dict[str, Any], tmp_path: Path) -> None:
    sources = []
    for case, (name, value, _) in ABSURD.items():
        changed = tiny_tensors[name].clone()
        changed.view(-1)[7] = value
        sources.append(_model(tmp_path / case, tiny_tensors, **{name: changed}))
    done = run_python(CONVERT, *sources)
    assert (done.code, done.is_clean) == (0, True)
    said = done.stdout.splitlines()
    assert len(said) == 2 * len(ABSURD)
    for (case, (_, _, message)), first in zip(ABSURD.items(), range(0, len(said), 2), strict=True):
        for line in said[first : first + 2]:
            assert line.startswith(f"{case} ")
            assert f"{message}; the source is damaged" in line
    assert not list(tmp_path.glob("*/*.gguf"))


@pytest.mark.native
def test_small_weights_zeros_and_the_largest_are_fine(tiny_tensors: dict[str, Any], tmp_path: Path) -> None:
    """Denormal numbers in one expert, zeros in another, nearly the largest of float16 in a third."""
    changed = {k: v.clone() for k, v in tiny_tensors.items() if "layers.1.block_sparse_moe.experts" in k}
    for name, weights in changed.items():
        if ".experts.1." in name:
            weights *= 1e-38
        if ".experts.2." in name:
            weights *= 1e-12
        if ".experts.3." in name:
            weights.zero_()
        if ".experts.4." in name:
            weights[3, 3] = 65280
    source = _model(tmp_path / "m", _in_bfloat16(tiny_tensors | changed))
    done = _convert(source, "IQ1_S,IQ3_XXS,Q3_K")
    assert (done.code, done.is_clean) == (0, True)
    assert "experts give zeros for every token" in done.stderr
    reason = "because their gate or their up weights are zero: layer 1 expert"
    assert f"without an importance matrix, {reason}" in done.stderr
    for expert in (1, 2):
        where = rf"blk\.1\.ffn_gate_exps\.weight, expert {expert}: its weights, at most \S+, are too small"
        assert len(re.findall(where, done.stderr)) == 1
    assert "expert 3: its weights" not in done.stderr  # zeros are no loss


@pytest.mark.native
def test_activations_that_overflow_are_named(tiny_tensors: dict[str, Any], tmp_path: Path) -> None:
    """No weight is too large, but the products of four of them are."""
    moe = "model.layers.1.block_sparse_moe.experts.5."
    changed = {k: v.sign() * 60000 for k, v in tiny_tensors.items() if k.startswith(moe)}
    norm = "model.layers.1.post_attention_layernorm.weight"
    changed[norm] = tiny_tensors[norm] * 0 + 60000
    done = _convert(_model(tmp_path / "m", _in_bfloat16(tiny_tensors | changed)), "Q2_K,Q3_K")
    assert (done.code, done.is_clean) == (1, True)
    assert "layer 1, expert 5: sums of squared inputs of down reach" in done.stderr


# Calibrates random models whose weights are scaled by powers of ten up to the largest that is allowed.
CALIBRATE = """
import sys
import numpy as np, torch
from mc_gguf.calibrate.calibrator import calibrate_checkpoint
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.common.errors import McError
from mc_gguf.source.text import Corpus
from tests.support.small_models import MemoryCheckpoint, random_mixtral

rows = np.random.default_rng(0).integers(3, 96, (2, 32)).astype(np.int32)
options = CalibrationOptions(types=("Q2_K", "IQ4_XS"), threads=1, max_rows=4)
sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "hidden_size": 256, "intermediate_size": 256}
for seed in range(int(sys.argv[1])):
    rng = np.random.default_rng(seed)
    model = random_mixtral(seed, num_hidden_layers=1, **sizes)
    with torch.no_grad():
        for weights in model.parameters():
            if rng.random() < 0.5:
                weights.mul_(float(10.0 ** rng.integers(-12, 9))).clamp_(-65504, 65504)
            if rng.random() < 0.05:
                weights.zero_()
    try:
        text = Corpus(rows, ("x",), "0" * 64, 64, 0)
        found = calibrate_checkpoint(MemoryCheckpoint(model), text, options, quiet=True)
        print(seed, any(np.isnan(values).any() for values in found.statistics.values()))
    except McError as error:
        print(seed, "refused", error)
"""


@pytest.mark.native
def test_weights_of_every_size_are_measured_or_refused(tmp_path: Path) -> None:
    """No statistic becomes something that is no number, no assertion of ggml is reached, nothing divides by
    zero.
    """
    done = run_python(f"import warnings; warnings.simplefilter('error')\n{CALIBRATE}", 25)
    assert (done.code, done.is_clean) == (0, True)
    said = [line.split()[1] for line in done.stdout.splitlines()]
    assert len(said) == 25
    assert set(said) <= {"False", "refused"}
    assert said.count("False") > 10


# --- GGUFs that llama.cpp would not load


@pytest.mark.native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.freq_base": Value(UINT32, 10_000)}, "llama.rope.freq_base is not stored as a float32"),
        ({"tokenizer.ggml.model": Value(STRING, "foo")}, "unknown tokenizer"),
        ({"tokenizer.ggml.bos_token_id": Value(STRING, "x")}, "bos_token_id is 'x'"),
        ({"llama.context_length": Value(STRING, "x")}, "llama.context_length is not stored as a uint32"),
        ({"llama.context_length": None}, "context_length is missing"),
    ],
)
def test_metadata_that_the_runtime_refuses_is_refused_as_a_source(
    changes: Mapping[str, Value | None], message: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        open_checkpoint(changed_copy(tiny_gguf, tmp_path / "m.gguf", changes))
