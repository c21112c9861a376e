"""`mc-gguf plan`: budgets, strategies, the summary, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mc_gguf.artifacts import Calibration, FixedTypes, Plan
from mc_gguf.cli import main
from mc_gguf.cli.plan import command
from mc_gguf.container import file_bytes
from mc_gguf.plan import OBJECTIVES, STRATEGIES, Budget, fixed_types
from mc_gguf.plan import plan as make_plan
from mc_gguf.plan.request import PlanRequest
from mc_gguf.routing.metadata import routing_metadata_from
from tests.support import ROOT
from tests.support.synthetic_calibration import MERGED, NO_GATE, calibration, with_others

PUBLISHED = ROOT / "tests" / "data" / "mixtral-8x7b" / "calibration.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calib.safetensors"
    calibration().save(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)], catch_exceptions=False)


def fails(message: str, *arguments: object) -> None:
    """One line on stderr with this text, exit code 1."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_plan_is_written_after_its_summary(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "plan.json"
    result = run(source, "-o", output, "--bpw", 2.5)
    assert result.exit_code == 0
    assert result.stdout.startswith("plan            pmq, objective kld, budget 2.5 bpw\nfile size")
    assert f"wrote {output}" in result.stderr
    plan, loaded = Plan.load(output), Calibration.load(source)
    assert plan.experts == make_plan(loaded, Budget(bpw=2.5)).experts
    assert plan.calibration_fingerprint == loaded.fingerprint
    assert loaded.model is not None
    routing = routing_metadata_from(loaded)
    assert routing is not None
    assert plan.file_bytes == file_bytes(loaded.model, plan.experts, plan.fixed, routing)


