"""The pin, the digest of the patch set, the cache, and imports from the pinned source only."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.runtime import packages, upstream

UPSTREAM = "package = p-q\nversion = 1\nsdist_sha256 = aa\ncommit = bb\ntree = cc\npatched_tree = dd\n"


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "UPSTREAM").write_text(UPSTREAM)
    (folder / "series").write_text("# in this order\n0001-a.patch\n\n0002-b.patch\n")
    (folder / "0001-a.patch").write_text("A")
    (folder / "0002-b.patch").write_text("B")
    monkeypatch.setattr(upstream, "patches_dir", lambda: folder)
    return folder


def test_pyproject_asks_for_the_pinned_version(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert f"llama-cpp-python=={upstream.pin().version}" in project["dependencies"]


def test_the_package_carries_the_repositorys_patches(repo_root: Path) -> None:
    assert upstream.patches_dir().resolve() == repo_root / "patches"


def test_a_package_without_patches_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upstream, "__file__", str(tmp_path / "upstream.py"))
    with pytest.raises(RuntimeBuildError, match="patch set is missing"):
        upstream.patches_dir()


def test_pin_reads_each_key(patches: Path) -> None:
    assert upstream.pin() == upstream.Upstream("p-q", "1", "aa", "bb", "cc", "dd")
    assert upstream.pin().sdist_name == "p_q-1.tar.gz"


def test_pin_names_missing_keys(patches: Path) -> None:
    (patches / "UPSTREAM").write_text("package = p\nversion = 1\n")
    with pytest.raises(RuntimeBuildError, match="lacks sdist_sha256, commit, tree, patched_tree"):
        upstream.pin()


def test_series_keeps_its_order_and_skips_comments(patches: Path) -> None:
    assert [path.name for path in upstream.series()] == ["0001-a.patch", "0002-b.patch"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0001-a.patch", "A2"),
        ("series", "0002-b.patch\n0001-a.patch\n"),
        ("series", "0001-a.patch\n"),
        ("src/mc.cpp", "int x;"),
    ],
)
def test_any_change_of_the_patch_set_changes_the_digest(patches: Path, name: str, content: str) -> None:
    before = upstream.patchset_digest()
    (patches / name).parent.mkdir(exist_ok=True)
    (patches / name).write_text(content)
    assert upstream.patchset_digest() != before


def test_the_digest_does_not_depend_on_comments_or_readme(patches: Path) -> None:
    before = upstream.patchset_digest()
    (patches / "series").write_text("0001-a.patch\n0002-b.patch\n")
    (patches / "README.md").write_text("about")
    assert upstream.patchset_digest() == before


def test_no_series_is_no_patches(patches: Path) -> None:
    (patches / "series").unlink()
    assert upstream.series() == []


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MC_GGUF_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert upstream.cache_dir() == tmp_path / "mc_gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert upstream.cache_dir() == Path.home() / ".cache" / "mc_gguf"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert upstream.cache_dir() == Path.home() / "Library" / "Caches" / "mc_gguf"
    monkeypatch.setenv("MC_GGUF_CACHE", str(tmp_path / "x"))
    assert upstream.cache_dir() == tmp_path / "x"


def test_source_dir_without_a_runtime_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MC_GGUF_CACHE", str(tmp_path))
    monkeypatch.delenv("MC_GGUF_SOURCE", raising=False)
    with pytest.raises(RuntimeBuildError, match="run: mc-gguf runtime build"):
        packages.source_dir()


def test_source_dir_refuses_what_is_no_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MC_GGUF_SOURCE", str(tmp_path))
    with pytest.raises(RuntimeBuildError, match="has no gguf-py"):
        packages.source_dir()


def _tree(folder: Path) -> Path:
    """A source tree with packages gguf and conversion, and a folder that must not become importable."""
    for name in ("gguf-py/gguf", "conversion", "common"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    return folder


def test_gguf_and_conversion_come_from_the_source_tree_only(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    code = (
        "import sys; path = list(sys.path); from mc_gguf.runtime import packages\n"
        "print(packages.load_conversion().__file__); print(packages.load_gguf().__file__)\n"
        "assert sys.path == path"
    )
    env = {**os.environ, "MC_GGUF_SOURCE": str(tree)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        str(tree / "conversion" / "__init__.py"),
        str(tree / "gguf-py" / "gguf" / "__init__.py"),
    ]


def test_another_gguf_in_the_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("gguf")
    other.__file__ = str(tmp_path / "elsewhere" / "gguf" / "__init__.py")
    monkeypatch.setitem(sys.modules, "gguf", other)
    monkeypatch.setenv("MC_GGUF_SOURCE", str(_tree(tmp_path / "tree")))
    with pytest.raises(RuntimeBuildError, match=r"already imported from .*elsewhere"):
        packages.load_gguf()
