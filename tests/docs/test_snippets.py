"""The Python blocks of README.md and docs/ run, in order, where the repository's files are.

A document's blocks share a folder that looks like the repository: what they write stays under it. The model
is the bundled one, cut to its first layers, so that converting it takes seconds. A block that cannot run
carries `<!-- not run: reason -->` above it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, TINY
from tests.support.documents import Block, blocks, documents
from tests.support.mixed_files import first_layers

BLOCKS = {path: [*blocks(path, "python")] for path in documents()}
N_LAYER = 2


@pytest.mark.parametrize("block", [b for found in BLOCKS.values() for b in found], ids=lambda b: str(b.line))
def test_a_block_is_python_and_a_skipped_one_says_why(block: Block) -> None:
    compile(block.text, f"{block.path}:{block.line}", "exec")
    assert block.reason_not_run != "", f"{block.path}:{block.line}: say why it is not run"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the repository's test data and documents, and models/tiny-mixtral of two layers."""
    for name in ("tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "demo").mkdir()
    first_layers(TINY, N_LAYER, tmp_path / "models" / "tiny-mixtral")
    return tmp_path


@pytest.mark.native
@pytest.mark.parametrize(
    "path", [p for p, found in BLOCKS.items() if found], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_blocks_of_a_document_run(path: Path, workplace: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for block in BLOCKS[path]:
        if block.reason_not_run is None:
            command = [sys.executable, "-c", block.text]
            done = subprocess.run(
                command, cwd=workplace, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{path}:{block.line}\n{done.stderr[-3000:]}"
