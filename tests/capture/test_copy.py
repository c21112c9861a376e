"""The copy that the runtime evaluates has the checkpoint's tensors, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mc_gguf.artifacts import PROJECTIONS
from mc_gguf.capture.copy import copy_bytes, runnable, write_copy
from mc_gguf.common.progress import progress
from mc_gguf.source import Checkpoint, open_checkpoint
from tests.support.small_models import MemoryCheckpoint, random_mixtral

pytestmark = pytest.mark.native


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    stacks = {stack.name for stack in one.info.stacks.values()}
    assert {t.name: (t.shape, t.type) for t in one.info.tensors} == {
        t.name: (t.shape, t.type) for t in other.info.tensors
    }
    for t in one.info.tensors:
        if t.name not in stacks:
            np.testing.assert_array_equal(one.tensor(t.name), other.tensor(t.name), err_msg=t.name)
    for layer in one.info.expert_layers:
        for projection in PROJECTIONS:
            for number in range(one.info.n_expert):
                a, b = (c.expert(layer, projection, number) for c in (one, other))
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_the_copy_has_the_checkpoints_tensors(kind: str, tmp_path: Path) -> None:
    checkpoint, path = MemoryCheckpoint(random_mixtral(), kind), tmp_path / "copy.gguf"
    write_copy(checkpoint, path)
    assert copy_bytes(checkpoint) <= path.stat().st_size <= copy_bytes(checkpoint) + 10_000
    copied = open_checkpoint(path)
    assert_same(checkpoint, copied)
    for key in ("block_count", "context_length", "attention.head_count_kv", "rope.freq_base"):
        assert copied.hparams[key] == checkpoint.hparams[key]
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_copied_and_a_gguf_is_not(tiny_model: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    with progress("copy", quiet=True) as bar:
        path = runnable(open_checkpoint(tiny_model), tmp_path / "copy.gguf", bar)
        assert path == tmp_path / "copy.gguf"
        written = path.stat().st_mtime_ns
        assert runnable(open_checkpoint(tiny_model), path, bar).stat().st_mtime_ns == written
        assert_same(open_checkpoint(tiny_gguf), open_checkpoint(path))
        source = open_checkpoint(tiny_gguf)
        assert runnable(source, tmp_path / "unused.gguf", bar) == tiny_gguf
    assert copy_bytes(source) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(MemoryCheckpoint):
        def raw(self, name, expert=None):  # type: ignore[no-untyped-def]
            if name.startswith("blk.1.ffn_down"):
                raise KeyboardInterrupt
            return super().raw(name, expert)

    with pytest.raises(KeyboardInterrupt):
        write_copy(Failing(random_mixtral()), tmp_path / "copy.gguf")
    assert list(tmp_path.iterdir()) == []
