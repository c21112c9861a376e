"""Build the runtime with other compilers and for other CPUs, run the native tests there, compare results.

    python -m tools.compilers [NAME...]           all configurations, or those named; make test-compilers
    python -m tools.compilers --list              the configurations, and what each needs
    python -m tools.compilers --source DIR NAME   builds a checkout of tools.patches

Every configuration is built from nothing in <cache>/compilers/NAME: in a minute where ccache has the objects,
else in several. Built are libllama, ggml's CPU library and libmc-quantize; the tests are those of
tests/native. Programs for another architecture run under qemu-user. A configuration is skipped, with the
reason, where its compiler or qemu is not installed, or where this CPU cannot run it. Exit code 1 stands for
an error, a failed test, or a compiler's warning (-Wall -Wextra and upstream's own choice) about a line of
ours.

What is compared: every configuration starts from the same blocks as the first one, gcc-native. `op` is the
largest difference of a number in the result of MUL_MAT_ID_GROUPED, relative to the largest number of its
type, and the type where it is; `stock` and `compensated` are the shares of bytes that differ in what ggml's
quantizers and libmc-quantize write. `ns/weight` is the processor time of libmc-quantize, averaged over the
types.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from mc_gguf.common.errors import McError, RuntimeBuildError
from mc_gguf.runtime import fetch, upstream
from mc_gguf.runtime.builder import program_command
from mc_gguf.runtime.locate import LIBRARIES
from mc_gguf.runtime.shell import Log
from tools.common import ROOT, run_tool
from tools.patches import git

SOURCES = ROOT / "tests" / "native"
PROGRAMS = ("test-mul-mat-id-grouped", "test-routing-ops", "test-mc-quantize")
LAST_LINE = re.compile(r"(?:passed )?(\d+) (?:passed, 0 failed|failed 0)")
SPEED = re.compile(r"compensation: (\d+) ns per weight")
FINDING = re.compile(r"^(\S+?):(\d+):\d+: (?:warning|runtime error): .*")  # a compiler's, a sanitizer's
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_ALL_WARNINGS=ON",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_COMMON=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
# For x86-64, every set of instructions by name: without -march=native, upstream's default is AVX2.
INSTRUCTIONS = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "AVX512")


def with_instructions(last: str) -> tuple[str, ...]:
    """CMake's flags for the instruction sets up to `last`, and none of those after it."""
    on = INSTRUCTIONS.index(last)
    flags = (f"-DGGML_{name}={'ON' if i <= on else 'OFF'}" for i, name in enumerate(INSTRUCTIONS))
    return ("-DGGML_NATIVE=OFF", *flags)


SSE42, AVX2, AVX512 = map(with_instructions, ("SSE42", "F16C", "AVX512"))  # x86-64-v2, -v3, -v4
AARCH64 = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DGGML_NATIVE=OFF")
# mingw-w64 11 (Debian 12) has no THREAD_POWER_THROTTLING_STATE, which ggml uses from Windows 8 on.
WINDOWS = (
    "-DCMAKE_SYSTEM_NAME=Windows",
    "-DCMAKE_SYSTEM_PROCESSOR=x86_64",
    "-DCMAKE_C_FLAGS=-D_WIN32_WINNT=0x0601",
    "-DCMAKE_CXX_FLAGS=-D_WIN32_WINNT=0x0601",
    *AVX2,
)


@dataclass(frozen=True)
class Compiler:
    """A C and a C++ compiler, the Debian package that has both, and the processors that they compile for."""

    c: str
    cxx: str
    package: str
    machine: str = "x86_64"
    runner: tuple[str, ...] = ()  # runs its programs where the machine is another one
    runner_package: str = ""
    runs: bool = True  # False: a compile check


GCC = Compiler("gcc", "g++", "g++", platform.machine())
CLANG = Compiler("clang", "clang++", "clang", platform.machine())
CROSS = Compiler(
    "aarch64-linux-gnu-gcc",
    "aarch64-linux-gnu-g++",
    "g++-aarch64-linux-gnu",
    "aarch64",
    ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"),
    "qemu-user-static",
)
MINGW = Compiler(
    "x86_64-w64-mingw32-gcc-posix", "x86_64-w64-mingw32-g++-posix", "g++-mingw-w64-x86-64-posix", runs=False
)


@dataclass(frozen=True)
class Configuration:
    """One way to build the runtime. `cpu`: the words of /proc/cpuinfo without which its programs do not run;
    `machine`: the only architecture for which its flags make sense.
    """

    compiler: Compiler
    flags: tuple[str, ...]
    cpu: tuple[str, ...] = ()
    machine: str = ""


