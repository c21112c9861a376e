"""A function that the graph shows is only believed when it gives what the runtime computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mc_gguf.calibrate.routed import Routing
from mc_gguf.calibrate.verify import verified_function
from mc_gguf.capture.capture import VERIFIED, CaptureOptions, LayerRows, capture
from mc_gguf.capture.context import Devices
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.capture.spool import Spool
from mc_gguf.common.progress import progress
from mc_gguf.source import open_checkpoint
from tests.support.random_models import N_VOCAB, write_random_model

GATE, UP = ["product", "gate"], ["product", "up"]
RIGHT = ["GLU.SWIGLU", GATE, UP]


def layer(expression: Any, noise: float = 0.0) -> tuple[Any, Any]:
    """A checkpoint with experts of random numbers, and the routing of a layer whose runtime computed RIGHT,
    with some noise.
    """
    rng = np.random.default_rng(0)
    matrices: dict[tuple[str, int], Any] = {
        (p, e): rng.standard_normal((8, 16) if p == "down" else (16, 8)).astype(np.float32)
        for p in ("gate", "up", "down")
        for e in range(4)
    }
    x = rng.standard_normal((VERIFIED, 8)).astype(np.float32) * np.float32(0.3)
    experts = np.array([rng.permutation(4)[:2] for _ in range(VERIFIED)], np.int32)
    middle = np.zeros((VERIFIED, 2, 16), np.float32)
    for t, s in np.ndindex(VERIFIED, 2):
        gate, up = (matrices[p, int(experts[t, s])] @ x[t] for p in ("gate", "up"))
        middle[t, s] = gate / (1 + np.exp(-gate)) * up
    middle *= 1 + noise * rng.standard_normal(middle.shape)
    checkpoint = SimpleNamespace(
        info=SimpleNamespace(projections=("gate", "up", "down")), expert=lambda _layer, p, e: matrices[p, e]
    )
    rows = SimpleNamespace(
        layer=0,
        function=None if expression is None else ExpertFunction(expression),
        unknown="WIN_PART",
        middle=middle,
        inputs=lambda tokens, _slots: torch.from_numpy(x[tokens]),
    )
    return checkpoint, SimpleNamespace(rows=rows, experts=experts)


def test_the_right_function_is_believed() -> None:
    assert verified_function(*layer(RIGHT)) == (ExpertFunction(RIGHT), "")
    assert verified_function(*layer(RIGHT, noise=0.02))[1] == ""  # as products of 16 or 8 bits have it


@pytest.mark.parametrize(
    "wrong",
    [
        ["GLU.GEGLU", GATE, UP],
        ["GLU.SWIGLU", UP, GATE],
        ["GLU.REGLU", GATE, UP],
        ["GLU.SWIGLU_CLAMP", GATE, UP, 1.0],
        ["SCALE", RIGHT, 1.1, 0.0],
    ],
)
def test_a_wrong_one_is_not(wrong: Any) -> None:
    function, why = verified_function(*layer(wrong))
    assert function is None
    assert why.startswith(f"{ExpertFunction(wrong).text} differs from what the runtime computes by ")


def test_too_much_noise_and_no_function_are_not() -> None:
    assert verified_function(*layer(RIGHT, noise=0.2))[0] is None
    assert verified_function(*layer(None)) == (None, "the operation WIN_PART is not known")


@pytest.mark.native
@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("qwen3moe", "swiglu(gate, up)"),
        ("dots1", "swiglu(gate, up)"),
        ("gpt-oss", "swiglu_oai((gate + bias), (up + bias), 1.702, 7)"),
    ],
)
def test_functions_of_the_runtimes_graphs(tmp_path: Path, architecture: str, expected: str) -> None:
    checkpoint = open_checkpoint(write_random_model(tmp_path / "model.gguf", architecture))
    rows = np.random.default_rng(0).integers(0, N_VOCAB, (2, 32)).astype(np.int32)
    spool, none = Spool(tmp_path / "spool"), np.zeros(0, np.int64)
    with progress("capture", quiet=True) as bar:
        capture(
            tmp_path / "model.gguf", checkpoint.info, CaptureOptions(rows, none, none), Devices(1), spool, bar
        )
    for number in checkpoint.info.expert_layers:
        routing = Routing(LayerRows(spool, number, rows.size, 0))
        function, why = verified_function(checkpoint, routing)
        assert function is not None, why
        assert function.text == expected
        if architecture == "gpt-oss":
            assert function.down_bias == f"blk.{number}.ffn_down_exps.bias"
            assert routing.renormalises  # a softmax over the selected experts
        other = SimpleNamespace(rows=_Other(routing.rows), experts=routing.experts)
        assert verified_function(checkpoint, other)[0] is None  # type: ignore[arg-type]


class _Other:
    """Rows with a function that is not theirs."""

    def __init__(self, rows: LayerRows) -> None:
        assert rows.function is not None
        self._rows = rows
        self.function = replace(rows.function, expression=["SCALE", rows.function.expression, 1.2, 0.0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)
