"""Upstream's own tests with our patches: llama.cpp's ctest, its test of the ops, those of llama-cpp-python.

    make test-upstream
    python -m tools.upstream_tests --list                # what runs, what is left out and why
    python -m tools.upstream_tests --only ops

Built are only the tests, in <cache>/upstream-tests, by the compiler that `mc-gguf runtime build` would take;
what is built already is not built again. The ops are MUL_MAT_ID and those that our patches add, on the CPU,
which is compared with itself: that results are right is what tests/native checks.
llama-cpp-python's tests run against the library of `mc-gguf runtime build`, with the vocabularies that come
with llama.cpp's source. Left out, and listed at the end, is what has to download a model. Exit code 1: a test
failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mc_gguf import runtime
from mc_gguf.common.errors import McError
from mc_gguf.runtime import fetch, upstream
from mc_gguf.runtime.builder import cxx_compiler
from mc_gguf.runtime.shell import Log
from tools.common import run_tool
from tools.compilers import source_tree

FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_TOOLS=ON",  # one of them is the library mtmd, which has tests
    "-DLLAMA_BUILD_SERVER=ON",  # test-chat links a library of it
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
# By the op that a case ends in; the cases of the last three have our other ops inside.
OPS = ("MUL_MAT_ID", "MUL_MAT_ID_GROUPED", "MC_COUNT", "MC_MASK_WEIGHTS", "MC_QK_RECEIVED")
DOWNLOAD = "test-download-model"  # the fixture of tests that need a model
SERVER = {"test-arg-parser": "makes a request to a server on the Internet"}
REASONS = {  # of ctest's labels
    "model": "needs a model that it would download",
    "python": "compares with Python's jinja2, which is not among our dependencies",
}
SUITES = ("ctest", "ops", "python")


@dataclass(frozen=True)
class Test:
    """A test of ctest: its name, the target that builds it, and why it is left out ("": it is not)."""

    name: str
    target: str
    reason: str = ""


@dataclass(frozen=True)
class Build:
    """The folder of the build, its source, and its log."""

    tree: Path
    folder: Path
    log: Log
    jobs: int

    def configure(self) -> None:
        generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
        compiler = f"-DCMAKE_CXX_COMPILER={cxx_compiler()}"
        command: list[str | Path] = ["cmake", "-S", self.tree, "-B", self.folder, "-G", generator]
        command += [compiler, *FLAGS]
        self.log.run("configuring with cmake", command, self.folder, self._env())

    def make(self, targets: Sequence[str]) -> None:
        command: list[str | Path] = ["cmake", "--build", self.folder, "--parallel", str(self.jobs)]
        command += ["--target", *targets]
        self.log.run("compiling the tests", command, self.folder, self._env())

    def tests(self) -> list[Test]:
        """All tests of ctest, whose JSON has no command for what is not built: its file has."""
        command = ["ctest", "--test-dir", str(self.folder), "--show-only=json-v1"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        added = re.findall(
            r'^add_test\(\[=\[(.*?)\]=\] "([^"]+)"',
            (self.folder / "tests" / "CTestTestfile.cmake").read_text(),
            re.MULTILINE,
        )
        programs = {name: Path(program) for name, program in added}
        return [_test(entry, programs[entry["name"]], self.folder / "bin") for entry in found["tests"]]

    def _env(self) -> dict[str, str]:
        return {"CCACHE_BASEDIR": str(upstream.cache_dir()), "CCACHE_NOHASHDIR": "1", **os.environ}


def _test(entry: dict[str, Any], program: Path, built: Path) -> Test:
    """`entry` of ctest's JSON; `built` is the folder of the programs that are compiled."""
    properties = {p["name"]: p["value"] for p in entry.get("properties", ())}
    reason = next((REASONS[x] for x in properties.get("LABELS", ()) if x in REASONS), "")
    if entry["name"] == DOWNLOAD or DOWNLOAD in properties.get("FIXTURES_REQUIRED", ()):
        reason = REASONS["model"]
    elif entry["name"] in SERVER:
        reason = SERVER[entry["name"]]
    elif program.parent != built:
        reason = "needs vocabularies that it would download"
    return Test(entry["name"], program.name, reason)


def run_ctest(build: Build, tests: Sequence[Test]) -> bool:
    """Run the tests that are not left out; there must be some."""
    chosen = "|".join(re.escape(test.name) for test in tests if not test.reason)
    if not chosen:
        return False
    command = ["ctest", "--test-dir", str(build.folder), "--output-on-failure", "-R", f"^({chosen})$"]
    return subprocess.run([*command, "--timeout", "1200"], check=False).returncode == 0


