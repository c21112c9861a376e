"""Build the runtime: source -> cmake -> <cache>/runtimes/<key>, which appears complete or not at all.

The work is done in <cache>/work/<key>. An interrupted or failed build leaves that folder, so that the next
build continues with the object files in it; a successful one removes it. At the end the libraries and what is
needed later of the source tree (gguf-py, the converter, headers) are copied beside the final place and
renamed into it. A lock file keeps two builds of the same key apart. llama.cpp's build uses ccache where it is
installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.common.files import check_space
from mc_gguf.common.machine import usable_cores
from mc_gguf.common.progress import Progress, progress
from mc_gguf.runtime import fetch as sources
from mc_gguf.runtime import upstream
from mc_gguf.runtime.locate import (
    BACKEND_FLAGS,
    BACKENDS,
    CMAKE_FLAGS,
    LIBRARIES,
    MANIFEST,
    Runtime,
    check_patchset,
    runtime_key,
)
from mc_gguf.runtime.shell import Log

BUILD_BYTES = 1 << 30  # what a build takes on the disk
# What later steps read from the source tree: gguf-py, the converter, headers, sources of test programs.
KEPT_SOURCE = (
    "conversion",
    "convert_hf_to_gguf.py",
    "ggml/include",
    "ggml/src",
    "gguf-py",
    "include",
    "LICENSE",
    "mc",
    "models/templates",
    "src",
    "tests/test-backend-ops.cpp",
    "tests/test-llama-archs.cpp",
)
STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)\]|%\])\s*(.*)")  # ninja's [12/78] or make's [ 15%]
COMPILERS = ("c++", "g++", "clang++")
PROGRAM_INCLUDES = ("ggml/include", "ggml/src", "include", "src", "mc/include")


@dataclass(frozen=True)
class Build:
    """One build to do, and where its parts are."""

    backend: str
    patched: bool
    jobs: int

    @property
    def key(self) -> str:
        return runtime_key(self.backend, self.patched)

    @property
    def work(self) -> Path:
        return upstream.cache_dir() / "work" / self.key

    @property
    def target(self) -> Path:
        return upstream.cache_dir() / "runtimes" / self.key

    @property
    def log(self) -> Log:
        return Log(upstream.cache_dir() / "logs" / f"{self.key}.log")

    def runtime(self) -> Runtime:
        return Runtime(self.target, self.backend, self.patched)


def build(
    backend: str = "cpu",
    jobs: int | None = None,
    force: bool = False,
    patched: bool = True,
    quiet: bool = False,
) -> Runtime:
    """Build the runtime unless it is there already, and return it.

    `jobs` files are compiled at once (None: one for each usable core); `force` builds again from nothing;
    `quiet` shows no progress on stderr.
    Raises RuntimeBuildError for an unknown backend, a missing tool, a wrong hash, or a step that failed (the
    message names the log), and McError for a full disk.
    """
    if backend not in BACKENDS:
        raise RuntimeBuildError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    task = Build(backend, patched, jobs or usable_cores())
    if not force and (task.target / MANIFEST).is_file():
        return task.runtime()
    check_tools(backend)
    remedy = "make room, or set MC_GGUF_CACHE to a folder on another disk"
    check_space(upstream.cache_dir(), BUILD_BYTES, "building llama.cpp", remedy)
    with locked(task):
        if force:
            shutil.rmtree(task.work, ignore_errors=True)
        elif (task.target / MANIFEST).is_file():  # another process built it while this one waited
            return task.runtime()
        _build_locked(task, quiet)
    return task.runtime()


def _build_locked(task: Build, quiet: bool) -> None:
    task.work.mkdir(parents=True, exist_ok=True)
    task.log.path.parent.mkdir(parents=True, exist_ok=True)
    task.log.path.write_text(f"{task.key}\n")
    with progress(f"runtime {task.backend}", quiet=quiet) as bar:
        bar.say(f"log: {task.log.path}")
        bar.say("fetching, checking and patching the source")
        tree = sources.prepare(task.work, task.patched, task.log)
        bar.say("configuring")
        configure(task, tree)
        compile_libraries(task, bar)
        install(task, tree)
        bar.say(f"installed: {task.target}")
    shutil.rmtree(task.work, ignore_errors=True)


def check_tools(backend: str) -> None:
    """Raises a RuntimeBuildError that names the first missing tool, before anything is downloaded."""
    for tool in ("git", "cmake"):
        if shutil.which(tool) is None:
            raise RuntimeBuildError(
                f"{tool} is not installed, and building llama.cpp needs it: install {tool}"
            )
    cxx_compiler()
    if shutil.which("ninja") is None and shutil.which("make") is None:
        raise RuntimeBuildError(
            "neither make nor ninja is installed, and building llama.cpp needs one: install make"
        )
    if backend == "cuda" and not _cuda_compiler():
        raise RuntimeBuildError(
            "nvcc is not installed, and the cuda backend needs it: install the CUDA toolkit"
        )
    if backend == "vulkan" and shutil.which("glslc") is None:
        raise RuntimeBuildError(
            "glslc is not installed, and the vulkan backend needs it: install glslc and libvulkan-dev"
        )
    if backend == "metal" and sys.platform != "darwin":
        raise RuntimeBuildError("the metal backend is for macOS: choose cpu, cuda or vulkan")
    if importlib.util.find_spec("pip") is None:
        raise RuntimeBuildError(
            f"{sys.executable} has no pip to fetch llama.cpp with; run: {sys.executable} -m ensurepip"
        )


def cxx_compiler() -> str:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ that is installed."""
    wanted = os.environ.get("CXX")
    for name in [wanted.split()[0]] if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    what = f"CXX is {wanted!r}, which is not" if wanted else "no C++ compiler is"
    raise RuntimeBuildError(f"{what} installed, and building llama.cpp needs one: install g++ or clang")


