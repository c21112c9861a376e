"""The build, end to end on a tiny stand-in for llama.cpp: fetched by pip, checked, patched, compiled, loaded.

The stand-in is a real source distribution with a real git directory inside, four C libraries and a CMake
project, so that everything but llama.cpp itself is what users run. Each way to fail is one test.
"""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mc_gguf import runtime
from mc_gguf.cli import main
from mc_gguf.common.errors import McError, RuntimeBuildError
from mc_gguf.runtime import builder as building
from mc_gguf.runtime import fetch as source
from mc_gguf.runtime import locate, packages, upstream
from mc_gguf.runtime.facts import render_facts, runtime_facts
from mc_gguf.runtime.shell import Log, git_env

CMAKE = """cmake_minimum_required(VERSION 3.14)
project(stand_in C CXX)
foreach(name ggml-base ggml-cpu ggml)
  add_library(${name} SHARED ggml.c)
endforeach()
add_library(llama SHARED llama.c)
target_link_libraries(llama ggml ggml-base ggml-cpu)
target_compile_definitions(llama PRIVATE MC_PATCHSET="${MC_PATCHSET}")
"""
FILES = {
    "CMakeLists.txt": CMAKE,
    "ggml.c": "int ggml_answer(void) { return 42; }\n",
    "llama.c": "int ggml_answer(void);\nint llama_answer(void) { return ggml_answer(); }\n",
    "gguf-py/gguf/__init__.py": "",
    "conversion/__init__.py": "",
    "docs/long.md": "not needed later\n",
    "include/llama.h": '#ifdef __cplusplus\nextern "C"\n#endif\nint llama_answer(void);\n',
    "tests/test-backend-ops.cpp": '#include "llama.h"\nint main() { return llama_answer() == 42 ? 0 : 1; }\n',
}
MAPPED_LIBRARIES = locate.mapped_libraries
PATCHSET_FUNCTION = "\nconst char * mc_patchset(void) { return MC_PATCHSET; }\n"
BACKEND = """def prepare_metadata_for_build_wheel(folder, settings=None):
    import os
    os.makedirs(os.path.join(folder, "stand_in-1.0.dist-info"))
    with open(os.path.join(folder, "stand_in-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: stand-in\\nVersion: 1.0\\n")
    return "stand_in-1.0.dist-info"
def build_wheel(folder, settings=None, metadata=None): raise NotImplementedError
"""


def git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=git_env(folder), check=True, capture_output=True, text=True
    ).stdout.strip()


@dataclass
class StandIn:
    """The stand-in upstream: `index` is where pip finds it, `patches` the patch set."""

    index: Path
    patches: Path
    repository: Path
    values: dict[str, str]

    def pin(self, **changes: str) -> None:
        self.values |= changes
        lines = [f"{key} = {value}\n" for key, value in self.values.items()]
        (self.patches / "UPSTREAM").write_text("".join(lines))

    @property
    def sdist(self) -> Path:
        return self.index / "stand_in-1.0.tar.gz"


