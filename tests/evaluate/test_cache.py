"""Where stored references lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mc_gguf.evaluate.cache import cached_path
from mc_gguf.evaluate.text import Text

pytestmark = pytest.mark.native


def test_a_long_name_in_another_script_fits(tmp_path: Path) -> None:
    model = tmp_path / f"{'漢' * 80}.gguf"
    model.write_bytes(b"GGUF")
    path = cached_path(model, Text("漢" * 80, b"text"), 512, None)
    assert len(os.fsencode(path.name)) < 200  # a working file beside it has a longer one
