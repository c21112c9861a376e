"""`mc-gguf inspect` on mixed, plain and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mc_gguf.cli import main
from tests.support.gguf_models import (
    ONES,
    TWOS,
    RandomCheckpoint,
    take_apart,
    uniform,
    write_parts,
    write_random,
)

pytestmark = pytest.mark.native

TYPES = {
    "gate": [["Q8_0", "Q4_0", "Q8_0"], ["Q4_0"] * 3],
    "up": [["Q8_0", "Q4_0", "Q4_0"], ["Q4_0"] * 3],
    "down": [["Q8_0", "Q5_0", "F16"], ["Q4_0"] * 3],
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    write_random(tmp_path / "mixed.gguf", RandomCheckpoint(2, 3), TYPES)
    return tmp_path / "mixed.gguf"


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["inspect", *map(str, args)])
    return result.exit_code, result.output


def test_json(mixed: Path) -> None:
    code, output = run(mixed, "--json")
    found = json.loads(output)
    assert code == 0
    assert found["file_bytes"] == mixed.stat().st_size
    assert found["architecture"] == "llama"
    assert found["mixed"] is True
    assert (found["plan_fingerprint"], found["calibration_fingerprint"]) == (ONES, TWOS)
    assert found["expert_bpw"] == pytest.approx((3 * 8.5 + 5.5 + 16 + 3 * 4.5 + 8.5 + 9 * 4.5) / 18)
    layers = [[{p: TYPES[p][layer][e] for p in TYPES} for e in range(3)] for layer in range(2)]
    assert found["layers"] == [{"layer": i, "experts": row} for i, row in enumerate(layers)]


def test_table(mixed: Path) -> None:
    code, output = run(mixed)
    assert code == 0
    lines = output.splitlines()
    assert "mixed-expert GGUF, llama" in lines[0]
    assert f"({mixed.stat().st_size} bytes)" in lines[0]
    assert f"plan {ONES}" in lines
    assert "    0  Q8_0  Q4_0/Q4_0/Q5_0  Q8_0/Q4_0/F16" in lines
    assert "    1  Q4_0  Q4_0            Q4_0" in lines
    total = next(line.split() for line in lines if line.startswith("Q8_0"))
    assert total[1:4] == ["2", "1", "1"]


def test_plain_file_without_experts_of_ours(mixed: Path, tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(1, 3)
    write_random(tmp_path / "u.gguf", checkpoint, uniform(checkpoint.info, "Q4_0"))
    kv, parts = take_apart(tmp_path / "u.gguf")
    write_parts(tmp_path / "plain.gguf", {k: v for k, v in kv.items() if not k.startswith("mc_gguf")}, parts)
    code, output = run(tmp_path / "plain.gguf")
    assert code == 0
    assert "plain GGUF" in output
    assert "    0  Q4_0 (all 3)" in output
    assert "plan" not in output.splitlines()[2]
    dense = [p for p in parts if "_exps" not in p.name]
    write_parts(tmp_path / "dense.gguf", {k: v for k, v in kv.items() if not k.startswith("mc_gguf")}, dense)
    code, output = run(tmp_path / "dense.gguf")
    assert code == 0
    assert "no routed experts" in output
    code, output = run(tmp_path / "dense.gguf", "--json")
    assert json.loads(output)["layers"] == []
    assert json.loads(output)["expert_bpw"] is None


def test_many_experts_are_counted(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(1, 20)
    row = [["Q8_0"] * 4 + ["Q4_0"] * 16]
    write_random(tmp_path / "m.gguf", checkpoint, {p: row for p in TYPES})
    code, output = run(tmp_path / "m.gguf")
    assert code == 0
    assert "    0  16 x Q4_0, 4 x Q8_0" in output


def test_damage_is_one_line(mixed: Path) -> None:
    mixed.write_bytes(mixed.read_bytes()[:-100])
    code, output = run(mixed)
    assert code == 1
    assert output.startswith("Error: ")
    assert "truncated" in output
    assert len(output.splitlines()) == 1
    code, output = run(mixed.with_name("nothing.gguf"))
    assert code == 1
    assert "nothing.gguf" in output
