"""tools/upstream_tests.py: what runs and what is left out. The tests themselves take too long for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tools import upstream_tests
from tools.upstream_tests import REASONS, _test, left_out_of_python


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"LABELS": ["main"]}, ""),
        ({}, ""),
        ({"LABELS": ["model"]}, REASONS["model"]),
        ({"LABELS": ["python"]}, REASONS["python"]),
        ({"LABELS": ["main"], "FIXTURES_REQUIRED": ["test-download-model"]}, REASONS["model"]),
        ({"LABELS": ["main"], "FIXTURES_REQUIRED": ["generate-models"]}, ""),
    ],
)
def test_what_ctest_leaves_out(properties: dict[str, Any], reason: str) -> None:
    entry = {
        "name": "test-x",
        "properties": [{"name": name, "value": value} for name, value in properties.items()],
    }
    found = _test(entry, Path("/build/bin/test-y"), Path("/build/bin"))
    assert (found.name, found.target, found.reason) == ("test-x", "test-y", reason)
    assert _test(entry, Path("/source/tests/x.sh"), Path("/build/bin")).reason


def test_what_llama_cpp_python_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "def test_one():\n    pass\n\n\ndef test_two(llama_cpp_model_path):\n    pass\n\n\n"
        "def test_three(\n    request,\n    model_path_fixture,\n):\n    pass\n"
    )
    assert left_out_of_python(tmp_path) == ["tests/test_a.py::test_two", "tests/test_a.py::test_three"]


def test_an_unknown_suite_is_refused() -> None:
    result = CliRunner().invoke(upstream_tests.main, ["--only", "pytest"])
    assert result.exit_code == 2
    assert "is not one of 'ctest', 'ops', 'python'" in result.stderr