V3, V4 = ("avx2", "fma", "f16c", "bmi2"), ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq")
# The first is what the others are compared with.
CONFIGURATIONS: Mapping[str, Configuration] = {
    "gcc-native": Configuration(GCC, ("-DGGML_NATIVE=ON",)),
    "gcc-sse42": Configuration(GCC, SSE42, ("sse4_2",), "x86_64"),
    "gcc-avx2": Configuration(GCC, AVX2, V3, "x86_64"),
    "gcc-avx512": Configuration(GCC, AVX512, V4, "x86_64"),
    "gcc-threadpool": Configuration(GCC, ("-DGGML_NATIVE=ON", "-DGGML_OPENMP=OFF")),
    "clang-native": Configuration(CLANG, ("-DGGML_NATIVE=ON",)),
    "clang-avx2": Configuration(CLANG, AVX2, V3, "x86_64"),
    "clang-avx512": Configuration(CLANG, AVX512, V4, "x86_64"),
    "aarch64": Configuration(CROSS, AARCH64),
    "aarch64-dotprod": Configuration(CROSS, (*AARCH64, "-DGGML_CPU_ARM_ARCH=armv8.2-a+fp16+dotprod")),
    "mingw-w64": Configuration(MINGW, WINDOWS),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a configuration; `note` says why where something did not go well."""

    name: str
    built: str
    passed: str = "-"
    op: str = "-"
    stock: str = "-"
    compensated: str = "-"
    speed: str = "-"
    note: str = ""
    ok: bool = True

    def row(self) -> str:
        columns = f"{self.name:<16}{self.built:<9}{self.passed:<9}"
        return (
            f"{columns}{self.op:<18}{self.stock:<9}{self.compensated:<13}{self.speed:<11}{self.note}".rstrip()
        )


HEAD = Outcome("configuration", "built", "passed", "op", "stock", "compensated", "ns/weight", "note")


def missing(configuration: Configuration) -> str:
    """Why this machine cannot build and run a configuration; "" if it can."""
    compiler = configuration.compiler
    if configuration.machine and configuration.machine != platform.machine():
        return f"for {configuration.machine} only"
    for program in (compiler.c, compiler.cxx):
        if shutil.which(program) is None:
            return f"{program} is not installed: apt install {compiler.package}"
    runner = compiler.runner if compiler.machine != platform.machine() else ()
    if runner and shutil.which(runner[0]) is None:
        return f"{runner[0]} is not installed: apt install {compiler.runner_package}"
    absent = [word for word in configuration.cpu if word not in cpu_features()]
    return f"this CPU has no {', '.join(absent)}" if absent else ""


def cpu_features() -> set[str]:
    """The words of /proc/cpuinfo for what this CPU can do."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}


def build(configuration: Configuration, tree: Path, folder: Path, jobs: int, log: Log) -> None:
    """Configure and compile from nothing in folder/build."""
    compiler, target = configuration.compiler, folder / "build"
    shutil.rmtree(target, ignore_errors=True)
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    compilers = (f"-DCMAKE_C_COMPILER={compiler.c}", f"-DCMAKE_CXX_COMPILER={compiler.cxx}")
    env = {"CCACHE_BASEDIR": str(upstream.cache_dir()), "CCACHE_NOHASHDIR": "1", **os.environ}
    command: list[str | Path] = ["cmake", "-S", tree, "-B", target, "-G", generator, *compilers, *FLAGS]
    log.run("configuring with cmake", [*command, *configuration.flags], folder, env)
    targets = ("--target", "llama", "mc-quantize")
    log.run("compiling", ["cmake", "--build", target, *targets, "--parallel", str(jobs)], folder, env)


def own_lines(tree: Path) -> dict[str, set[int]]:
    """The lines that the patches added to upstream's files."""
    lines: dict[str, set[int]] = {}
    path = ""
    for line in git(tree, "diff", "--unified=0", upstream.pin().commit, "HEAD").splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ b/")
        elif match := re.match(r"@@ .*\+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            lines.setdefault(path, set()).update(range(first, first + count))
    return lines


def own_findings(log: str, folder: Path, tree: Path, lines: Mapping[str, set[int]]) -> Iterator[str]:
    """The warnings of the compiler, or the errors of UndefinedBehaviorSanitizer, in `log` about our own files
    of `tree` and about our `lines` of upstream's. The compiler ran in `folder`.
    """
    for line in log.splitlines():
        if match := FINDING.match(line):
            name = os.path.relpath(folder / match[1], tree)
            if name.startswith(f"{fetch.OWN_SOURCES}/") or int(match[2]) in lines.get(name, ()):
                yield line


def run_tests(
    configuration: Configuration, tree: Path, folder: Path, log: Log, reference: Path
) -> tuple[int, str]:
    """Compile the native tests and run them; returns how many checks passed, and the nanoseconds that
    compensation took per weight. Raises RuntimeBuildError when a check failed. The results to compare are in
    folder/results.
    """
    results = folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    library = folder / "build" / "bin"
    linked = ("mc-quantize", *reversed(LIBRARIES))
    compiler, passed, speed = configuration.compiler, 0, "-"
    runner = compiler.runner if compiler.machine != platform.machine() else ()
    for name in PROGRAMS:
        program = folder / name
        command = program_command(compiler.cxx, tree, library, linked, SOURCES / f"{name}.cpp", program)
        output = log.run(f"compiling {name}", [*command[:1], "-Wall", "-Wextra", *command[1:]], folder)
        if warnings := [line for line in output.splitlines() if "warning:" in line]:
            raise RuntimeBuildError(warnings[0])
        arguments = [results, reference] if name == "test-mc-quantize" else []
        lines = log.run(name, [*runner, program, *arguments], folder).splitlines()
        if not (match := LAST_LINE.fullmatch(lines[-1])):
            raise RuntimeBuildError(f"{name}: {lines[-1]}")
        passed += int(match[1])
        speed = next((found[1] for line in lines if (found := SPEED.fullmatch(line))), speed)
    return passed, speed if not runner else "-"


def largest_difference(reference: Path, results: Path) -> str:
    """Of the op's results over all types, relative to the largest number of the type, which is named."""
    worst, where = 0.0, ""
    for path in sorted(reference.glob("*.op")):
        a, b = (np.fromfile(p, np.float32).astype(np.float64) for p in (path, results / path.name))
        difference = float(np.abs(a - b).max() / np.abs(a).max())
        if not difference <= worst:  # also NaN
            worst, where = difference, path.stem
    return f"{worst:.1e} {where}" if where else "equal"


def share_of_bytes(reference: Path, results: Path, suffix: str) -> str:
    """How many of the bytes in the files *.suffix differ, over all types."""
    pairs = [(path, results / path.name) for path in sorted(reference.glob(f"*.{suffix}"))]
    read = [tuple(np.fromfile(path, np.uint8) for path in pair) for pair in pairs]
    different, total = sum(int((a != b).sum()) for a, b in read), sum(a.size for a, _ in read)
    return f"{100 * different / total:.2g} %" if different else "equal"


def try_out(name: str, tree: Path, cache: Path, jobs: int, reference: Path) -> Outcome:
    """Build a configuration, run its tests, compare its results with those in `reference`."""
    configuration, folder = CONFIGURATIONS[name], cache / name
    if why := missing(configuration):
        return Outcome(name, "skipped", note=why)
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / "log")
    log.path.unlink(missing_ok=True)
    try:
        build(configuration, tree, folder, jobs, log)
    except RuntimeBuildError as error:
        return Outcome(name, "failed", note=str(error), ok=False)
    text = log.path.read_text(errors="replace")
    found = sorted(set(own_findings(text, folder / "build", tree, own_lines(tree))))
    note = f"{len(found)} warnings, the first: {found[0]}" if found else ""
    if not configuration.compiler.runs:
        return Outcome(name, "yes", note=note or "a compile check", ok=not found)
    try:
        passed, speed = run_tests(configuration, tree, folder, log, reference)
    except RuntimeBuildError as error:
        return Outcome(name, "yes", "failed", note=str(error), ok=False)
    results = folder / "results"
    if not any(reference.glob("*.op")):
        return Outcome(name, "yes", str(passed), note="there are no results to compare with", ok=False)
    stock, compensated = (share_of_bytes(reference, results, suffix) for suffix in ("stock", "blocks"))
    difference = largest_difference(reference, results)
    return Outcome(name, "yes", str(passed), difference, stock, compensated, speed, note, not found)


def source_tree(given: Path | None, cache: Path) -> Path:
    """The patched llama.cpp: `given`, a checkout of tools.patches, or the one in the cache."""
    if given is not None:
        return given.resolve()
    work, digest = cache / "source", upstream.patchset_digest()  # one place, so that ccache knows the paths
    made_of = work / "digest"
    if not made_of.is_file() or made_of.read_text() != digest:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    made_of.write_text(digest)
    return fetch.prepare(work, True, Log(work / "log"))


def chosen(names: Sequence[str]) -> list[str]:
    """The names in the table's order, with the first one, which the others are compared with."""
    if unknown := [name for name in names if name not in CONFIGURATIONS]:
        raise McError(f"no configuration {unknown[0]!r}: one of {', '.join(CONFIGURATIONS)}")
    first, *rest = CONFIGURATIONS
    return [first, *(name for name in rest if name in names or not names)]


@click.command(help=__doc__)
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="List the configurations.")
@click.option("--source", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A checkout.")
@click.option("--jobs", default=2, show_default=True, help="Files compiled at once.")
def main(names: tuple[str, ...], only_list: bool, source: Path | None, jobs: int) -> None:
    wanted = chosen(names)
    if only_list:
        for name in wanted:
            configuration = CONFIGURATIONS[name]
            why = missing(configuration) or "can be built here"
            click.echo(f"{name:<16}{why:<60}{' '.join(configuration.flags)}")
        return
    cache = upstream.cache_dir() / "compilers"
    tree = source_tree(source, cache)
    reference = cache / wanted[0] / "results"
    shutil.rmtree(reference, ignore_errors=True)  # of an earlier run
    click.echo(HEAD.row())
    ok = True
    for name in wanted:
        outcome = try_out(name, tree, cache, jobs, reference)
        click.echo(outcome.row())
        ok = ok and outcome.ok
    if not ok:
        raise McError(f"some checks failed; the logs are {cache}/NAME/log")


if __name__ == "__main__":
    run_tool(main, "compilers")
