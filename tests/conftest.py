"""Fixtures that all tests share, the marker `native`, and the check that tests leave nothing behind.

`pytest --without-runtime` runs the tests that need no built runtime, and lets them see none: a test that uses
it without the marker fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

# Before anything imports numpy or torch: two threads, no network.
os.environ.update({f"{name}_NUM_THREADS": "2" for name in ("OMP", "MKL", "OPENBLAS")})
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from mc_gguf import runtime as runtimes
from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.runtime import Runtime, packages, upstream
from tests.support import ROOT, TINY

NATIVE_FIXTURES = frozenset(("runtime", "unpatched_runtime", "tiny_gguf", "tiny_f32", "own_cache"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-runtime", action="store_true", help="Run what needs no built runtime.")
    parser.addoption(
        "--write-architectures", action="store_true", help="Write docs/reference/architectures.md anew."
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-runtime"):
        empty = tempfile.TemporaryDirectory()
        config.add_cleanup(empty.cleanup)
        for name in ("MC_GGUF_RUNTIME", "MC_GGUF_SOURCE", "MC_GGUF_BACKEND"):
            os.environ.pop(name, None)
        os.environ["MC_GGUF_CACHE"] = empty.name


class _NativeModule(pytest.Module):
    """A module that cannot be imported without a runtime has no tests that need none."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except RuntimeBuildError:
            return []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if parent.config.getoption("--without-runtime"):
        return _NativeModule.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what uses a fixture that needs the runtime."""
    for item in items:
        if NATIVE_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.native)
    if config.getoption("--without-runtime"):
        native = [item for item in items if item.get_closest_marker("native")]
        config.hook.pytest_deselected(items=native)
        items[:] = [item for item in items if not item.get_closest_marker("native")]


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
    """A cache in tmp_path/cache, which has the user's runtimes and source but nothing else yet."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("downloads", "runtimes"):
        (cache / name).symlink_to(upstream.cache_dir() / name, target_is_directory=True)
    monkeypatch.setenv("MC_GGUF_CACHE", str(cache))
    return cache


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
