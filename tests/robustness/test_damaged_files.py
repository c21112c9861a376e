"""Files with tensors of types that the CPU does not compute with, or with odd numbers in their metadata: they
are refused when they are loaded, not when they run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import TINY
from tests.support.child import run_command, run_python
from tests.support.mixed_files import first_layers
from tests.support.random_models import write_random_model

pytestmark = pytest.mark.native

START = r"""
import json, math, re, struct, sys
from functools import partial
from pathlib import Path
from mc_gguf.common.errors import McError
from mc_gguf.ggml.gguf_file import Value, encode_kv, read_header
from mc_gguf.ggml.types import TYPES_BY_ID
from mc_gguf import Llama
from tools.forks import Limits, forked
from tools.fuzz import retyped

model, changed = Path(sys.argv[1]), Path(sys.argv[2])
header, data = read_header(model), model.read_bytes()

def run():
    try:
        llama = Llama(changed, n_ctx=64, n_batch=8, n_threads=1)
        llama.eval([1, 2, 3])
        return "ran", ""
    except McError as error:
        return "refused", str(error)

def attempt(*what):
    print(json.dumps([*what, *forked(run, Limits(32 << 30, 60))]), flush=True)
"""
# Prints [tensor, type, how it ended, message], of a tensor of every kind with every type that fits its rows.
TYPES = r"""
kinds_of_tensors = {re.sub(r"[.]\d+", "", name): tensor for name, tensor in header.tensors.items()}
for tensor in kinds_of_tensors.values():
    for kind in TYPES_BY_ID.values():
        if kind.fits(tensor.shape[0]):
            changed.write_bytes(retyped(header, data, tensor.name, kind))
            attempt(tensor.name, kind.name)
"""
# Prints [key, value, how it ended, message], of every number of the architecture with odd values.
NUMBERS = r"""
odd = {4: (0, 1, 3, 1 << 20, (1 << 31) - 1, (1 << 32) - 1), 6: (0.0, -1.0, -1e-15, 1e38, math.inf, math.nan)}
for key, value in header.kv.items():
    if key.startswith(header.get("general.architecture")) and value.type in odd:
        start, end = header.kv_spans[key]
        for number in odd[value.type]:
            changed.write_bytes(data[:start] + encode_kv(key, Value(value.type, number)) + data[end:])
            attempt(key, number)
"""
# What only activations have, or no matrix.
NO_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
ONLY_F32 = ("_norm.weight", "_sinks.weight", ".bias")
# What llama.cpp finds out only when it makes the graph, where the tensor is not known any more.
UNNAMED = ("_sinks.weight", "token_embd.weight")


def mixed(folder: Path, source: Path) -> Path:
    options = ("--bpw", "3", "--no-compensate", "--tokens", 512, "--ctx", 64, "--rows", 16, "--threads", 1)
    types = ("--types", "Q2_K,Q3_K,Q4_K")
    done = run_command("convert", source, *options, *types, "-o", folder / "m.gguf", "--quiet")
    assert done.code == 0, done.stderr
    return folder / "m.gguf"


def results(code: str, model: Path, changed: Path) -> list[list[Any]]:
    done = run_python(START + code, model, changed, timeout=300, memory=64 << 30)
    assert done.code == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(model: Path, changed: Path) -> None:
    found = results(TYPES, model, changed)
    assert len(found) > 200
    for tensor, kind, end, message in found:
        case = (tensor, kind, end, message)
        if tensor.endswith(".map"):
            assert end == ("ran" if kind == "I32" else "refused"), case
        elif tensor.endswith(ONLY_F32):
            assert end == ("ran" if kind == "F32" else "refused"), case
        else:
            assert end == ("refused" if kind in NO_WEIGHTS else "ran"), case
        if end == "refused":
            assert tensor in message or (
                tensor.endswith(UNNAMED) and "cannot compute with such" in message
            ), case
    found = results(NUMBERS, model, changed)
    assert len(found) > 50
    for key, number, end, message in found:
        assert end in ("ran", "refused"), (key, number, end, message)
        if key.endswith("epsilon"):
            assert end == ("ran" if number >= 0 else "refused"), (key, number, end, message)


def test_every_type_and_odd_numbers_in_a_mixed_file(tmp_path: Path) -> None:
    check(mixed(tmp_path, first_layers(TINY, 1, tmp_path / "source")), tmp_path / "changed.gguf")


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss", "dots1"])
def test_every_type_and_odd_numbers_in_other_architectures(architecture: str, tmp_path: Path) -> None:
    check(write_random_model(tmp_path / "m.gguf", architecture), tmp_path / "changed.gguf")
