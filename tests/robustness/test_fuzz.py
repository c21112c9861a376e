"""Mutated files are refused or run: a short round of tools/fuzz.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import TINY
from tests.support.child import run_command, run_python
from tests.support.mixed_files import first_layers

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed file with routing, of one layer."""
    folder = tmp_path_factory.mktemp("fuzz")
    options = ("--bpw", "3", "--no-compensate", "--tokens", 512, "--ctx", 64, "--rows", 16, "--threads", 1)
    source, types = first_layers(TINY, 1, folder / "source"), ("--types", "Q2_K,Q3_K,Q4_K")
    done = run_command("convert", source, *options, *types, "-o", folder / "m.gguf", "--quiet")
    assert done.code == 0, done.stderr
    return folder / "m.gguf"


def test_no_mutation_ends_the_process(mixed: Path, tmp_path: Path) -> None:
    code = "from tools import fuzz; fuzz.main()"
    done = run_python(code, mixed, "--runs", 200, "--keep", tmp_path, "--json", timeout=300, memory=32 << 30)
    assert done.code == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["runs"], found["faults"]) == (200, 0)
    assert sum(found["counts"].values()) == 200
    for kind in ("generated", "refused"):  # of which a round that tries nothing would have only one
        assert sum(n for name, n in found["counts"].items() if name.endswith(kind)) > 20


def test_a_fault_is_told_kept_and_counted(mixed: Path, tmp_path: Path) -> None:
    code = """
import os
import mc_gguf
from tools import fuzz
class Dying:
    create_completion = close = lambda *arguments, **options: None
    def __init__(self, path, **options):
        if path.name == "m.gguf" and options == fuzz.DEFAULTS:
            return
        raise END()
mc_gguf.Llama = Dying
fuzz.main()
"""
    arguments = (mixed, "--runs", 3, "--keep", tmp_path, "--json")
    for end, kind in (("RuntimeError", "RuntimeError"), ("os.abort", "SIGABRT")):
        done = run_python(code.replace("END", end), *arguments, memory=32 << 30)
        assert done.code == 1
        found = json.loads(done.stdout)
        assert found["faults"] == 3
        assert all(name.endswith(f": {kind}") for name in found["counts"])
        assert f": {kind}" in done.stderr
    assert list(tmp_path.glob("*.gguf"))
