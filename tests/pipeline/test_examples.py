"""The examples in the docstrings of the public functions, run one after the other on the bundled model."""

from __future__ import annotations

import doctest
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mc_gguf import runtime
from mc_gguf.calibrate import calibrate
from mc_gguf.container import update_routing
from mc_gguf.evaluate import evaluate
from mc_gguf.pipeline import convert, make_plan
from mc_gguf.quantize import quantize
from mc_gguf.refine import refine

# In an order in which each finds the files that it reads.
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    calibrate,
    make_plan,
    refine,
    quantize,
    update_routing,
    convert,
    evaluate,
)
SECTIONS = ("Args:", "Returns:", "Raises:", "Example:")


@pytest.mark.native
def test_examples_of_the_steps(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: runtime.Runtime
) -> None:
    for name in ("models", "tests"):
        (tmp_path / name).symlink_to(repo_root / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MC_GGUF_QUIET", "1")
    for function in FUNCTIONS:
        text = function.__doc__ or ""
        test = doctest.DocTestParser().get_doctest(text, {}, function.__name__, None, None)
        assert test.examples, function.__name__
        output: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
        assert not result.failed, "".join(output)
    assert not [name for name in os.listdir() if name.startswith(".")]  # no state of a killed run


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_docstrings_are_complete(function: Callable[..., Any]) -> None:
    text = function.__doc__ or ""
    places = [text.find(section) for section in SECTIONS]
    assert -1 not in places
    assert places == sorted(places)
    documented = text[places[0] : places[1]]
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assert not [name for name in names if name not in documented]
