"""`mc-gguf routing set` and `show`, and that the runtime loads what they wrote."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mc_gguf import Llama
from mc_gguf.artifacts import PROJECTIONS
from mc_gguf.cli import main
from mc_gguf.container import read_routing
from mc_gguf.quantize.writer import write_model
from mc_gguf.routing.metadata import choose_thresholds, routing_metadata_from
from mc_gguf.routing.options import OPTIONS
from mc_gguf.routing.policy import POLICIES
from mc_gguf.source import open_checkpoint
from tests.support.command_line import fails_with, invoke
from tests.support.gguf_models import (
    RandomCheckpoint,
    make_calibration,
    make_plan,
    take_apart,
    uniform,
    write_parts,
    write_random,
)

TYPES = {p: [["Q8_0", "Q4_0", "Q8_0"], *[["Q4_0"] * 3] * 3] for p in PROJECTIONS}


def run(*args: object) -> Result:
    return invoke("routing", *args)


def fails(message: str, *args: object) -> None:
    fails_with(re.escape(message), "routing", *args)


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    make_calibration(RandomCheckpoint(4, 3).info, tmp_path / "calib.safetensors")
    return tmp_path / "calib.safetensors"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    checkpoint = RandomCheckpoint(4, 3)
    routing = routing_metadata_from(make_calibration(checkpoint.info, tmp_path / "own.safetensors"))
    assert routing is not None
    write_random(
        tmp_path / "ours.gguf", checkpoint, TYPES, choose_thresholds(routing, quantile=0.5, layers="all")
    )
    return tmp_path / "ours.gguf"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    checkpoint = RandomCheckpoint(4, 3)
    write_random(tmp_path / "u.gguf", checkpoint, uniform(checkpoint.info, "Q4_0"))
    kv, parts = take_apart(tmp_path / "u.gguf")
    write_parts(tmp_path / "plain.gguf", {k: v for k, v in kv.items() if not k.startswith("mc_gguf")}, parts)
    return tmp_path / "plain.gguf"


def test_show(ours: Path) -> None:
    lines = run("show", ours).stdout.splitlines()
    assert lines[0] == (
        f"{ours}: 4 of 4 layers may drop experts, 2 % of a prompt's tokens are protected; "
        "predicted: 25.0 % of the expert activations dropped, KL divergence 0.0160 nats per token"
    )
    assert lines[2].split() == ["layer", "active", "dropped", "damage", "sensitivity", "thresholds"]
    assert lines[3].split() == ["0", "yes", "25.0", "%", "0.00100", "0.00100", "0.5000"]
    assert lines[6].split() == ["3", "yes", "25.0", "%", "0.00800", "0.00800", "0.2500"]
    found = json.loads(run("show", ours, "--json").stdout)
    assert found["path"] == str(ours)
    assert found["layers"][3]["sensitivity"] == 0.008
    assert found["predicted_drop"] == pytest.approx(0.25)


def test_set_in_place_and_elsewhere(ours: Path, tmp_path: Path) -> None:
    before = ours.read_bytes()
    options = ("--quantile", "30%", "--protect", 0.1, "--layers", "0,2")
    result = run("set", ours, "-o", tmp_path / "new" / "copy.gguf", *options, "--json")
    assert result.exit_code == 0
    assert ours.read_bytes() == before
    found = json.loads(result.stdout)
    assert (found["active"], found["protect"]) == ([0, 2], 0.1)
    assert found["predicted_drop"] == pytest.approx(0.3 / 4, abs=1e-6)
    assert [row["dropped"] for row in found["layers"]] == pytest.approx([0.15, 0, 0.15, 0], abs=1e-6)
    result = run("set", ours, *options)
    assert result.exit_code == 0
    assert "copy: 100 %" in result.stderr
    assert ours.read_bytes() == (tmp_path / "new" / "copy.gguf").read_bytes()
    assert result.stdout == run("show", ours).stdout
    run("set", ours, "--quantile", 0.5, "--layers", "all")
    assert ours.read_bytes() == before


@pytest.mark.parametrize("drop", ["15%", "0.15"])
def test_target_drop_costs_less_than_one_quantile(ours: Path, drop: str) -> None:
    wanted = json.loads(run("set", ours, "--target-drop", drop, "--json").stdout)
    evenly = json.loads(run("set", ours, "--quantile", 0.3, "--json").stdout)
    assert wanted["predicted_drop"] == pytest.approx(0.15, abs=1e-5)
    assert evenly["predicted_drop"] == pytest.approx(0.15, abs=1e-5)
    assert wanted["predicted_damage"] < evenly["predicted_damage"]


def test_a_plain_file_gets_routing_from_a_calibration(plain: Path, calibration: Path, tmp_path: Path) -> None:
    fails("plain.gguf carries no routing profile", "set", plain)
    fails("plain.gguf carries no routing;", "show", plain)
    assert run("set", plain, "--calibration", calibration, "--layers", "all").exit_code == 0
    metadata = read_routing(plain)
    assert metadata is not None
    assert metadata.active == (0, 1, 2, 3)
    assert run("set", plain, "--quantile", 0.25).exit_code == 0  # from here on the file knows enough
    assert run("show", plain).exit_code == 0


def test_what_is_refused(ours: Path, plain: Path, calibration: Path, tmp_path: Path) -> None:
    untouched = ours.read_bytes(), plain.read_bytes()
    other = tmp_path / "other.safetensors"
    make_calibration(RandomCheckpoint(4, 3, n_embd=64).info, other)
    checkpoint = RandomCheckpoint(1, 3)
    write_random(tmp_path / "u.gguf", checkpoint, uniform(checkpoint.info, "Q4_0"))
    kv, parts = take_apart(tmp_path / "u.gguf")
    dense = {k: v for k, v in kv.items() if not k.startswith("mc_gguf") and ".expert_" not in k}
    write_parts(tmp_path / "dense.gguf", dense, [p for p in parts if "_exps" not in p.name])
    for message, args in (
        ("made with another model", (ours, "--calibration", other)),
        ("made with another model", (plain, "--calibration", other)),
        ("this is no model with experts", (tmp_path / "dense.gguf", "--calibration", calibration)),
        ("layer 7 has no experts", (ours, "--layers", "0,7")),
        ("Error: --layers: '0-3' names no layers", (ours, "--layers", "0-3")),
        ("Error: --target-drop: 'a third' is not a share", (ours, "--target-drop", "a third")),
        ("'1.5' is not a share", (ours, "--quantile", 1.5)),
        ("60 % of the expert activations cannot be dropped", (ours, "--target-drop", 0.6)),
        ("cannot read", (tmp_path / "nothing.gguf",)),
        ("cannot read", (ours, "--calibration", tmp_path / "nothing")),
    ):
        fails(message, "set", *args)
    both = ("--target-drop", "15%", "--quantile", "0.5")
    fails("Error: --quantile, --target-drop: these exclude each other", "set", ours, *both)
    assert (ours.read_bytes(), plain.read_bytes()) == untouched
    assert not list(tmp_path.glob(".*"))


def test_inspect_says_it_in_a_line(ours: Path, plain: Path) -> None:
    lines = CliRunner().invoke(main, ["inspect", str(ours)]).stdout.splitlines()
    assert [line for line in lines if line.startswith("routing: 4 of 4 layers may drop experts")]
    found = json.loads(CliRunner().invoke(main, ["inspect", str(ours), "--json"]).stdout)
    shown = json.loads(run("show", ours, "--json").stdout)
    assert found["routing"] == {key: value for key, value in shown.items() if key != "path"}
    assert "routing:" not in CliRunner().invoke(main, ["inspect", str(plain)]).stdout
    assert json.loads(CliRunner().invoke(main, ["inspect", str(plain), "--json"]).stdout)["routing"] is None


def logits(path: Path, routing: str) -> Any:
    llm = Llama(path, n_ctx=256, logits_all=True, routing=routing)
    llm.eval(llm.tokenize(b"Once upon a time there was a little dog"))
    return np.array(llm.scores[: llm.n_tokens])


@pytest.mark.native
def test_the_runtime_loads_what_was_written(tiny_gguf: Path, tmp_path: Path) -> None:
    """Plain and mixed: the same logits with routing off, and with routing auto the file's own thresholds."""
    source = open_checkpoint(tiny_gguf)
    calibration = make_calibration(source.info, tmp_path / "c.safetensors")
    types = uniform(source.info, "Q4_K")
    types = {p: tuple((*row[:-1], "Q2_K") for row in rows) for p, rows in types.items()}
    plan = make_plan(source.info, types, tmp_path / "p.json", calibration.fingerprint)
    write_model(source, calibration, plan, tmp_path / "mixed.gguf", threads=2)
    shutil.copyfile(tiny_gguf, tmp_path / "plain.gguf")
    for path in (tmp_path / "mixed.gguf", tmp_path / "plain.gguf"):
        before = logits(path, "off")
        extra = ("--quantile", 1, "--protect", 0, "--layers", "all")
        assert run("set", path, "--calibration", tmp_path / "c.safetensors", *extra).exit_code == 0
        np.testing.assert_array_equal(logits(path, "off"), before)
        assert np.abs(logits(path, "auto") - before).max() > 0.1
        assert run("set", path, "--quantile", 0).exit_code == 0
        np.testing.assert_array_equal(logits(path, "auto"), before)  # nothing is below a threshold of 0


def test_policies_lists_every_policy_and_option() -> None:
    text = run("policies").stdout
    for name in (*POLICIES, *OPTIONS):
        assert re.search(rf"^  {name} ", text, re.M), name
