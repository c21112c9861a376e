"""The Python blocks of README.md and docs/ run, in order, beside the repository's files.

A document's blocks share a folder that looks like the repository: what they write stays under it. The model
is the bundled one, cut to its first layers and calibrated once for all documents, so that converting it takes
seconds. A block that cannot run carries `<!-- not run: reason -->` above it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, TINY
from tests.support.documents import Block, blocks, documents
from tests.support.mixed_files import first_layers

BLOCKS = {path: [*blocks(path, "python")] for path in documents()}
N_LAYER = 1
# One process for all blocks of a document, because the quantizers build tables for ten seconds. Each block
# has names of its own.
RUNNER = """
import json, sys
for place, text in json.loads(sys.argv[1]):
    exec(compile(text, place, "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("block", [b for found in BLOCKS.values() for b in found], ids=lambda b: str(b.line))
def test_a_block_is_python_and_a_skipped_one_says_why(block: Block) -> None:
    compile(block.text, f"{block.path}:{block.line}", "exec")
    assert block.reason_not_run != "", f"{block.path}:{block.line}: say why it is not run"


def lay_out(folder: Path) -> Path:
    """Make `folder` look like the repository, with models/tiny-mixtral cut to its first layers."""
    for name in ("tests", "docs"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    (folder / "models").mkdir()
    (folder / "demo").mkdir()
    first_layers(TINY, N_LAYER, folder / "models" / "tiny-mixtral")
    return folder


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration that convert() makes beside demo/tiny.gguf, or uses if it is there."""
    folder = lay_out(tmp_path_factory.mktemp("calibrated"))
    arguments = ("calibrate", "models/tiny-mixtral", "-o", "demo/tiny.calib.safetensors")
    run([sys.executable, "-m", "mc_gguf", *arguments], folder)
    return folder / "demo" / "tiny.calib.safetensors"


@pytest.fixture
def workplace(tmp_path: Path, calibration: Path, own_cache: Path) -> Path:
    shutil.copy(calibration, lay_out(tmp_path) / "demo")
    return tmp_path


def run(command: list[str], folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.native
@pytest.mark.parametrize(
    "path", [p for p, found in BLOCKS.items() if found], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_blocks_of_a_document_run(path: Path, workplace: Path) -> None:
    wanted = [(f"{path}:{b.line}", b.text) for b in BLOCKS[path] if b.reason_not_run is None]
    run([sys.executable, "-c", RUNNER, json.dumps(wanted)], workplace)