def test_the_same_plan_is_the_same_file(source: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    run(source, "-o", one, "--size", "5.5MiB")
    run(source, "-o", two, "--size", "5.5MiB")
    assert one.read_bytes() == two.read_bytes()
    plan = Plan.load(one)
    assert plan.budget == {"size_bytes": 5.5 * 2**20}
    assert plan.file_bytes is not None
    assert 0 <= 5.5 * 2**20 - plan.file_bytes < 1024


def test_published_statistics_give_the_published_allocation(tmp_path: Path) -> None:
    """--bits-per-layer alone is enough: only strategy mc has nominal bits."""
    output = tmp_path / "plan.json"
    result = run(PUBLISHED, "-o", output, "--bits-per-layer", 16)
    assert "mc, objective published, budget 16 nominal bits per layer" in result.stdout
    expected = json.loads((PUBLISHED.parent / "allocation-16.json").read_text())["bits"]
    assert json.loads(output.read_text())["bits"] == expected


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = run(source, "-o", tmp_path / "plan.json", "--bpw", 2.5, "--dry-run")
    assert result.exit_code == 0
    assert "predicted error" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_summary_as_json(source: Path) -> None:
    result = run(source, "--bpw", 2.5, "--dry-run", "--json", "--strategy", "uniform")
    summary = json.loads(result.stdout)
    assert summary["strategy"] == "uniform"
    assert summary["type_counts"]["down"] == {"IQ2_XS": 48}
    assert summary["expert_bpw"] == 2.3125


def test_every_option_arrives(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    run(
        source,
        "-o",
        output,
        "--bpw",
        2.5,
        "--strategy",
        "random",
        "--types",
        "iq1_s, Q4_K,",
        "--seed",
        7,
        "--attn-type",
        "q8_0",
        "--attn-kv-type",
        "F16",
        "--embd-type",
        "Q4_K",
        "--output-type",
        "Q5_K",
    )
    plan = Plan.load(output)
    assert (plan.strategy, plan.types, plan.seed) == ("random", ("IQ1_S", "Q4_K"), 7)
    assert plan.fixed == FixedTypes(attn="Q8_0", attn_kv="F16", token_embd="Q4_K", output="Q5_K")


def test_sixteen_bits_measures_the_plain_file(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    run(source, "-o", output, "--bpw", 16)
    plan, loaded = Plan.load(output), Calibration.load(source)
    assert loaded.model is not None
    assert plan.fixed == fixed_types(loaded.model, Budget(bpw=16), FixedTypes())
    routing = routing_metadata_from(loaded)
    assert plan.file_bytes == file_bytes(loaded.model, plan.experts, plan.fixed, routing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Error: --size, --bpw, --bits-per-layer: .* exactly one"),
        (["--bpw", "2", "--size", "5MB"], "Error: --size, --bpw: .* exactly one"),
        (["--bpw", "-1"], "Error: --bpw: bpw must be a positive number"),
        (["--bpw", "0.3"], "1.5625 bpw to 8.5000 bpw"),
        (["--size", "1MB"], "file size of 1000000 bytes .* not feasible"),
        (["--size", "huge"], "Error: --size: 'huge' is not a size"),
        (["--bpw", "2", "--strategy", "x"], r"known: pmq \(one program .*; mc \("),
        (["--bpw", "2", "--types", "Q77"], "unknown ggml type"),
        (["--bpw", "2", "--attn-type", "Q77"], "--attn-type: unknown ggml type"),
        (["--bits-per-layer", "16", "--strategy", "pmq"], "only strategy mc"),
    ],
)
def test_bad_requests_write_nothing(source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    fails(message, source, "-o", tmp_path / "plan.json", *arguments)
    assert not list(tmp_path.iterdir())


def test_other_matrices_in_the_budget(tmp_path: Path) -> None:
    path, output = tmp_path / "calib", tmp_path / "plan.json"
    measured = with_others(calibration(), ("IQ4_XS", "Q6_K", "Q8_0"))
    measured.save(path)
    shown = run(path, "-o", output, "--size", "5.5MiB", "--others", "auto").stdout
    plan = Plan.load(output)
    assert tuple(plan.fixed.others) == measured.matrices
    assert len(set(plan.fixed.others.values())) > 1
    assert set(plan.fixed.others.values()) <= {"IQ4_XS", "Q6_K", "Q8_0"}
    assert "other matrices" in shown
    run(path, "-o", output, "--size", "5.5MiB")
    assert Plan.load(output).fixed == plan.fixed  # auto is the default
    run(path, "-o", output, "--size", "5.5MiB", "--others", "q6_k,")
    assert Plan.load(output).fixed.others == dict.fromkeys(measured.matrices, "Q6_K")
    run(path, "-o", output, "--size", "5.5MiB", "--others", "fixed")
    assert Plan.load(output).fixed == FixedTypes()
    run(path, "-o", output, "--size", "5.5MiB", "--attn-type", "Q8_0")
    assert Plan.load(output).fixed == FixedTypes(attn="Q8_0")
    wanted = (path, "-o", output, "--others", "auto")
    fails("Error: --others: .*size of the whole file", *wanted, "--bpw", 2)
    both = ("--size", "5.5MiB", "--attn-type", "Q8_0")
    fails("Error: --others: .*give one or the other", *wanted, *both)
    fails("Error: --others: give fixed, auto", path, "-o", output, "--size", "5.5MiB", "--others", ",")
    fails("Error: --others: .*measured for Q4_K", path, "-o", output, "--size", "5.5MiB", "--others", "Q4_K")
    calibration().save(path)
    fails("Error: --others: .*leave others fixed", *wanted, "--size", "5.5MiB")


@pytest.mark.parametrize("bpw", [5, 8])
def test_large_budgets_need_no_types(source: Path, tmp_path: Path, bpw: float) -> None:
    run(source, "-o", tmp_path / "plan.json", "--bpw", bpw)
    plan = Plan.load(tmp_path / "plan.json")
    assert bpw - 0.05 < plan.expert_bpw <= bpw


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
def test_experts_with_other_matrices(tmp_path: Path, projections: tuple[str, ...]) -> None:
    calibration(projections=projections).save(tmp_path / "calib")
    shown = run(tmp_path / "calib", "-o", tmp_path / "plan.json", "--bpw", 2.5).stdout
    assert [line.split()[0] for line in shown.splitlines() if "IQ" in line] == list(projections)
    assert tuple(Plan.load(tmp_path / "plan.json").experts) == projections


def test_a_missing_calibration_is_named(tmp_path: Path) -> None:
    fails(r"nothing\.safetensors", tmp_path / "nothing.safetensors", "--bpw", 2, "--dry-run")


def test_without_an_output_the_next_step_is_said(source: Path) -> None:
    result = run(source, "--bpw", 2.5)
    assert result.exit_code == 2
    assert "-o" in result.stderr


def test_the_help_states_the_real_names_and_defaults() -> None:
    options: dict[str, Any] = {p.name: p for p in command.params}
    for option, names in (("strategy", STRATEGIES), ("objective", OBJECTIVES)):
        words = set(re.findall(r"[\w-]+", options[option].help))
        assert set(names) <= words, option
    fields = {
        "attn_type": "attn",
        "attn_kv_type": "attn_kv",
        "embd_type": "token_embd",
        "output_type": "output",
    }
    for option, field in fields.items():
        assert f"[default: {getattr(FixedTypes(), field)}]" in options[option].help
    request = PlanRequest(bpw=2.0)
    assert (request.strategy_name, request.fixed) == ("pmq", FixedTypes())


def test_the_command_is_cheap_to_import() -> None:
    code = "import sys, mc_gguf.cli.plan; assert not {'numpy', 'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