def make_sdist(folder: Path, repository: Path) -> Path:
    """A source distribution like llama-cpp-python's: a git directory inside, with an unusable config."""
    top = folder / "stand_in-1.0"
    directory = top / source.GIT_DIRECTORY
    shutil.copytree(repository / ".git", directory)
    (directory / "config").write_text("[core]\n\tworktree = /nowhere\n[include]\n\tpath = /nowhere\n")
    (top / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (top / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
    (top / "backend.py").write_text(BACKEND)
    path = folder / "index" / "stand_in-1.0.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        archive.add(top, top.name)
    return path


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """Made once; tests get copies of the patch set (stand_in)."""
    folder = tmp_path_factory.mktemp("stand-in")
    repository = folder / "repository"
    for name, content in FILES.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(content)
    git(repository, "init", "-q", ".")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "base")
    commit, tree = git(repository, "rev-parse", "HEAD", "HEAD^{tree}").split()
    sdist = make_sdist(folder, repository)
    with (repository / "llama.c").open("a") as file:
        file.write(PATCHSET_FUNCTION)
    git(repository, "commit", "-q", "-a", "-m", "llama: say which patches are applied")
    patches = folder / "patches"
    git(repository, "format-patch", "-q", "-1", "--zero-commit", "--no-signature", "-o", patches)
    patch = next(patches.iterdir()).rename(patches / "0001-llama-say-patches.patch")
    (patches / "series").write_text(patch.name + "\n")
    values = {
        "package": "stand-in",
        "version": "1.0",
        "sdist_sha256": hashlib.sha256(sdist.read_bytes()).hexdigest(),
        "commit": commit,
        "tree": tree,
        "patched_tree": git(repository, "rev-parse", "HEAD^{tree}"),
    }
    return StandIn(sdist.parent, patches, repository, values)


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes the stand-ins' libraries out of this process again: tests of the real runtime may follow."""
    loaded: list[ctypes.CDLL] = []
    real = ctypes.CDLL

    def load(name: str) -> ctypes.CDLL:
        loaded.append(real(name))
        return loaded[-1]

    monkeypatch.setattr(ctypes, "CDLL", load)
    before = MAPPED_LIBRARIES()
    yield
    for library in loaded:
        _ctypes.dlclose(library._handle)
    assert MAPPED_LIBRARIES() == before


@pytest.fixture
def stand_in(master: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """An empty cache, and the stand-in as the upstream."""
    patches = tmp_path / "patches"
    shutil.copytree(master.patches, patches)
    copy = StandIn(master.index, patches, master.repository, dict(master.values))
    copy.pin()
    _use(copy, tmp_path / "cache", monkeypatch)
    return copy


def _use(stand_in: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "patches_dir", lambda: stand_in.patches)
    # Many stand-ins come into this one process; what is refused because of that has its own tests.
    monkeypatch.setattr(locate, "mapped_libraries", list)
    for name in ("MC_GGUF_RUNTIME", "MC_GGUF_BACKEND", "MC_GGUF_SOURCE", "MC_GGUF_QUIET", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MC_GGUF_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_in.index))


@pytest.fixture(scope="module")
def built_cache(master: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the patched and the unpatched stand-in built, for tests that only read it."""
    cache = tmp_path_factory.mktemp("built") / "cache"
    master.pin()
    with pytest.MonkeyPatch.context() as patch:
        _use(master, cache, patch)
        building.build(patched=True)
        building.build(patched=False)
    return cache


@pytest.fixture
def built(master: StandIn, built_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in as the upstream with both runtimes built; returns the cache."""
    _use(master, built_cache, monkeypatch)
    return built_cache


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def nothing_installed(cache: Path) -> bool:
    return not any((cache / "runtimes").glob("*")) if (cache / "runtimes").exists() else True


# The way it should go


def test_build_installs_libraries_and_the_needed_source(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    made = building.build()
    assert runtime.require() == made
    for name in ("llama", "ggml", "ggml-base", "ggml-cpu"):
        assert runtime.library_path(name).is_file()
    library = runtime.load(made)
    assert library.llama_answer() == 42
    assert runtime.load_ggml_base().ggml_answer() == 42
    assert {"gguf-py/gguf/__init__.py", "include/llama.h"} <= files(made.source_dir)
    assert "docs/long.md" not in files(made.source_dir)
    assert packages.source_dir() == made.source_dir
    err = capsys.readouterr().err
    assert "100 %" in err
    assert "elapsed" in err
    log = upstream.cache_dir() / "logs" / f"{made.path.name}.log"
    assert str(log) in err
    assert "cmake" in log.read_text()
    assert not any((upstream.cache_dir() / "work").iterdir())
    manifest = json.loads((made.path / locate.MANIFEST).read_text())
    assert manifest["patchset"] == upstream.patchset_digest()


def test_libraries_find_each_other_after_a_move(built: Path, tmp_path: Path) -> None:
    moved = tmp_path / "lib"
    shutil.copytree(runtime.require().lib_dir, moved, symlinks=True)
    code = f"import ctypes; print(ctypes.CDLL({str(moved / 'libllama.so')!r}).llama_answer()); "
    code += "print([line for line in open('/proc/self/maps') if 'libggml' in line][0])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("42\n")
    assert str(moved) in out


def test_a_second_build_runs_nothing(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, "run", None)
    monkeypatch.setenv("PATH", "")
    assert building.build() == runtime.require()


def test_force_builds_again_and_replaces(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    first = building.build()
    (first.path / "mark").touch()
    assert building.build(force=True) == first
    assert not (first.path / "mark").exists()
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_the_unpatched_build_lies_elsewhere_and_is_refused_as_runtime(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = runtime.require(patched=False)
    assert stock.path != runtime.require().path
    with pytest.raises(RuntimeBuildError, match="is not patched, but this mc-gguf needs patch set"):
        runtime.load(stock)
    monkeypatch.setenv("MC_GGUF_RUNTIME", str(stock.path))
    with pytest.raises(RuntimeBuildError, match="is not patched"):
        runtime.library_path("ggml-base")


def test_a_library_with_other_patches_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_GGUF_RUNTIME", str(runtime.require().path))
    monkeypatch.setattr(upstream, "patchset_digest", lambda: "0" * 64)
    with pytest.raises(
        RuntimeBuildError, match=r"has patch set .* needs patch set 000000000000; run: mc-gguf"
    ):
        runtime.library_path("llama")


def test_a_changed_patch_asks_for_a_new_build(stand_in: StandIn) -> None:
    before = building.build()
    (stand_in.patches / "src").mkdir()
    (stand_in.patches / "src" / "mc.h").write_text("// ours\n")
    with pytest.raises(RuntimeBuildError, match="is not built for this mc-gguf; run: mc-gguf runtime build"):
        runtime.library_path("llama")
    after = building.build()
    assert after.path != before.path
    assert (after.source_dir / "mc" / "mc.h").read_text() == "// ours\n"


def test_a_damaged_library_is_refused(stand_in: StandIn) -> None:
    made = building.build()
    path = made.library("llama").resolve()
    path.unlink()  # the build has loaded it: a new file, not new bytes in the mapped one
    path.write_bytes(b"no library")
    with pytest.raises(RuntimeBuildError, match="cannot load"):
        runtime.library_path("llama")
    made.library("ggml").unlink()
    with pytest.raises(
        RuntimeBuildError, match=r"libggml\.so is missing; run: mc-gguf runtime build --force"
    ):
        made.library("ggml")


def test_keys_differ_in_all_that_matters(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [locate.runtime_key(backend, patched) for backend in runtime.BACKENDS for patched in (True, False)]
    monkeypatch.setattr(locate, "_machine", lambda: "another CPU")
    keys.append(locate.runtime_key("cpu", True))
    monkeypatch.setattr(locate, "CMAKE_FLAGS", ("-DX=1",))
    keys.append(locate.runtime_key("cpu", True))
    stand_in.pin(sdist_sha256="0" * 64)
    keys.append(locate.runtime_key("cpu", True))
    assert len(set(keys)) == len(keys)


def test_the_preferred_backend_is_used_unless_another_is_named(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_GGUF_CACHE", str(tmp_path))
    for name in ("cpu", "vulkan"):
        folder = tmp_path / "runtimes" / locate.runtime_key(name, True)
        folder.mkdir(parents=True)
        (folder / locate.MANIFEST).touch()
    assert runtime.require().backend == "vulkan"
    monkeypatch.setenv("MC_GGUF_BACKEND", "cpu")
    assert runtime.require().backend == "cpu"
    monkeypatch.setenv("MC_GGUF_BACKEND", "tpu")
    with pytest.raises(RuntimeBuildError, match="unknown backend 'tpu'"):
        runtime.require()
    with pytest.raises(RuntimeBuildError, match="run: mc-gguf runtime build --backend cuda --unpatched"):
        runtime.require("cuda", patched=False)


def test_info_tells_what_is_built(built: Path) -> None:
    facts = runtime_facts()
    assert facts["built"]
    assert facts["backends"] == {"cpu": True, "cuda": False, "vulkan": False, "metal": False}
    assert facts["path"] == str(runtime.require().path)
    assert facts["patches"] == ["0001-llama-say-patches.patch"]
    text = render_facts(facts)
    assert "backends built    cpu" in text
    assert facts["path"] in text


def test_programs_are_compiled_against_the_runtime_and_cached(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = building.build_tests(runtime.require())
    assert subprocess.run([program], check=False).returncode == 0
    own = tmp_path / "own.cpp"
    own.write_text('#include "llama.h"\nint main() { return llama_answer() - 40; }\n')
    first = building.compile_program(runtime.require(), own, "own")
    assert subprocess.run([first], check=False).returncode == 2
    own.write_text("int main() { return 3; }\n")
    assert building.compile_program(runtime.require(), own, "own") != first
    own.write_text("int main() { return nothing; }\n")
    with pytest.raises(RuntimeBuildError, match=r"compiling own\.cpp failed"):
        building.compile_program(runtime.require(), own, "own")
    monkeypatch.setattr(Log, "run", None)
    assert building.build_tests(runtime.require()) == program


def test_the_command_builds_and_prints_paths(built: Path) -> None:
    lines = CliRunner().invoke(main, ["runtime", "build", "--unpatched", "--tests"]).stdout.splitlines()
    assert lines[0] == str(runtime.require(patched=False).path)
    assert Path(lines[1]).name.startswith("test-backend-ops-")


# What is missing


def _only(tools: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with these tools only."""
    folder.mkdir()
    for tool in tools:
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"cmake", "c++", "make"}, "git is not installed"),
        ({"git", "c++", "make"}, "cmake is not installed"),
        ({"git", "cmake", "make"}, r"no C\+\+ compiler is installed"),
        ({"git", "cmake", "c++"}, "neither make nor ninja is installed"),
    ],
)
def test_a_missing_tool_is_named(
    tools: set[str], message: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(tools, tmp_path / "bin", monkeypatch)
    result = CliRunner().invoke(main, ["runtime", "build"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    with pytest.raises(RuntimeBuildError, match=message):
        building.build()
    assert not upstream.cache_dir().exists()


@pytest.mark.parametrize(
    ("backend", "message"),
    [("cuda", "nvcc is not installed"), ("vulkan", "glslc is not installed"), ("metal", "is for macOS")],
)
def test_a_backend_without_its_toolkit_is_named(
    backend: str, message: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only({"git", "cmake", "c++", "make"}, tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(building, "_cuda_compiler", lambda: shutil.which("nvcc"))
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(RuntimeBuildError, match=message):
        building.build(backend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(RuntimeBuildError, match="unknown backend 'tpu': one of cpu, cuda, vulkan, metal"):
        building.build("tpu")


def test_a_wrong_cxx_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m32")
    with pytest.raises(RuntimeBuildError, match="CXX is 'no-such-compiler -m32', which is not installed"):
        building.build()


def test_no_pip_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeBuildError, match=r"has no pip to fetch llama.cpp with; run: .* -m ensurepip"):
        building.build()


def test_a_full_disk_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300 << 20))
    message = (
        r"has 300\.00 MiB free, but building llama\.cpp takes 1\.00 GiB; make room, or set MC_GGUF_CACHE"
    )
    with pytest.raises(McError, match=message):
        building.build()


def test_a_bare_machine_is_enough(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """git, cmake, make, a compiler and what comes with it: no ninja, no ccache."""
    compiler = {"cc", "c++", "as", "ld", "ar", "ranlib", "nm", "objcopy", "objdump", "strip"}
    _only({"git", "cmake", "make", "sh", "uname"} | compiler, tmp_path / "bin", monkeypatch)
    assert building.build() == runtime.require()
    assert "runtime cpu: 100 %" in capsys.readouterr().err


# What is wrong


def test_a_wrong_hash_is_refused_and_not_kept(stand_in: StandIn) -> None:
    stand_in.pin(sdist_sha256="0" * 64)
    with pytest.raises(RuntimeBuildError, match=r"has SHA-256 .*, expected 0000.* not the pinned release"):
        building.build()
    assert not any((upstream.cache_dir() / "downloads").iterdir())
    assert nothing_installed(upstream.cache_dir())


def test_a_damaged_download_in_the_cache_is_fetched_again(stand_in: StandIn, tmp_path: Path) -> None:
    path = upstream.cache_dir() / "downloads" / stand_in.sdist.name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    assert source.download(Log(tmp_path / "log")) == path
    assert path.read_bytes() == stand_in.sdist.read_bytes()


def test_pips_own_failure_is_reported_with_its_last_lines(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeBuildError, match=r"downloading stand-in 1\.0 with pip failed .* full log: "):
        building.build()
    assert "No matching distribution found" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["tree", "patched_tree"])
def test_another_tree_than_the_pinned_one_is_refused(key: str, stand_in: StandIn) -> None:
    stand_in.pin(**{key: "1" * 40})
    with pytest.raises(RuntimeBuildError, match=r"source is git tree .* patches/UPSTREAM has 1111"):
        building.build()
    assert nothing_installed(upstream.cache_dir())


def test_an_unknown_commit_is_refused(stand_in: StandIn) -> None:
    stand_in.pin(commit="1" * 40)
    with pytest.raises(RuntimeBuildError, match=r"checking out llama\.cpp failed"):
        building.build()


def test_a_patch_that_does_not_apply_exactly_is_refused(stand_in: StandIn) -> None:
    path = stand_in.patches / "0001-llama-say-patches.patch"
    path.write_text(path.read_text().replace(" int ggml_answer(void);", " int ggml_answer();"))
    with pytest.raises(RuntimeBuildError, match=r"applying the patches to llama\.cpp failed"):
        building.build()
    assert nothing_installed(upstream.cache_dir())


def test_patches_apply_whatever_the_users_git_is_set_to(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside another repository, with signing, hooks and line-end conversion configured, and GIT_DIR set."""
    home = tmp_path / "home"
    (home / "hooks").mkdir(parents=True)
    (home / "hooks" / "applypatch-msg").write_text("#!/bin/sh\nexit 1\n")
    (home / "hooks" / "applypatch-msg").chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[commit]\n\tgpgsign = true\n[core]\n\thooksPath = {home / 'hooks'}\n\tautocrlf = true\n"
    )
    monkeypatch.setenv("HOME", str(home))
    git(tmp_path, "init", "-q", ".")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    log = Log(tmp_path / "log")
    tree = source.prepare(tmp_path / "work", True, log)
    assert "mc_patchset" in (tree / "llama.c").read_text()
    assert "\r" not in (tree / "llama.c").read_bytes().decode()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no archive", "is damaged"), (None, "does not carry llama.cpp's git directory")],
)
def test_a_source_distribution_of_another_kind_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "stand_in-1.0.tar.gz"
    if content:
        path.write_bytes(content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("stand_in-1.0/README"), io.BytesIO())
    with pytest.raises(RuntimeBuildError, match=message):
        source.unpack(path, tmp_path / "source")


def test_unpacking_never_leaves_its_folder(stand_in: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "stand_in-1.0.tar.gz"
    root = f"stand_in-1.0/{source.GIT_DIRECTORY}"
    with tarfile.open(path, "w:gz") as archive:
        for name in (f"{root}/HEAD", f"{root}/objects/../../../../../../out", f"{root}/hooks/post-checkout"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo(f"{root}/objects")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    source.unpack(path, tmp_path / "source")
    assert files(tmp_path / "source") == {".git/HEAD", ".git/config"}
    assert not (tmp_path / "out").exists()


# Interrupted and failed builds


def test_a_failed_compilation_shows_its_last_lines_and_can_be_continued(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CFLAGS", "-Dllama_answer=0")
    with pytest.raises(RuntimeBuildError, match=r"compiling llama\.cpp failed .* full log: .*\.log"):
        building.build()
    assert "error: " in capsys.readouterr().err
    assert nothing_installed(upstream.cache_dir())
    monkeypatch.delenv("CFLAGS")
    monkeypatch.setattr(source, "download", None)  # the prepared source is used again
    assert building.build() == runtime.require()


def test_an_interrupted_build_leaves_no_runtime(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "_manifest", interrupt)
        assert CliRunner().invoke(main, ["runtime", "build"]).exit_code == 130
    assert nothing_installed(upstream.cache_dir())
    assert runtime.find() is None
    assert building.build() == runtime.require()


def test_leftovers_of_a_killed_build_are_no_runtime_and_are_removed(stand_in: StandIn) -> None:
    runtimes = upstream.cache_dir() / "runtimes"
    leftover = runtimes / f".{locate.runtime_key('cpu', True)}.123.tmp"
    (leftover / "lib").mkdir(parents=True)
    (runtimes / locate.runtime_key("cpu", True)).mkdir()  # no manifest
    assert runtime.find() is None
    building.build()
    assert not leftover.exists()


def test_a_second_build_of_the_same_key_waits(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    task = building.Build("cpu", True, 1)
    entered = threading.Event()

    def second() -> None:
        with building.locked(task):
            entered.set()

    with building.locked(task):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        assert not entered.is_set()
    thread.join(timeout=10)
    assert entered.is_set()
    assert "another process is building this runtime" in capsys.readouterr().err


def test_the_build_that_waited_uses_what_the_other_built(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([False])
    real = Path.is_file
    manifest = runtime.require().path / locate.MANIFEST
    monkeypatch.setattr(Path, "is_file", lambda path: next(found, True) if path == manifest else real(path))
    monkeypatch.setattr(building, "_build_locked", None)
    assert building.build().path == manifest.parent


def test_a_program_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeBuildError, match="building: cannot run no-such-program: No such file"):
        Log(tmp_path / "log").run("building", ["no-such-program"], tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[12/78] Building C object ggml/src/CMakeFiles/ggml-base.dir/ggml.c.o", ("12", "78")),
        ("[ 15%] Building CXX object src/CMakeFiles/llama.dir/llama.cpp.o", ("15", None)),
        ("[100%] Linking CXX shared library libllama.so", ("100", None)),
        ("warning: [1/2] of something", None),
    ],
)
def test_steps_of_ninja_and_make_are_understood(line: str, expected: tuple[str, str | None] | None) -> None:
    match = building.STEP.match(line)
    assert (match.groups()[:2] if match else None) == expected


def test_libraries_from_elsewhere_are_refused(tmp_path: Path) -> None:
    locate.check_loaded([tmp_path / "libggml.so"], tmp_path)
    with pytest.raises(RuntimeBuildError, match=r"/usr/lib/libggml\.so is loaded in this process"):
        locate.check_loaded([tmp_path / "libllama.so", Path("/usr/lib/libggml.so")], tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_what_is_loaded_from_elsewhere_is_seen_and_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = runtime.require().library("ggml").resolve()
    ctypes.CDLL(str(library))
    assert library in MAPPED_LIBRARIES()
    others = [path for path in MAPPED_LIBRARIES() if path.parent != library.parent]
    monkeypatch.setattr(locate, "mapped_libraries", lambda: [*others, tmp_path / "libggml.so"])
    with pytest.raises(RuntimeBuildError, match="is loaded in this process"):
        runtime.library_path("ggml")
