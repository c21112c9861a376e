"""Build the runtime with sanitizers, and run our native tests, mutated files and a fuzzer on it.

    python -m tools.sanitizers address               AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
    python -m tools.sanitizers thread                ThreadSanitizer (GCC)
    python -m tools.sanitizers fuzzer --time 1h      libFuzzer on the loader of expert groups (clang)
    python -m tools.sanitizers                       all three; make test-sanitizers
    python -m tools.sanitizers --list                the builds, and whether this machine can do them

address: the programs of tests/native; then a small mixed file generates in Python, and --runs mutations of it
load or are refused (tools.fuzz), all with the sanitized libraries. thread: the programs that compute with
several threads, with ggml's own threads: OpenMP's are unknown to ThreadSanitizer. fuzzer: for --time, with
both sanitizers of the first; an input that failed is kept beside the log, and so is what it has learned.
Everything is built in <cache>/sanitizers/NAME. Exit code 1 stands for a report or a failed test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

import mc_gguf
from mc_gguf.common.arguments import to_seconds
from mc_gguf.common.errors import McError, RuntimeBuildError
from mc_gguf.runtime import upstream
from mc_gguf.runtime.builder import program_command
from mc_gguf.runtime.locate import LIBRARIES
from mc_gguf.runtime.shell import Log
from tools.common import CALIBRATION_TEXT, ROOT, run_tool
from tools.compilers import (
    CLANG,
    GCC,
    PROGRAMS,
    SOURCES,
    Configuration,
    build,
    missing,
    own_findings,
    own_lines,
    source_tree,
)
from tools.experiments.make_model import Sizes, make_model

SIZES = Sizes(layers=1, embd=256, ff=256, experts=4, top_k=2, heads=4, kv_heads=2, vocab=4096)
TARGET = "fuzz-expert-groups"
ERROR = "runtime error:"  # of UndefinedBehaviorSanitizer
OPTIONS = {
    "ASAN_OPTIONS": "abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@dataclass(frozen=True)
class Kind:
    """One sanitized build: what -fsanitize= is given, and the programs of tests/native that it runs."""

    configuration: Configuration
    sanitizers: str
    programs: Sequence[str] = ()


NATIVE = ("-DGGML_NATIVE=ON",)
KINDS: Mapping[str, Kind] = {
    "address": Kind(Configuration(GCC, NATIVE), "address,undefined", PROGRAMS),
    "thread": Kind(
        Configuration(GCC, (*NATIVE, "-DGGML_OPENMP=OFF")),
        "thread",
        ("test-mul-mat-id-grouped", "test-routing-ops"),
    ),
    "fuzzer": Kind(Configuration(CLANG, NATIVE), "address,undefined"),
}


class Sanitized:
    """A build with sanitizers, and what is run on it. All of it writes to one log."""

    def __init__(self, name: str, jobs: int) -> None:
        self.kind, self.jobs = KINDS[name], jobs
        cache = upstream.cache_dir()
        self.tree, self.folder = source_tree(None, cache / "compilers"), cache / "sanitizers" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.folder / "log")
        self.log.path.unlink(missing_ok=True)
        self.libraries = self.folder / "build" / "bin"

    def build(self) -> None:
        """Optimized a little, without ggml's assert()s: the weights of mutated files may be infinite."""
        coverage = ",fuzzer-no-link" if self.kind.configuration.compiler is CLANG else ""
        flags = " ".join(self._flags(self.kind.sanitizers + coverage))
        settings = [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
        settings += [f"-DCMAKE_{language}_FLAGS_RELEASE=-O1 -g1 -DNDEBUG" for language in ("C", "CXX")]
        settings += [f"-DMC_PATCHSET={upstream.patchset_digest()}", *self.kind.configuration.flags]
        configuration = Configuration(self.kind.configuration.compiler, tuple(settings))
        build(configuration, self.tree, self.folder, self.jobs, self.log)

    def program(self, name: str, sanitizers: str) -> Path:
        """Compile a program of tests/native against this build."""
        linked = ("mc-quantize", *reversed(LIBRARIES))
        compiler, program = self.kind.configuration.compiler.cxx, self.folder / name
        command = program_command(
            compiler, self.tree, self.libraries, linked, SOURCES / f"{name}.cpp", program
        )
        self.log.run(f"compiling {name}", [command[0], *self._flags(sanitizers), *command[1:]], self.folder)
        return program

    def run_programs(self) -> None:
        for name in self.kind.programs:
            program, results = self.program(name, self.kind.sanitizers), self.folder / "results"
            results.mkdir(exist_ok=True)
            arguments = [results, results] if name == "test-mc-quantize" else []
            output = self._run(name, [program, *arguments], self.folder, os.environ | OPTIONS)
            click.echo(f"{name}: {output.splitlines()[-1]}")

    def run_mutations(self, model: Path, runs: int) -> None:
        """tools.fuzz in a Python that has the sanitizers' library loaded before all others."""
        reports = self.folder / "reports"
        reports.mkdir(exist_ok=True)
        for old in reports.iterdir():
            old.unlink()
        # Without libstdc++, the sanitizer's library finds no function behind its own __cxa_throw.
        preload = " ".join(self._library(name) for name in ("libasan.so", "libstdc++.so"))
        # Python itself leaves memory to the end of the process, and the forks that are refused do.
        options = {name: f"{value}:detect_leaks=0:log_path={reports}/r" for name, value in OPTIONS.items()}
        env = os.environ | options | {"MC_GGUF_RUNTIME": str(self.libraries), "LD_PRELOAD": preload}
        words: list[str | Path] = [
            sys.executable,
            "-m",
            "tools.fuzz",
            model,
            "--runs",
            str(runs),
            "--memory",
            "0",
        ]
        output = self.log.run("tools.fuzz", [*words, "--seconds", "200"], ROOT, env)
        for report in sorted(reports.iterdir()):
            self._judge(f"tools.fuzz, {report}", report.read_text(errors="replace"))
        click.echo(output.splitlines()[-1])

    def _library(self, name: str) -> str:
        command = [self.kind.configuration.compiler.c, f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def run_fuzzer(self, seconds: float) -> None:
        corpus = self.folder / "corpus"
        corpus.mkdir(exist_ok=True)
        program = self.program(TARGET, f"{self.kind.sanitizers},fuzzer")
        options = [f"-max_total_time={seconds:.0f}", "-max_len=256", "-len_control=0", "-print_final_stats=1"]
        output = self._run(TARGET, [program, *options, corpus], self.folder, os.environ | OPTIONS)
        for line in output.splitlines():
            if line.startswith(("stat::number_of_executed_units", "Done")) or " DONE " in line:
                click.echo(line)

    def _run(self, what: str, command: Sequence[str | Path], folder: Path, env: Mapping[str, str]) -> str:
        output = self.log.run(what, command, folder, env)
        self._judge(what, output)
        return output

    def _judge(self, what: str, output: str) -> None:
        """UndefinedBehaviorSanitizer goes on after an error: what counts is ours. Upstream's code has some:
        it reads words at odd addresses, shifts into the sign, loads enums from files before it checks them.
        """
        found = [*own_findings(output, self.folder / "build", self.tree, own_lines(self.tree))]
        found += [line for line in output.splitlines() if line.startswith(f"{SOURCES}/") and ERROR in line]
        if found:
            raise RuntimeBuildError(f"{what}: {found[0]}")

    def _flags(self, sanitizers: str) -> list[str]:
        flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"]
        # Upstream's table of dot products has functions on blocks where it says functions on void.
        return flags + ["-fno-sanitize=function"] * (self.kind.configuration.compiler is CLANG)


def small_mixed_file(folder: Path) -> Path:
    """A mixed file of one layer, with thresholds for routing, made by the ordinary runtime."""
    text = folder / "text"
    text.write_bytes(CALIBRATION_TEXT.read_bytes()[:8000])
    make_model(folder / "source", SIZES, max_shard_bytes=1 << 30, seed=1)
    mc_gguf.convert(
        folder / "source",
        folder / "m.gguf",
        bpw=2.5,
        text=[text],
        tokens=512,
        ctx=64,
        rows=16,
        types=["IQ1_S", "IQ2_XXS", "Q2_K"],
        compensate=False,
        threads=1,
        quiet=True,
    )
    return folder / "m.gguf"


def try_out(name: str, jobs: int, runs: int, seconds: float) -> None:
    """Build one kind and run what belongs to it. Raises RuntimeBuildError for a report or a failed test."""
    sanitized = Sanitized(name, jobs)
    sanitized.build()
    sanitized.run_programs()
    if name == "address" and runs:
        with tempfile.TemporaryDirectory() as folder:
            sanitized.run_mutations(small_mixed_file(Path(folder)), runs)
    if name == "fuzzer":
        sanitized.run_fuzzer(seconds)


@click.command(help=__doc__)
@click.argument("names", metavar="[NAME...]", nargs=-1, type=click.Choice([*KINDS]))
@click.option("--list", "only_list", is_flag=True, help="List the builds.")
@click.option("--runs", default=1000, show_default=True, help="Mutated files that are loaded.")
@click.option("--time", "duration", default="1m", show_default=True, help="Of the fuzzer, such as 1h.")
@click.option("--jobs", default=2, show_default=True, help="Files compiled at once.")
def main(names: tuple[str, ...], only_list: bool, runs: int, duration: str, jobs: int) -> None:
    seconds, failed = to_seconds(duration, "time"), False
    for name in names or KINDS:
        why = missing(KINDS[name].configuration)
        if only_list:
            click.echo(f"{name:<9} {KINDS[name].sanitizers:<18} {why or 'can be built here'}")
            continue
        if why:
            click.echo(f"{name}: skipped, {why}")
            continue
        try:
            try_out(name, jobs, runs, seconds)
            click.echo(f"{name}: no reports")
        except RuntimeBuildError as error:
            click.echo(f"{name}: {error}")
            failed = True
    if failed:
        raise McError(f"some checks failed; the logs are {upstream.cache_dir()}/sanitizers/NAME/log")


if __name__ == "__main__":
    run_tool(main, "sanitizers")
