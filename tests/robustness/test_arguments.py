"""Arguments of the Python functions that are out of range, or of another type: refused at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mc_gguf import convert, make_plan
from mc_gguf.artifacts import Calibration, Plan
from mc_gguf.calibrate import calibrate
from mc_gguf.common.errors import ArtifactError, FormatError, McError
from mc_gguf.container import MixedGguf
from mc_gguf.evaluate import evaluate
from mc_gguf.quantize import quantize
from mc_gguf.refine import refine

FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    calibrate: ("source", "output"),
    convert: ("source", "output"),
    evaluate: ("model",),
    make_plan: ("calibration",),
    quantize: ("source", "plan", "output"),
    refine: ("source", "plan", "output"),
}
ODD: dict[str, list[Any]] = {
    "threads": [0, -1, 513, 10**6, 1.5, "2", True],
    "tokens": [-1, 256.5, math.nan, "9"],
    "ctx": [0, 64.0, None, "9"],
    "rows": [0, 16.5, math.nan],
    "seed": [-1, None, "x", 0.5],
    "bpw": ["2.5", [2], True],
    "bits_per_layer": ["8", 8.5],
    "types": [5, [None], b"Q2_K"],
    "attn_type": [5],
}
CASES = [
    (function, parameter, value)
    for function in FUNCTIONS
    for parameter, values in ODD.items()
    if parameter in function.__annotations__
    for value in values
]


@pytest.mark.parametrize(("function", "parameter", "value"), CASES)
def test_odd_arguments_are_named_at_once(
    function: Callable[..., Any], parameter: str, value: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where none of the files exists
    with pytest.raises(McError) as caught:
        function(*FUNCTIONS[function], **{parameter: value})
    assert caught.value.parameters == (parameter,)
    assert parameter in str(caught.value) or parameter in ("types",)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("function", [quantize, refine])
def test_a_bank_is_a_folder(
    function: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bank").touch()
    with pytest.raises(McError, match="bank is not a directory") as caught:
        function("source", "plan", "output", bank="bank")
    assert caught.value.parameters == ("bank",)


def test_paths_may_be_text(tmp_path: Any) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for load in (MixedGguf.open, Calibration.load, Plan.load):
        with pytest.raises((ArtifactError, FormatError), match="x"):
            load(str(tmp_path / "x"))


def test_experts_that_there_are_not(tiny_gguf: Any) -> None:
    model = MixedGguf.open(str(tiny_gguf))
    assert model.type_of(0, "gate", 0).name
    for place in ((99, "gate", 0), (0, "gate", 8), (0, "gate", -1), (0, "x", 0)):
        with pytest.raises(McError, match="has no expert"):
            model.type_of(*place)
        with pytest.raises(McError, match="has no expert"):
            model.data(*place)
    with pytest.raises(McError, match="has no tensor 'nope'"):
        model.tensor_data("nope")
