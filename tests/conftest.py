"""Fixtures that all tests share, and the check that tests leave nothing behind in the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports numpy or torch: two threads, no network.
os.environ.update({f"{name}_NUM_THREADS": "2" for name in ("OMP", "MKL", "OPENBLAS")})
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from mc_gguf import runtime as runtimes
from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.runtime import Runtime, packages
from tests.support import ROOT


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The bundled model: a Hugging Face directory with a real, small Mixtral."""
    return ROOT / "models" / "tiny-mixtral"


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """The patched runtime that `make setup` built."""
    return _built(patched=True)


@pytest.fixture(scope="session")
def unpatched_runtime() -> Runtime:
    """Stock llama.cpp, the reference, that `make test` built."""
    return _built(patched=False)


def _built(patched: bool) -> Runtime:
    try:
        return runtimes.require(patched=patched)
    except RuntimeBuildError as error:
        pytest.fail(f"{error} (make test does it)")


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a plain BF16 GGUF, written by llama.cpp's own converter script."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-bf16.gguf"
    script = packages.source_dir() / "convert_hf_to_gguf.py"
    command: list[str | Path] = [sys.executable, script, tiny_model, "--outfile", path, "--outtype", "bf16"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fails the run when a test wrote into the repository: tests write under tmp_path."""
    before = _untracked()
    yield
    left = sorted(_untracked() - before)
    assert not left, f"tests left files in the repository: {left}"


def _untracked() -> set[str]:
    command = ["git", "ls-files", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        return set()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())
