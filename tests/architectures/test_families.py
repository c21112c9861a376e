"""Hugging Face directories of the families that people run, converted in one command; the 16-bit copy that
the runtime evaluates has transformers' own logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_gguf import convert
from mc_gguf.capture.context import Context, Devices
from mc_gguf.capture.copy import write_copy
from mc_gguf.source import open_checkpoint
from tests.architectures.families import FAMILIES, save_family

pytestmark = pytest.mark.native

N_TOKENS = 48
# Relative distance of the logits: the runtime multiplies in bfloat16. gpt-oss differs by more in the sharp
# corners of its activation.
NOISE = dict.fromkeys(FAMILIES, 0.012) | {"GptOss": 0.025}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_is_converted_in_one_command(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_family(name, folder)
    assert _distance(model, folder, tmp_path / "copy.gguf") < NOISE[name]
    few: dict[str, Any] = {"tokens": 1024, "ctx": 128, "rows": 16, "threads": 1, "quiet": True}
    converted = convert(folder, tmp_path / "mixed.gguf", bpw=5.0, types="Q4_0,Q5_0,Q8_0", **few)
    kinds = {x.type.name for stack in converted.slices.values() for x in stack}
    assert len(kinds) > 1
    assert converted.expert_bpw is not None
    assert 4.5 < converted.expert_bpw <= 5.0


def _distance(model: Any, folder: Path, copy: Path) -> float:
    """Median over the tokens of the distance between the runtime's logits and those of transformers."""
    write_copy(open_checkpoint(folder), copy)
    rows = np.random.default_rng(0).integers(3, 4000, (1, N_TOKENS)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(rows).long()).logits[0].float().numpy()
    with Context(copy, N_TOKENS, 1, Devices(1), lambda _address, ask, _data: not ask) as context:
        context.evaluate(rows)
        found = context.logits(N_TOKENS).copy()
    return float(np.median(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)))
