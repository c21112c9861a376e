"""What tools/compilers.py makes of results and logs; building is left to `make test-compilers`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mc_gguf.common.errors import McError
from tools.compilers import (
    CONFIGURATIONS,
    LAST_LINE,
    chosen,
    largest_difference,
    own_findings,
    share_of_bytes,
)


@pytest.fixture
def results(tmp_path: Path) -> tuple[Path, Path]:
    """The results of two builds: op results of two types, and four bytes of one."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder, change in zip(folders, (0.0, 0.5), strict=True):
        folder.mkdir()
        np.array([1, -4, 2 + change], np.float32).tofile(folder / "q2_K.op")
        np.array([100, 100.25], np.float32).tofile(folder / "q3_K.op")
        np.array([1, 2, 3, 4 + (change > 0)], np.uint8).tofile(folder / "q2_K.blocks")
    return folders


def test_differences(results: tuple[Path, Path]) -> None:
    assert largest_difference(*results) == "1.2e-01 q2_K"
    assert share_of_bytes(*results, "blocks") == "25 %"
    assert (
        largest_difference(results[0], results[0])
        == share_of_bytes(results[1], results[1], "blocks")
        == "equal"
    )


def test_warnings_about_our_lines_only(tmp_path: Path) -> None:
    tree, folder = tmp_path / "source", tmp_path / "build"
    log = [
        "../source/mc/cpu/routing.cpp:3:1: warning: ours [-Wall]",
        f"{tree}/src/llama-graph.cpp:7:1: warning: our line in a file of upstream's",
        "../source/src/llama-graph.cpp:8:1: warning: upstream's line",
        "../source/src/llama-model.cpp:7:1: warning: upstream's file",
        "../source/mc/cpu/routing.cpp:3:1: note: more about it",
    ]
    found = list(own_findings("\n".join(log), folder, tree, {"src/llama-graph.cpp": {7}}))
    assert found == log[:2]
    reports = [line.replace(": warning:", ": runtime error:") for line in log]
    assert list(own_findings("\n".join(reports), folder, tree, {"src/llama-graph.cpp": {7}})) == reports[:2]


def test_instructions_that_are_not_wanted_are_off() -> None:
    """Upstream turns AVX2 on by itself where -march=native is off."""
    flags = CONFIGURATIONS["gcc-sse42"].flags
    assert [flag for flag in flags if flag.endswith("=ON")] == ["-DGGML_SSE42=ON"]
    assert {"-DGGML_AVX=OFF", "-DGGML_AVX2=OFF", "-DGGML_FMA=OFF", "-DGGML_AVX512=OFF"} < {*flags}
    assert "-DGGML_AVX512=OFF" in CONFIGURATIONS["clang-avx2"].flags
    assert "OFF" not in "".join(CONFIGURATIONS["gcc-avx512"].flags[1:])


def test_names_are_checked_and_the_reference_comes_first() -> None:
    assert chosen(["mingw-w64"]) == ["gcc-native", "mingw-w64"]
    assert chosen([]) == list(CONFIGURATIONS)
    with pytest.raises(McError, match="no configuration 'msvc': one of gcc-native"):
        chosen(["msvc"])


@pytest.mark.parametrize("line", ["532 passed, 0 failed", "passed 85 failed 0"])
def test_what_the_native_tests_print_last(line: str) -> None:
    assert LAST_LINE.fullmatch(line)
    assert not LAST_LINE.fullmatch(line.replace(" 0", " 1").replace("d 0", "d 1"))
