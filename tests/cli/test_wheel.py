"""The wheel in a bare virtual environment: it runs files without torch, and says what making one needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mc_gguf.runtime import Runtime
from mc_gguf.source import open_checkpoint
from tests.support.gguf_models import make_calibration

pytestmark = pytest.mark.native

NEEDS_CONVERT = "this needs torch, which is not installed; run: pip install 'mc-gguf[convert]'"


@pytest.fixture(scope="module")
def bare(repo_root: Path, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with nothing but the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", folder, repo_root)
    _run(sys.executable, "-m", "venv", folder / "venv")
    [wheel] = folder.glob("*.whl")
    options = ("--no-binary", "llama-cpp-python")  # without its native part: the runtime is ours
    _run(folder / "venv/bin/python", *pip, "install", *options, wheel)
    return folder / "venv" / "bin"


def _run(*command: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Without what the tests' own environment would lend: the path to the source, a finished import path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["CMAKE_ARGS"] = "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_what_running_a_file_needs_is_there(
    bare: Path, tiny_gguf: Path, repo_root: Path, tmp_path: Path
) -> None:
    tool, model = bare / "mc-gguf", tmp_path / "model.gguf"
    shutil.copyfile(tiny_gguf, model)
    assert "plain GGUF, llama" in _run(tool, "inspect", model).stdout
    answer = _run(tool, "chat", model, "-p", "Once upon a time", "-n", "4", "--ctx", "256", "--threads", "1")
    assert answer.stdout.strip()
    text = repo_root / "tests" / "data" / "wikitext-2.test.txt"
    measured = _run(tool, "eval", model, "--text", text, "--ctx", "64", "--tokens", "60", "--threads", "1")
    assert "perplexity" in measured.stdout
    calibration = tmp_path / "c.safetensors"
    make_calibration(open_checkpoint(tiny_gguf).info, calibration)
    _run(tool, "routing", "set", model, "--calibration", calibration, "--layers", "all")
    assert "6 of 6 layers may drop experts" in _run(tool, "routing", "show", model).stdout


def test_making_one_names_the_extra(bare: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "scipy", "sentencepiece", "lm_eval"):
        _run(bare / "python", "-c", f"import {module}", code=1)
    tool, output = bare / "mc-gguf", tmp_path / "m"
    for arguments in (
        ("convert", tiny_gguf, "-o", output, "--bpw", "2"),
        ("calibrate", tiny_gguf, "-o", output),
        ("refine", tiny_gguf, "plan.json", "-o", output),
        ("quantize", tiny_gguf, "plan.json", "-o", output),
    ):
        done = _run(tool, *arguments, code=1)
        assert (done.stdout, done.stderr) == ("", f"Error: {NEEDS_CONVERT}\n")
    done = _run(tool, "plan", "calib.safetensors", "-o", output, "--bpw", "2", code=1)
    assert done.stderr == f"Error: {NEEDS_CONVERT.replace('torch', 'scipy')}\n"
    done = _run(tool, "eval", tiny_gguf, "--tasks", "hellaswag", code=1)
    assert "run: pip install 'mc-gguf[tasks]'" in done.stderr
    code = f"import mc_gguf; mc_gguf.convert({str(tiny_gguf)!r}, 'm.gguf', bpw=2)"
    assert "MissingExtraError: " + NEEDS_CONVERT in _run(bare / "python", "-c", code, code=1).stderr