def run_ops(build: Build) -> bool:
    """test-backend-ops for the ops that our patches touch; every op must have cases."""
    ok = True
    for op in OPS:
        command = [str(build.folder / "bin" / "test-backend-ops"), "test", "-o", op, "-b", "CPU"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        last = next((x for x in done.stdout.splitlines() if "tests passed" in x), "no cases")
        click.echo(f"test-backend-ops {op}: {last.strip()}")
        match = re.search(r"(\d+)/(\d+) tests passed", last)
        if done.returncode != 0 or match is None or match[1] != match[2] or match[2] == "0":
            ok = False
            click.echo(done.stdout[-2000:] + done.stderr[-2000:])
    return ok


def unpack_python(tree: Path, folder: Path) -> None:
    """Put llama-cpp-python's tests into a folder that looks like its checkout."""
    shutil.rmtree(folder, ignore_errors=True)  # an older version has other tests
    folder.mkdir(parents=True)
    with tarfile.open(fetch.download(Log(folder / "log"))) as archive:
        for member in archive:
            parts = Path(member.name).parts[1:]
            if parts[:1] == ("tests",) and member.isfile() and (source := archive.extractfile(member)):
                (folder / Path(*parts)).parent.mkdir(parents=True, exist_ok=True)
                (folder / Path(*parts)).write_bytes(source.read())
    (folder / "vendor").mkdir(exist_ok=True)
    (folder / "vendor" / "llama.cpp").symlink_to(tree)


def run_python(folder: Path) -> bool:
    """llama-cpp-python's tests against our library."""
    skipped = left_out_of_python(folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", ".", "tests", *(f"--deselect={name}" for name in skipped)]
    env = os.environ | {"LLAMA_CPP_LIB_PATH": str(runtime.require().lib_dir), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=False, cwd=folder, env=env).returncode == 0


def left_out_of_python(folder: Path) -> list[str]:
    """Node ids of the tests of llama-cpp-python that take a fixture with a model."""
    found = []
    for path in sorted((folder / "tests").glob("test_*.py")):
        for name, parameters in re.findall(r"^def (test_\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE):
            if "model_path" in parameters:
                found.append(f"tests/{path.name}::{name}")
    return found


def lines_of_list(tests: Sequence[Test], folder: Path) -> Iterator[str]:
    for test in tests:
        yield f"ctest   {test.name:<36}{test.reason and 'left out: ' + test.reason}".rstrip()
    for op in OPS:
        yield f"ops     {op}"
    for name in left_out_of_python(folder):
        yield f"python  {name:<84}left out: {REASONS['model']}"


@click.command(help=__doc__)
@click.option("--only", "suites", multiple=True, type=click.Choice(SUITES), help="[default: all]")
@click.option("--list", "only_list", is_flag=True, help="Say what runs and what is left out.")
@click.option("--jobs", default=2, show_default=True, help="Files compiled at once.")
def main(suites: tuple[str, ...], only_list: bool, jobs: int) -> None:
    wanted = suites or SUITES
    cache = upstream.cache_dir() / "upstream-tests"
    folder = cache / "build"
    folder.mkdir(parents=True, exist_ok=True)
    build = Build(source_tree(None, cache), folder, Log(cache / "log"), jobs)
    unpack_python(build.tree, cache / "llama-cpp-python")
    results = {}
    tests: list[Test] = []
    if only_list or {"ctest", "ops"} & {*wanted}:
        build.configure()
        tests = build.tests()
    if only_list:
        click.echo("\n".join(lines_of_list(tests, cache / "llama-cpp-python")))
        return
    if tests:
        targets = {test.target for test in tests if not test.reason and "ctest" in wanted}
        build.make(sorted(targets | {"test-backend-ops"}))
    if "ctest" in wanted:
        results["llama.cpp's ctest"] = run_ctest(build, tests)
    if "ops" in wanted:
        results["test-backend-ops"] = run_ops(build)
    if "python" in wanted:
        results["llama-cpp-python's tests"] = run_python(cache / "llama-cpp-python")
    for line in lines_of_list(tests, cache / "llama-cpp-python"):
        if "left out" in line:
            click.echo(line)
    for name, ok in results.items():
        click.echo(f"{name}: {'passed' if ok else 'FAILED'}")
    if not all(results.values()):
        raise McError(f"some checks failed; the log of the build is {build.log.path}")


if __name__ == "__main__":
    run_tool(main, "upstream_tests")
