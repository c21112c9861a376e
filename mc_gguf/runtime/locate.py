"""Find the installed runtime and load its libraries, after checking that they carry exactly our patch set.

A runtime lies in <cache>/runtimes/<key>, where the key is a hash of everything that its bytes depend on
(runtime_key). A changed patch, flag or CPU therefore leads to another directory, never to a stale library.
The check on loading does not trust the directory's name: libllama exports mc_patchset(), and what that
returns must equal the digest computed from the patches that this package carries.

Environment: MC_GGUF_BACKEND picks one of several built backends; MC_GGUF_RUNTIME names a directory to use
instead of the cache (a runtime directory or a folder of libraries; the digest is checked all the same).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.common.machine import brief_waits
from mc_gguf.runtime import upstream

BACKENDS: tuple[str, ...] = ("cpu", "cuda", "vulkan", "metal")
PREFERENCE: tuple[str, ...] = ("metal", "cuda", "vulkan", "cpu")  # the first one that is built is used
LIBRARIES: tuple[str, ...] = ("ggml-base", "ggml-cpu", "ggml", "llama")
MANIFEST = "runtime.json"  # written last: a directory without it is no runtime

# Stock defaults but for what we do not ship; the same for the patched and the reference build.
CMAKE_FLAGS: tuple[str, ...] = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_COMMON=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_ALL_WARNINGS=OFF",
)
BACKEND_FLAGS: dict[str, tuple[str, ...]] = {
    "cpu": ("-DGGML_METAL=OFF",),
    "cuda": ("-DGGML_CUDA=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "metal": ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"),
}


@dataclass(frozen=True)
class Runtime:
    """An installed runtime; `backend` is "?" where MC_GGUF_RUNTIME named it."""

    path: Path
    backend: str
    patched: bool

    @property
    def lib_dir(self) -> Path:
        return self.path / "lib" if (self.path / "lib").is_dir() else self.path

    @property
    def source_dir(self) -> Path:
        return self.path / "source"

    def library(self, name: str) -> Path:
        """The path of lib<name>; `name` is one of LIBRARIES or a backend's library such as "ggml-vulkan"."""
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        path = self.lib_dir / f"lib{name}{suffix}"
        if not path.is_file():
            raise RuntimeBuildError(f"{path} is missing; {upstream.BUILD_HINT} --force")
        return path


def runtime_key(backend: str, patched: bool) -> str:
    """Hash of what a build depends on: upstream, patches, backend, flags, and the CPU it is built for."""
    patches = upstream.patchset_digest() if patched else "unpatched"
    parts = (upstream.pin().sdist_sha256, patches, backend, *CMAKE_FLAGS, *BACKEND_FLAGS[backend], _machine())
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return f"{backend}-{'patched' if patched else 'unpatched'}-{digest}"


@functools.cache
def _machine() -> str:
    """System, architecture and CPU features: a native build runs only where these are the same."""
    features = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), features)
    return f"{platform.system()} {platform.machine()} {' '.join(sorted(features.split()))}"


def find(backend: str | None = None, patched: bool = True) -> Runtime | None:
    """The runtime installed for this package and machine, or None. Without `backend`, that of the first built
    backend in PREFERENCE. Raises RuntimeBuildError for an unknown backend.
    """
    override = os.environ.get("MC_GGUF_RUNTIME")
    if override and patched and backend is None:
        return Runtime(Path(override), "?", True)
    wanted = backend or os.environ.get("MC_GGUF_BACKEND")
    if wanted and wanted not in BACKENDS:
        raise RuntimeBuildError(f"unknown backend {wanted!r}: one of {', '.join(BACKENDS)}")
    for name in [wanted] if wanted else PREFERENCE:
        path = upstream.cache_dir() / "runtimes" / runtime_key(name, patched)
        if (path / MANIFEST).is_file():
            return Runtime(path, name, patched)
    return None


def require(backend: str | None = None, patched: bool = True) -> Runtime:
    """find(), but without a runtime it raises a RuntimeBuildError that says what to run."""
    if found := find(backend, patched):
        return found
    options = (f" --backend {backend}" if backend else "") + ("" if patched else " --unpatched")
    what = f"the {'patched' if patched else 'unpatched'} llama.cpp runtime"
    raise RuntimeBuildError(f"{what} is not built for this mc-gguf; {upstream.BUILD_HINT}{options}")


