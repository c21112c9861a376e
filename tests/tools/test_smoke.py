"""Every script of tools/ runs at small sizes, on a small random model.

The numbers do not matter here; that the scripts still fit the package does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mc_gguf import runtime as runtimes
from tests.support import ROOT, WIKITEXT
from tools.compilers import CONFIGURATIONS

SEEN = [
    *(ROOT / "tests" / "tools" / f"test_{name}.py" for name in ("smoke", "train_moe", "upstream_tests")),
    ROOT / "tests" / "robustness" / "test_fuzz.py",
]
NATIVE = pytest.mark.usefixtures("own_cache")  # what is stored goes away; the fixture marks the test native


def run(name: str, *arguments: object) -> str:
    """`python -m tools.NAME ARGUMENTS` in the repository; what it prints."""
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def scripts() -> list[str]:
    """The names of all modules under tools/ that can be run."""
    files = [p for p in (ROOT / "tools").rglob("*.py") if "__main__" in p.read_text(encoding="utf-8")]
    return sorted(".".join(p.relative_to(ROOT / "tools").with_suffix("").parts) for p in files)


@pytest.mark.parametrize("name", scripts())
def test_every_script_has_a_smoke_run_and_help(name: str) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in SEEN)
    assert f'run("{name}"' in tests or f"{name.rpartition('.')[2]}.main" in tests
    assert f"python -m tools.{name} " in " ".join(run(name, "--help").split()) + " "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of four random experts, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("smoke") / "random-mixtral"
    sizes = ("--layers", 1, "--embd", 256, "--ff", 256, "--experts", 4, "--heads", 4, "--kv-heads", 2)
    run("experiments.make_model", folder, *sizes, "--vocab", 4096)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smoke") / "text.txt"
    path.write_text(WIKITEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


def test_bench_allocate() -> None:
    found = json.loads(run("bench_allocate", "--layers", 1, "--experts", 8, "--bpw", 2.2, "--json"))
    assert found["n_item"] == 24
    run("bench_allocate", "--layers", 1, "--experts", 8, "--bpw", 2.2, "--size")


def test_sanitizers() -> None:
    """The list. `make test-sanitizers` builds, and runs what is there."""
    builds = run("sanitizers", "--list").splitlines()
    assert [line.split()[:2] for line in builds] == [
        ["address", "address,undefined"],
        ["thread", "thread"],
        ["fuzzer", "address,undefined"],
    ]


def test_compilers(tmp_path: Path) -> None:
    """The list, and a configuration whose compiler is missing. `make test-compilers` builds."""
    out = run("compilers", "--list")
    assert [line.split()[0] for line in out.splitlines()] == list(CONFIGURATIONS)
    (tmp_path / "nothing").mkdir()
    env = os.environ | {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.compilers", "--list", "mingw-w64"]
    listed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert "x86_64-w64-mingw32-gcc-posix is not installed: apt install g++-mingw-w64-x86-64-posix" in listed


@NATIVE
def test_kill() -> None:
    run("kill", "--kills", 2, "--verb", "calibrate")


def test_reference_cli(tmp_path: Path) -> None:
    run("reference.cli", tmp_path / "new" / "cli.md")
    assert "## mc-gguf convert" in (tmp_path / "new" / "cli.md").read_text(encoding="utf-8")


def test_reference_calibration(tmp_path: Path) -> None:
    run("reference.calibration", tmp_path / "new" / "calibration.md")
    assert "| `frequency` |" in (tmp_path / "new" / "calibration.md").read_text(encoding="utf-8")


def test_make_model(model: Path) -> None:
    assert {"config.json", "tokenizer.json"} < {path.name for path in model.iterdir()}
    assert [path.name for path in model.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


# Few tokens, and types whose tables take no time to build.
QUICK = ("--", "--tokens", 1024, "--types", "Q2_K,Q3_K")
MEASURED = ("--types", "Q2_K,IQ3_XXS,Q3_K", "--calibration-tokens", 1024)


@NATIVE
def test_bench_calibrate(model: Path) -> None:
    assert "memory is as it should be" in run("bench_calibrate", model, "--tokens", 512, "--types", "Q2_K")


@NATIVE
def test_bench_capture(tiny_gguf: Path, tmp_path: Path) -> None:
    """llama-imatrix takes minutes to build, so a stand-in takes a tenth of a second for every row."""
    tool = tmp_path / "llama-imatrix"
    tool.write_text('#!/bin/sh\nfor n; do :; done\nexec sleep "$((n / 10)).$((n % 10))"\n')
    tool.chmod(0o755)
    sizes = ("--imatrix", tool, "--tokens", 8192, "--threads", 1, "--pairs", 1)
    lines = run("bench_capture", tiny_gguf, *sizes).splitlines()
    assert [line.split(", ")[1].split(":")[0] for line in lines] == [
        "rows as calibrate takes",
        "one row at a time",
    ]
    assert all(" of llama-imatrix (" in line for line in lines)


@NATIVE
def test_bench_compensate(model: Path, text: Path) -> None:
    sizes = ("--tokens", 256, "--ctx", 128, "--calibration-tokens", 1024)
    assert "compensated" in run(
        "bench_compensate", "quality", model, "--types", "Q2_K", "--text", text, *sizes
    )
    assert "TFLOP" in run("bench_compensate", "speed", "--rows", 32, "--cols", 256, "--tokens", 128)


@NATIVE
def test_bench_eval(tiny_gguf: Path, tmp_path: Path) -> None:
    """llama-perplexity takes minutes to build, so a stand-in prints the lines that the script waits for."""
    tool = tmp_path / "llama-perplexity"
    tool.write_text("#!/bin/sh\necho '0.01 seconds per pass'\nsleep 0.1\necho 'Final estimate: PPL = 1'\n")
    tool.chmod(0o755)
    sizes = ("--ctx", 64, "--chunks", 64, "--rounds", 1)
    out = run("bench_eval", tool, tiny_gguf, "--reference", tiny_gguf, *sizes)
    assert [line.split(":")[0] for line in out.splitlines()] == ["perplexity", "KL divergence"]


@NATIVE
def test_bench_op(runtime: runtimes.Runtime, unpatched_runtime: runtimes.Runtime) -> None:
    sizes = ("--tokens", "2", "--threads", "1", "--rounds", 1, "--seconds", 0.01, "--shape", "256,256")
    found = json.loads(run("bench_op", *sizes, "--types", "Q2_K+Q4_0", "--json"))
    assert found["median"] > 0
    # No CPU repacks IQ1_S. With another type in a mix, it is the one that is named.
    repacked = run("bench_op", *sizes, "--types", "IQ1_S+Q4_0", "--repack")
    assert "not measured: this CPU does not repack IQ1_S" in repacked.splitlines()[-1]
    assert "0.000" not in repacked
    as_json = json.loads(run("bench_op", *sizes, "--types", "IQ1_S", "--repack", "--json"))
    assert as_json["not_repacked"] == ["IQ1_S"]


@NATIVE
def test_bench_quantize(model: Path) -> None:
    assert json.loads(run("bench_quantize", "memory", model, "--types", "Q4_0,Q8_0"))["file_bytes"] > 0
    lines = run("bench_quantize", "speed", model, "--type", "Q4_0", "--imatrix", "--repeat", 1).splitlines()
    assert json.loads(lines[-1])["same_bytes"] is True


@NATIVE
def test_bench_routing(model: Path, unpatched_runtime: runtimes.Runtime, tmp_path: Path) -> None:
    run("bench_routing", "make", model, tmp_path)
    sizes = ("--rounds", 1, "--prefill", 64)
    assert "MoE blocks at decode" in run("bench_routing", "run", tmp_path / "mixed.gguf", *sizes)
    baseline = ("--baseline", unpatched_runtime.lib_dir)
    assert "baseline / patched" in run("bench_routing", "off", tmp_path / "Q2_K.gguf", *baseline, *sizes)


@NATIVE
def test_demo(model: Path, tmp_path: Path) -> None:
    sizes = ("--bpw", 3, "--tokens", 256, "--model", model, "--folder", tmp_path / "demo")
    out = run("demo", *sizes, *QUICK)
    assert "perplexity" in out
    assert (tmp_path / "demo" / "mixed.gguf").is_file()


@NATIVE
def test_patches(tmp_path: Path) -> None:
    """What refresh writes from an untouched checkout is the patch set; bump onto the pin changes nothing."""
    assert "patches verified" in run("patches", "verify")
    tree, written = tmp_path / "llama.cpp", tmp_path / "patches"
    run("patches", "checkout", tree)
    written.mkdir()
    (written / "UPSTREAM").write_bytes((ROOT / "patches" / "UPSTREAM").read_bytes())
    run("patches", "refresh", tree, "--patches", written)
    for path in written.rglob("*"):
        if path.is_file():
            same = ROOT / "patches" / path.relative_to(written)
            assert path.read_bytes() == same.read_bytes(), path.name
    assert len([*written.glob("*.patch")]) == len([*(ROOT / "patches").glob("*.patch")])
    assert "1:" in run("patches", "bump", tree, runtimes.upstream.pin().commit)


@NATIVE
def test_odp_experiment(model: Path, tmp_path: Path) -> None:
    sizes = ("--tokens", 64, "--ctx", 64, "--model", model, "--bpw", 3)
    assert "| keep_min |" in run("experiments.odp_experiment", tmp_path, *sizes, *QUICK)
    assert (tmp_path / "curves.svg").is_file()


@NATIVE
def test_quality_experiment(model: Path, tmp_path: Path) -> None:
    sizes = ("--tokens", 64, "--ctx", 64, "--seeds", 1, "--no-compensate", "--sizes", "IQ3_XXS,recipe Q2_K")
    strategies = ("--strategies", "uniform,llama-quantize,pmq")
    run("experiments.quality_experiment", "run", tmp_path, "--model", model, *sizes, *strategies, *MEASURED)
    assert "| pmq |" in run("experiments.quality_experiment", "report", tmp_path)
    assert (tmp_path / "curves.svg").is_file()


@NATIVE
def test_bench_refine(model: Path, tmp_path: Path) -> None:
    for method in ("expansion", "evopress"):
        sizes = ("--tokens", 4096, "--scored", 64, "--seconds", 1, "--matrix-seconds", 0, "--model", model)
        arm = ("--bpw", 3, "--method", method, *sizes, *MEASURED)
        run("experiments.bench_refine", "run", tmp_path, *arm)
    assert "evopress" in run("experiments.bench_refine", "report", tmp_path)
