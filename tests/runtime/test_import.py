"""Importing mc_gguf.runtime is cheap: what downloads and builds is loaded by whoever builds."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT


def test_importing_the_room_loads_no_builder() -> None:
    code = "import sys, mc_gguf.runtime; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "mc_gguf.runtime.locate" in loaded
    heavy = {"builder", "fetch", "shell", "packages", "facts", "llama_library", "vocabulary"}
    assert not loaded & {f"mc_gguf.runtime.{name}" for name in heavy}
    assert not loaded & {"numpy", "torch", "llama_cpp", "tarfile", "subprocess", "tempfile"}
