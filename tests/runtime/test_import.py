"""Importing mc_gguf.runtime is cheap: what downloads and builds is loaded by whoever builds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mc_gguf.runtime import Runtime
from tests.support import ROOT


def test_importing_the_room_loads_no_builder() -> None:
    code = "import sys, mc_gguf.runtime; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "mc_gguf.runtime.locate" in loaded
    heavy = {"builder", "fetch", "shell", "packages", "facts", "llama_library", "vocabulary"}
    assert not loaded & {f"mc_gguf.runtime.{name}" for name in heavy}
    assert not loaded & {"numpy", "torch", "llama_cpp", "tarfile", "subprocess", "tempfile"}


def spin_counts(arguments: Sequence[object], **variables: str) -> tuple[set[str], str]:
    """What GCC's OpenMP says of its GOMP_SPINCOUNT when `python ARGUMENTS` loads it, and the output."""
    rest = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env = rest | {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    said = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT =" in line]
    return set(said), done.stdout


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="the libraries of other systems do not use GCC's OpenMP")
def test_waiting_threads_of_the_runtime_soon_sleep(runtime: Runtime, tiny_gguf: Path) -> None:
    """In Python, where the environment stays as it was, and in the command line; unless the user decided."""
    code = "import os, mc_gguf.run.llama\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    assert spin_counts(["-c", code]) == ({"300"}, "None\n")
    assert spin_counts(["-c", code], GOMP_SPINCOUNT="5000") == ({"5000"}, "5000\n")
    chat = ["-m", "mc_gguf", "chat", tiny_gguf, "-p", "The", "-n", 1, "--ctx", 256]
    assert spin_counts(chat)[0] == {"300"}
    assert spin_counts(chat, OMP_WAIT_POLICY="ACTIVE")[0] != {"300"}
