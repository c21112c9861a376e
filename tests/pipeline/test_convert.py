"""convert: the three steps in one, with files that are used again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import mc_gguf
from mc_gguf import Llama
from mc_gguf.artifacts import NO_CALIBRATION, Calibration, Plan
from mc_gguf.cli import main
from mc_gguf.common.errors import NoBudgetError, SourceError
from mc_gguf.common.progress import ProgressState
from mc_gguf.common.units import parse_size
from mc_gguf.container import MixedGguf
from mc_gguf.source import refuse_to_overwrite
from tests.support.moe_directories import CONFIGS, random_moe, save_moe

pytestmark = pytest.mark.native
QUICK = ("--tokens", "1024", "--ctx", "128", "--rows", "16", "--types", "IQ1_S,IQ2_XXS,Q2_K,Q3_K", "--quiet")


def convert(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def converted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 2.2 bits per expert weight, its plan and calibration beside it."""
    path = tmp_path_factory.mktemp("convert") / "model.gguf"
    result = convert(tiny_model, "-o", path, "--bpw", "2.2", *QUICK)
    assert result.exit_code == 0, result.output
    return path


def test_leaves_model_plan_and_calibration(converted: Path) -> None:
    names = {path.name for path in converted.parent.iterdir()}
    assert names == {"model.gguf", "model.plan.json", "model.calib.safetensors"}
    model, plan = MixedGguf.open(converted), Plan.load(converted.with_name("model.plan.json"))
    calibration = Calibration.load(converted.with_name("model.calib.safetensors"))
    assert model.is_mixed
    assert model.plan_fingerprint == plan.fingerprint
    assert model.calibration_fingerprint == plan.calibration_fingerprint == calibration.fingerprint
    assert converted.stat().st_size == plan.file_bytes
    assert model.routing is not None
    assert model.routing.profile is not None
    assert model.routing.model == plan.model_fingerprint
    np.testing.assert_array_equal(model.routing.profile.sensitivity, calibration.routing_sensitivity)
    assert model.expert_bpw is not None
    assert 2.1 < model.expert_bpw <= 2.2
    for layer in plan.layers:
        for expert in range(8):
            for projection in ("gate", "up", "down"):
                kind = plan.type_of(layer, expert, projection)
                assert model.type_of(layer, projection, expert).name == kind


def test_another_budget_uses_the_calibration_again(converted: Path, tiny_model: Path) -> None:
    calibration = converted.with_name("model.calib.safetensors")
    written, before = calibration.stat().st_mtime_ns, converted.read_bytes()
    size = converted.stat().st_size + 100_000
    result = convert(tiny_model, "-o", converted, "--size", str(size), *QUICK)
    assert result.exit_code == 0, result.output
    assert calibration.stat().st_mtime_ns == written
    assert size - 10_000 < converted.stat().st_size <= size
    again = convert(tiny_model, "-o", converted, "--bpw", "2.2", *QUICK)
    assert again.exit_code == 0, again.output
    assert converted.read_bytes() == before