def _cuda_compiler() -> str | None:
    return (
        os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


@contextlib.contextmanager
def locked(task: Build) -> Iterator[None]:
    """Hold the lock of this build's key: a second process that builds the same waits here."""
    path = upstream.cache_dir() / "locks" / task.key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("another process is building this runtime; waiting for it\n")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_env(task: Build) -> dict[str, str]:
    """The environment of cmake: ccache sees paths relative to the work folder, so that builds of different
    keys share their objects.
    """
    return {"CCACHE_BASEDIR": str(task.work), "CCACHE_NOHASHDIR": "1", **os.environ}


def configure(task: Build, tree: Path) -> None:
    """Run cmake's configuration in work/build, for Ninja where that is installed."""
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    flags = [*CMAKE_FLAGS, *BACKEND_FLAGS[task.backend], f"-DCMAKE_INSTALL_RPATH={origin}"]
    if task.backend == "cuda":
        flags.append(f"-DCMAKE_CUDA_COMPILER={_cuda_compiler()}")  # cmake alone looks only on PATH
    if task.patched:
        flags.append(f"-DMC_PATCHSET={upstream.patchset_digest()}")
    folder = task.work / "build"
    # What cmake --fresh does from 3.24 on: an interrupted build may remember a compiler that was replaced.
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
    command: list[str | Path] = ["cmake", "-S", tree, "-B", folder, "-G", generator, *flags]
    task.log.run("configuring llama.cpp with cmake", command, task.work, build_env(task))


def compile_libraries(task: Build, bar: Progress) -> None:
    """Build the target `llama` with its libraries, showing step, percent and elapsed time."""

    def show(line: str) -> None:
        if match := STEP.match(line):
            done, total, what = match.groups()
            bar.update(float(done), float(total or 100), note=what.rsplit("/", 1)[-1])

    bar.unit = "steps"
    command: list[str | Path] = ["cmake", "--build", task.work / "build", "--target", "llama"]
    command += ["--parallel", str(task.jobs)]
    task.log.run("compiling llama.cpp", command, task.work, build_env(task), show)


def install(task: Build, tree: Path) -> None:
    """Copy the libraries and the kept source beside the final place, check them, and rename the whole."""
    staging = task.target.with_name(f".{task.key}.{os.getpid()}.tmp")
    old = task.target.with_name(f".{task.key}.{os.getpid()}.old.tmp")
    _remove_leftovers(task)
    try:
        _copy_libraries(task.work / "build", staging / "lib")
        _copy_source(tree, staging / "source")
        staged = Runtime(staging, task.backend, task.patched)
        check_library(task, staged)
        (staging / MANIFEST).write_text(json.dumps(_manifest(task), indent=1, sort_keys=True) + "\n")
        if task.target.exists():
            task.target.rename(old)
        staging.rename(task.target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_library(task: Build, staged: Runtime) -> None:
    """Load the new libllama in a process of its own. A patched one must report our patch set."""
    path = staged.library("llama")
    code = (
        "import ctypes, sys\nf = getattr(ctypes.CDLL(sys.argv[1]), 'mc_patchset', None)\n"
        "if f: f.restype = ctypes.c_char_p; print(f().decode())"
    )
    found = task.log.run("loading the new libllama", [sys.executable, "-c", code, path], task.work).strip()
    if task.patched:
        check_patchset(path, found)


def _remove_leftovers(task: Build) -> None:
    """Remove staging folders of killed builds of this key (we hold the lock, so no such build is alive)."""
    for path in task.target.parent.glob(f".{task.key}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _copy_libraries(folder: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for pattern in ("lib*.so*", "lib*.dylib"):
        for path in folder.rglob(pattern):
            shutil.copy2(path, target / path.name, follow_symlinks=False)


def _copy_source(tree: Path, target: Path) -> None:
    for name in KEPT_SOURCE:
        origin = tree / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, target / name)
        elif origin.is_file():
            shutil.copy2(origin, target / name)


def _manifest(task: Build) -> dict[str, str | bool | list[str]]:
    pin = upstream.pin()
    return {
        "backend": task.backend,
        "commit": pin.commit,
        "flags": [*CMAKE_FLAGS, *BACKEND_FLAGS[task.backend]],
        "machine": platform.machine(),
        "patched": task.patched,
        "patchset": upstream.patchset_digest() if task.patched else "",
        "version": pin.version,
    }


def program_command(
    compiler: str | Path, tree: Path, lib: Path, libraries: Sequence[str], source: Path, program: Path
) -> list[str | Path]:
    """The command that compiles a C++17 program against llama.cpp's headers in `tree`, private ones too, and
    the `libraries` of the folder `lib`, each before those that it needs. The program's path is the last word.
    """
    includes = [f"-I{tree / folder}" for folder in PROGRAM_INCLUDES]
    links = [f"-L{lib}", f"-Wl,-rpath,{lib}", *(f"-l{library}" for library in libraries)]
    return [compiler, "-O2", "-std=c++17", "-pthread", *includes, source, *links, "-o", program]


def compile_program(
    runtime: Runtime, source: Path, name: str, libraries: Sequence[str] = (), headers: Path | None = None
) -> Path:
    """Compile a C++17 program against the runtime's headers and libraries, and `libraries` and the folder
    `headers` besides; returns its path in the runtime's `bin`, where it is kept under a hash of its source.

    This is for tests and benchmarks: `source` may include ggml's and llama.cpp's headers, private ones too.
    """
    folder = runtime.path / "bin"
    linked = (*libraries, *reversed(LIBRARIES))
    unnamed = program_command(
        cxx_compiler(), runtime.source_dir, runtime.lib_dir, linked, source, folder / name
    )
    if headers is not None:
        unnamed[1:1] = [f"-I{headers}"]
    digest = hashlib.sha256(source.read_bytes() + " ".join(map(str, unnamed)).encode()).hexdigest()[:12]
    program = folder / f"{name}-{digest}"
    if program.is_file():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_name(f".{program.name}.{os.getpid()}.tmp")
    log = Log(upstream.cache_dir() / "logs" / f"{program.name}.log")
    log.path.parent.mkdir(parents=True, exist_ok=True)
    log.run(f"compiling {source.name}", [*unnamed[:-1], unfinished], source.parent)
    unfinished.replace(program)
    return program


def build_tests(runtime: Runtime) -> Path:
    """Compile llama.cpp's test-backend-ops, with our cases, and return its path."""
    return compile_program(runtime, runtime.source_dir / "tests" / "test-backend-ops.cpp", "test-backend-ops")
