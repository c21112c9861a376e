"""What callers may write for an argument, and errors that name the parameter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf.common import extras
from mc_gguf.common.arguments import number, to_bytes, to_names, to_paths, to_seconds, to_types, whole
from mc_gguf.common.errors import BudgetError, McError, MissingExtraError, about
from mc_gguf.common.machine import memory_bytes


def test_text_and_values_mean_the_same() -> None:
    assert to_paths("a b.txt") == to_paths(Path("a b.txt")) == to_paths(["a b.txt"]) == (Path("a b.txt"),)
    assert to_paths(()) == to_paths(None) == ()
    assert to_types("q2_k, Q3_K,") == to_types(("Q2_K", "q3_k")) == ("Q2_K", "Q3_K")
    assert to_names("arc_easy, mmlu") == ("arc_easy", "mmlu")
    assert to_bytes("1.5KiB", "size") == to_bytes(1536, "size") == 1536
    assert to_seconds("1.5m", "time") == to_seconds(90, "time") == to_seconds(90.0, "time") == 90


def test_errors_name_the_parameter() -> None:
    with pytest.raises(BudgetError, match="'big' is not a size") as size:
        to_bytes("big", "memory")
    assert size.value.parameters == ("memory",)
    with pytest.raises(McError) as time:
        to_seconds(-1, "refine")
    assert time.value.parameters == ("refine",)


def test_whole_numbers() -> None:
    two: Any = np.int64(2)
    assert whole(2, or_none=True, tokens=two, threads=None) == (2, None)
    assert type(whole(2, tokens=two)[0]) is int
    with pytest.raises(McError, match="ctx must be at least 2, not 1") as caught:
        whole(2, tokens=2, ctx=1, rows=0)
    assert caught.value.parameters == ("ctx",)
    with pytest.raises(McError, match="ctx must be at most 9, not 10"):
        whole(2, 9, ctx=10)
    odd: list[Any] = [1.0, math.nan, True, "1", [1], None]
    for value in odd:
        with pytest.raises(McError, match="ctx must be a whole number, not"):
            whole(0, ctx=value)


def test_numbers() -> None:
    assert number("bpw", None) is None
    half: Any = np.float32(2.5)
    assert number("bpw", half) == 2.5
    assert type(number("bpw", half)) is float
    odd: list[Any] = [True, "2.5", [2]]
    for value in odd:
        with pytest.raises(McError, match=r"bpw must be a number, not") as caught:
            number("bpw", value)
        assert caught.value.parameters == ("bpw",)


def test_names_are_text() -> None:
    odd: list[Any] = [5, [None], b"Q2_K"]
    for value in odd:
        with pytest.raises(McError, match="give names, as a text or a list of texts"):
            to_types(value)


def test_the_innermost_name_stays() -> None:
    with pytest.raises(McError) as caught, about("text"):
        raise McError("x", parameter=("tokens", "ctx"))
    assert caught.value.parameters == ("tokens", "ctx")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require_extra("convert")
    monkeypatch.setitem(extras.EXTRAS, "convert", ("torch", "no_such_module"))
    with pytest.raises(MissingExtraError) as caught:
        extras.require_extra("convert")
    expected = "this needs no_such_module, which is not installed; run: pip install 'mc-gguf[convert]'"
    assert str(caught.value) == expected


def test_extras_are_those_of_pyproject(repo_root: Path) -> None:
    import tomllib

    declared = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in extras.EXTRAS.items():
        packages = {line.split(">")[0].replace("-", "_") for line in declared[extra]}
        assert packages == set(modules)


def test_memory_is_that_of_a_machine() -> None:
    assert 64 << 20 < memory_bytes() < 1 << 50