def test_other_text_makes_a_new_calibration(converted: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    calibration = output.with_name("model.calib.safetensors")
    calibration.write_bytes(converted.with_name("model.calib.safetensors").read_bytes())
    before = calibration.read_bytes()
    result = convert(tiny_model, "-o", output, "--bpw", "2.2", *QUICK, "--seed", "1", "--dry-run")
    assert result.exit_code == 0, result.output
    assert calibration.read_bytes() != before
    assert not output.exists()


def test_a_listener_is_told_how_far_a_conversion_is(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[ProgressState] = []
    mc_gguf.convert(tiny_model, tmp_path / "m.gguf", bpw=16, progress=told.append)
    assert {state.label for state in told} == {"quantize"}
    done = [state.done for state in told]
    assert done == sorted(done)
    assert told[-1].done == told[-1].total > 0
    assert capfd.readouterr().err == ""


def test_sixteen_bits_need_no_calibration(tiny_model: Path, tmp_path: Path) -> None:
    result = convert(tiny_model, "-o", tmp_path / "m.gguf", "--bpw", "16", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["file_bytes"] == found["plan"]["file_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "m.plan.json"}
    model = MixedGguf.open(tmp_path / "m.gguf")
    assert not model.is_mixed
    assert model.expert_bpw == 16
    assert model.calibration_fingerprint == NO_CALIBRATION
    plan = ["quantize", str(tiny_model), str(tmp_path / "m.plan.json"), "-o", str(tmp_path / "n.gguf")]
    quantized = CliRunner().invoke(main, [*plan, "--json"])
    assert quantized.exit_code == 0
    same = {"output": str(tmp_path / "n.gguf"), "file_bytes": found["file_bytes"], "expert_bpw": 16.0}
    assert json.loads(quantized.stdout) == same
    assert (tmp_path / "n.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_a_given_calibration_is_used(converted: Path, tiny_model: Path, tmp_path: Path) -> None:
    given = converted.with_name("model.calib.safetensors")
    output = tmp_path / "u.gguf"
    result = convert(
        tiny_model, "-o", output, "--bpw", "2.2", "--strategy", "uniform", "--calibration", given, "--quiet"
    )
    assert result.exit_code == 0, result.output
    assert not MixedGguf.open(output).is_mixed


def test_a_budget_is_required(tiny_model: Path, tmp_path: Path) -> None:
    result = convert(tiny_model, "-o", tmp_path / "m.gguf")
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == "Error: --size, --bpw: no budget was given: give size or bpw"
    command = next(line for line in lines if "--size" in line and line.startswith("main"))
    size = command.split("--size ")[1]
    options = ("--size", size, *QUICK, "--dry-run", "--json")
    planned = convert(tiny_model, "-o", tmp_path / "m.gguf", *options)
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["plan"]["file_bytes"] <= parse_size(size)


def test_proposals_are_exact_sizes(tiny_model: Path, tmp_path: Path) -> None:
    """A file with one type for all experts has exactly the size that was proposed."""
    with pytest.raises(NoBudgetError) as caught:
        mc_gguf.convert(tiny_model, tmp_path / "m.gguf")
    error = caught.value
    assert error.parameters == ("size", "bpw")
    sizes = [proposal.size_bytes for proposal in error.proposals]
    assert len(sizes) >= 3
    assert sizes == sorted(sizes)
    assert all(proposal.fits for proposal in error.proposals)  # of megabytes
    assert error.memory_bytes > 100 * sizes[-1]
    proposal = next(p for p in error.proposals if p.bpw == 2.0625)
    written = mc_gguf.convert(
        str(tiny_model),
        str(tmp_path / "u.gguf"),
        size=proposal.size_bytes,
        strategy="uniform",
        types="IQ2_XXS",
        tokens=1024,
        ctx=128,
        rows=16,
        compensate=False,
        quiet=True,
    )
    assert written.header.file_bytes == proposal.size_bytes


def evaluating(folder: Path) -> bool:
    return (folder / ".model.calib.safetensors.partial" / "model.gguf").is_file()


def calibrating(folder: Path) -> bool:
    return any((folder / ".model.calib.safetensors.partial").glob("change-*.npy"))


def pieces_done(folder: Path, n: int) -> bool:
    journal = folder / ".model.gguf.partial" / "pieces" / "journal"
    return journal.is_file() and journal.read_bytes().count(b"\n") > n


def test_killed_anywhere_and_started_again_gives_the_same_bytes(
    converted: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model.gguf"
    command = [sys.executable, "-m", "mc_gguf", "convert", str(tiny_model), "-o", str(output), "--bpw", "2.2"]
    moments: list[Callable[[Path], bool]] = [
        evaluating,
        calibrating,
        lambda folder: (folder / "model.calib.safetensors").is_file(),
        lambda folder: any((folder / ".model.gguf.partial" / "bank").rglob("*.blocks")),
        lambda folder: pieces_done(folder, 0),
        lambda folder: pieces_done(folder, 40),
    ]
    for reached in moments:
        with subprocess.Popen([*command, *QUICK], stdout=subprocess.DEVNULL) as process:
            while not reached(tmp_path):
                assert process.poll() is None, "it came through before it could be killed"
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert not output.exists()
    done = subprocess.run([*command, *QUICK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == converted.read_bytes()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.gguf", "model.plan.json", "model.calib.safetensors"}


def test_the_source_is_not_overwritten(tiny_model: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model-00001-of-00001.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    for source, output in ((copy, copy), (tiny_model, tiny_model / "model.safetensors")):
        before = output.read_bytes()
        result = convert(source, "-o", output, "--bpw", "16")
        assert result.exit_code == 1
        assert "source model" in result.output
        assert output.read_bytes() == before
    other = tmp_path / "model-00002-of-00002.gguf"
    other.write_bytes(b"")
    with pytest.raises(SourceError):
        refuse_to_overwrite(other, copy)
    refuse_to_overwrite(copy, tiny_gguf)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bpw", "2.2", "--strategy", "bogus"], "unknown strategy"),
        (["--bpw", "2.2", "--attn-type", "Q9"], "--attn-type: unknown ggml type"),
        (["--bpw", "0.5"], "not feasible"),
        (["--size", "1000"], "not feasible"),
        (["--bpw", "2.2", "--strategy", "mc", "--types", "Q2_K"], "its own types"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_calibrating(
    tiny_model: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    result = convert(tiny_model, "-o", tmp_path / "m.gguf", *options)
    assert result.exit_code == 1
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_calibration_beside_the_output_is_made_again(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.calib.safetensors").write_bytes(b"damaged")
    result = convert(tiny_model, "-o", tmp_path / "model.gguf", "--bpw", "2.2", *QUICK)
    assert result.exit_code == 0, result.output
    assert Calibration.load(tmp_path / "model.calib.safetensors").layers == tuple(range(6))


def test_other_plans_use_the_same_calibration(converted: Path, tiny_model: Path) -> None:
    calibration = converted.with_name("model.calib.safetensors")
    written = calibration.stat().st_mtime_ns
    for options in (["--strategy", "random"], ["--types", "IQ1_S,Q3_K"]):
        quick = QUICK if "--types" not in options else (*QUICK[:6], "--quiet")
        result = convert(tiny_model, "-o", converted, "--bpw", "2.2", *quick, *options, "--dry-run")
        assert result.exit_code == 0, result.output
    assert calibration.stat().st_mtime_ns == written


def test_the_range_of_sizes_is_the_same_before_and_after_calibration(
    converted: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """What convert says without a calibration, plan says with it; one byte less is refused at once."""
    calibration, types = (
        converted.with_name("model.calib.safetensors"),
        ("--types", "IQ1_S,IQ2_XXS,Q2_K,Q3_K"),
    )
    for more in ((), ("--embd-type", "Q4_K", "--output-type", "Q8_0"), ("--others", "Q4_K,Q6_K")):
        early = convert(tiny_model, "--size", "1KiB", *types, *more, "-o", tmp_path / "m.gguf")
        plan = ["plan", calibration, "--size", "1KiB", *types, *more, "-o", tmp_path / "m.plan.json"]
        late = CliRunner().invoke(main, [*map(str, plan)])
        bounds = [re.search(r"reach from (\d+) bytes .* to (\d+) bytes", x.stderr) for x in (early, late)]
        assert bounds[0] is not None
        assert bounds[1] is not None
        assert bounds[0].groups() == bounds[1].groups()
        smallest = int(bounds[0][1])
        plan[3] = str(smallest)
        assert CliRunner().invoke(main, [*map(str, plan)]).exit_code == 0
        refused = convert(tiny_model, "--size", str(smallest - 1), *types, *more, "-o", tmp_path / "m.gguf")
        assert "is not feasible" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.plan.json"]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_directories_of_every_architecture_convert(name: str, tmp_path: Path) -> None:
    """64 experts of widths that k-quants cannot take: the types that can, mixed, close to the 16-bit file."""
    source = save_moe(random_moe(name, num_hidden_layers=1), tmp_path / "hf")
    mixed, plain = tmp_path / "mixed.gguf", tmp_path / "plain.gguf"
    options = ["--bpw", "6.5", "--tokens", "1024", "--ctx", "128", "--rows", "8"]
    for output, extra in ((mixed, options), (plain, ["--bpw", "16"])):
        result = convert(source, "-o", output, *extra, "--threads", "1", "--quiet")
        assert result.exit_code == 0, result.output
    model = MixedGguf.open(mixed)
    assert model.is_mixed
    assert model.expert_bpw == pytest.approx(6.5, abs=0.05)
    logits = []
    for path in (mixed, plain):
        llm = Llama(path, n_ctx=64, n_batch=64, logits_all=True, n_threads=1)
        llm.eval(list(range(5, 65)))
        logits.append(np.array(llm.scores[:60]))
        llm.close()
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.98


def test_refined_and_killed_gives_a_refined_file(converted: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Killed in the search, and after it: the same command takes the plan that was found."""
    output, calibration = tmp_path / "model.gguf", converted.with_name("model.calib.safetensors")
    options = ["--bpw", "2.2", *QUICK, "--refine", "1s", "--no-compensate"]
    command = [sys.executable, "-m", "mc_gguf", "convert", str(tiny_model), "-o", str(output), *options]
    command += ["--calibration", str(calibration)]
    search = tmp_path / ".model.refined.plan.json.partial" / "search"
    moments: list[Callable[[Path], bool]] = [
        lambda folder: search.is_dir(),
        lambda folder: pieces_done(folder, 0),
    ]
    for reached in moments:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not reached(tmp_path):
                assert process.poll() is None, "it came through before it could be killed"
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
    assert not search.exists()
    refined = output.with_name("model.refined.plan.json")
    written = refined.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "KL divergence on held-out text" in done.stdout
    assert refined.stat().st_mtime_ns == written
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.gguf", "model.plan.json", "model.refined.plan.json"}
    model, plan = MixedGguf.open(output), Plan.load(refined)
    assert model.plan_fingerprint == plan.fingerprint
    assert plan.strategy == "pmq+refine"
    assert output.stat().st_size == plan.file_bytes


def test_refines_another_architecture_on_compensated_blocks(tmp_path: Path) -> None:
    """With a shared expert; what the search compensated is not made again, and nothing of it is left."""
    model = random_moe("Qwen2Moe", num_hidden_layers=1, num_experts=6, num_experts_per_tok=3)
    source, folder = save_moe(model, tmp_path / "hf"), tmp_path / "out"
    folder.mkdir()
    options = ["--bpw", "6", "--tokens", "2048", "--ctx", "128", "--rows", "8", "--threads", "1"]
    result = convert(source, "-o", folder / "m.gguf", *options, "--refine", "10s")
    assert result.exit_code == 0, result.output
    assert "KL divergence on held-out text" in result.stdout
    assert result.stderr.count("error compensation:") == 1
    names = {path.name for path in folder.iterdir()}
    assert names == {"m.gguf", "m.plan.json", "m.refined.plan.json", "m.calib.safetensors"}
    written, plan = MixedGguf.open(folder / "m.gguf"), Plan.load(folder / "m.refined.plan.json")
    assert written.plan_fingerprint == plan.fingerprint
    assert plan.strategy == "pmq+refine"
    assert plan.expert_bpw <= 6