def library_path(name: str) -> Path:
    """The path of lib<name> of the patched runtime; `name` is one of llama, ggml, ggml-base, ggml-cpu.

    The runtime is loaded first, so that nobody gets the path of an unpatched or differently patched library.
    Raises RuntimeBuildError, like load().
    """
    runtime = require()
    load(runtime)
    return runtime.library(name)


def load_ggml_base() -> ctypes.CDLL:
    """libggml-base of the patched runtime: types and quantizers."""
    return ctypes.CDLL(str(library_path("ggml-base")))


def check_struct(name: str, declared: type[ctypes.Structure], library: ctypes.CDLL | None = None) -> None:
    """RuntimeBuildError unless `declared` is as large as the struct `name` is in libllama (mc_sizeof)."""
    library = library or ctypes.CDLL(str(library_path("llama")))
    library.mc_sizeof.argtypes, library.mc_sizeof.restype = [ctypes.c_char_p], ctypes.c_size_t
    found, expected = library.mc_sizeof(name.encode()), ctypes.sizeof(declared)
    if found != expected:
        raise RuntimeBuildError(
            f"struct {name} has {found} bytes in {library._name}, but this mc-gguf declares {expected}; "
            f"{upstream.BUILD_HINT} --force"
        )


def load(runtime: Runtime) -> ctypes.CDLL:
    """libllama of a patched runtime, loaded.

    Raises RuntimeBuildError when it carries another patch set or none, and when another libggml is in the
    process: the dynamic linker goes by the library's name, so our libllama would silently be bound to that
    one.
    """
    path = runtime.library("llama")
    check_loaded(mapped_libraries(), runtime.lib_dir)
    try:
        with brief_waits():  # libggml-cpu brings OpenMP along
            library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeBuildError(f"cannot load {path} ({error}); {upstream.BUILD_HINT} --force") from error
    check_patchset(path, _patchset(library))
    return library


def check_patchset(path: Path, found: str | None) -> None:
    """RuntimeBuildError unless `found`, which the library at `path` reports, is our patch set's digest."""
    expected = upstream.patchset_digest()
    if found != expected:
        what = f"has patch set {found[:12]}" if found else "is not patched"
        needs = f"but this mc-gguf needs patch set {expected[:12]}"
        raise RuntimeBuildError(f"{path} {what}, {needs}; {upstream.BUILD_HINT}")


def _patchset(library: ctypes.CDLL) -> str | None:
    """The patch digest that the library reports; None for a stock one."""
    try:
        function = library.mc_patchset
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    function.argtypes = []
    value = function()
    return value.decode() if value else None


def use_in_llama_cpp() -> ModuleType:
    """Import llama_cpp on the checked patched libraries and return it.

    llama_cpp takes libllama from LLAMA_CPP_LIB_PATH when it is imported. Raises RuntimeBuildError when it
    was imported before with other libraries, or when any other libllama or libggml is in the process: two
    copies of ggml have two sets of globals, and which one a call reaches depends on the order of loading.
    """
    runtime = require()
    load(runtime)
    if "llama_cpp" not in sys.modules:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(runtime.lib_dir)
    module = importlib.import_module("llama_cpp")
    library: Any = importlib.import_module("llama_cpp.llama_cpp")._lib
    check_loaded([Path(library._name), *mapped_libraries()], runtime.lib_dir)
    _provide_ggml_module(runtime)
    return module


def _provide_ggml_module(runtime: Runtime) -> None:
    """Put a module with our libggml in the place of llama_cpp._ggml before anybody imports that one: it loads
    libggml from the package's own folder, whatever LLAMA_CPP_LIB_PATH says. Nothing in llama_cpp imports it.
    """
    name = "llama_cpp._ggml"
    if name not in sys.modules:
        module = ModuleType(name)
        module.libggml = ctypes.CDLL(str(runtime.library("ggml")))  # type: ignore[attr-defined]
        sys.modules[name] = module


def check_loaded(libraries: Iterable[Path], lib_dir: Path) -> None:
    """RuntimeBuildError when one of the loaded llama.cpp libraries is not from lib_dir."""
    for path in libraries:
        if path.resolve().parent != lib_dir.resolve():
            raise RuntimeBuildError(
                f"{path} is loaded in this process, but mc-gguf needs the libraries in {lib_dir}: "
                "import Llama from mc_gguf before anything imports llama_cpp"
            )


def mapped_libraries() -> list[Path]:
    """The libllama and libggml* files that are mapped into this process (Linux; elsewhere none are seen)."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    lines = os.fsdecode(maps.read_bytes()).splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return sorted(Path(file) for file in files if Path(file).name.startswith(("libllama.", "libggml")))
