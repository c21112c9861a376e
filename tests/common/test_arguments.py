"""What callers may write for an argument, and errors that name the parameter."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_gguf.common import extras
from mc_gguf.common.arguments import check_at_least, to_bytes, to_names, to_paths, to_seconds, to_types
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


def test_numbers_have_a_minimum() -> None:
    check_at_least(2, tokens=2, threads=None)
    with pytest.raises(McError, match="ctx must be at least 2, not 1") as caught:
        check_at_least(2, tokens=2, ctx=1, rows=0)
    assert caught.value.parameters == ("ctx",)


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
