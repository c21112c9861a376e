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
from tests.support import ROOT, TINY


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The bundled model: a Hugging Face directory with a real, small Mixtral."""
    return TINY


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
    return _converted(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny-bf16.gguf", "bf16")


@pytest.fixture(scope="session")
def tiny_f32(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in F32: the weights that torch reads."""
    return _converted(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf", "f32")


def _converted(model: Path, path: Path, kind: str) -> Path:
    script = packages.source_dir() / "convert_hf_to_gguf.py"
    command: list[str | Path] = [sys.executable, script, model, "--outfile", path, "--outtype", kind]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache in tmp_path/cache, where the test sees what is stored; the runtime stays where it is."""
    monkeypatch.setenv("MC_GGUF_RUNTIME", str(runtimes.require().path))
    monkeypatch.setenv("MC_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Small matrices gain nothing from a second thread, and idle threads of torch and ggml take the cores
    from each other: ten times slower.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
