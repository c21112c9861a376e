"""Every Mixture-of-Experts architecture that llama.cpp runs, on random models that upstream's own test
writes: calibrate, plan, quantize with two types in every stack, load, evaluate, drop experts.

    python -m pytest tests/architectures --write-architectures

writes docs/reference/architectures.md, which the last test compares with what was found.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from mc_gguf.artifacts import EXPERT_STACK
from mc_gguf.calibrate.routed import Routing
from mc_gguf.calibrate.verify import verified_function
from mc_gguf.capture.capture import CaptureOptions, LayerRows, capture
from mc_gguf.capture.context import Devices
from mc_gguf.capture.spool import Spool
from mc_gguf.common.errors import SourceError
from mc_gguf.common.progress import progress
from mc_gguf.ggml.gguf_file import read_header
from mc_gguf.runtime import Runtime
from mc_gguf.runtime.builder import compile_program
from tests.architectures.models import PAIR, Found, Subject, describe
from tests.support import ROOT

pytestmark = pytest.mark.native

# What upstream's program writes with experts, by file name.
NAMES = (
    *("afmoe", "arctic", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "dbrx", "deepseek"),
    *("deepseek2", "deepseek32", "deepseek4", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe"),
    *("glm-dsa", "glm4moe", "glm5-next", "gpt-oss", "granite", "granitemoe", "grok", "grovemoe"),
    *("hunyuan-moe", "hy_v3", "hy_v4", "kimi-k3", "kimi-linear", "laguna", "lfm2moe", "llada-moe", "llama"),
    *("llama4", "maple", "mellum", "mimo2", "minicpm", "minimax-01", "minimax-m2", "minimax-m3", "mistral3"),
    *("mistral4", "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe"),
    *("qwen4exp", "refact", "rnd1", "smallthinker"),
)
# What cannot be converted, and why.
REFUSED = {"refact": "llama.cpp loads its experts, but its graph does not use them"}
REFERENCE = ROOT / "docs" / "reference" / "architectures.md"

found: dict[str, Found] = {}


@pytest.fixture(scope="module")
def models(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the random models."""
    folder = tmp_path_factory.mktemp("architectures")
    source = runtime.source_dir / "tests" / "test-llama-archs.cpp"
    program = compile_program(
        runtime, source, "architectures", headers=ROOT / "tests" / "native" / "architectures"
    )
    subprocess.run([program, "-o", folder, "-s", "1"], check=True, capture_output=True)
    return folder


def test_all_that_upstream_writes_is_known(models: Path) -> None:
    with_experts = [
        path.name.removesuffix("-moe.gguf")
        for path in sorted(models.glob("*.gguf"))
        if any(EXPERT_STACK.fullmatch(name) for name in read_header(path).tensors)
    ]
    assert tuple(with_experts) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_from_calibration_to_dropped_experts(models: Path, tmp_path: Path, name: str) -> None:
    subject = Subject(models / f"{name}-moe.gguf", tmp_path)
    plan = subject.mixed_plan()
    assert plan.fixed.others
    mixed = subject.write(plan, "mixed.gguf")
    uniform = [subject.write(subject.mixed_plan((kind, kind)), f"{kind}.gguf") for kind in PAIR]
    noise = np.max([subject.distance(path) for path in uniform], axis=0)
    assert (subject.distance(mixed) <= 1.5 * noise).all()

    plain, _ = subject.logits(mixed)
    unchanged, dropped = subject.logits(mixed, threshold=0.0)
    assert dropped == 0
    np.testing.assert_array_equal(unchanged, plain)
    changed, dropped = subject.logits(mixed, threshold=2.0)
    assert dropped > 0
    assert (changed != plain).any()
    found[name] = describe(subject, _function(subject))


def _function(subject: Subject):  # type: ignore[no-untyped-def]
    """The function of the experts, verified in every layer."""
    info, rows = subject.checkpoint.info, subject.rows[:1]
    spool, none = Spool(subject.folder / "spool"), np.zeros(0, np.int64)
    with progress("capture", quiet=True) as bar:
        capture(subject.path, info, CaptureOptions(rows, none, none), Devices(1), spool, bar)
    for layer in info.expert_layers:
        routing = Routing(LayerRows(spool, layer, rows.size, 0))
        function, why = verified_function(subject.checkpoint, routing)
        assert function is not None, why
    return function


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="did not compute the experts"):
        _ = Subject(models / f"{name}-moe.gguf", tmp_path).calibration


def test_the_reference_says_what_was_found(pytestconfig: pytest.Config) -> None:
    if not {*found, *REFUSED} == set(NAMES):
        pytest.skip("not all architectures were tried")
    text = _markdown()
    if pytestconfig.getoption("--write-architectures"):
        REFERENCE.write_text(text, encoding="utf-8")
    assert REFERENCE.read_text(encoding="utf-8") == text, "write it again, with --write-architectures"


def _markdown() -> str:
    rows = [f"| {x.name} | {x.matrices} | `{x.function}` |" for _, x in sorted(found.items())]
    refused = [f"| {name} | {why} |" for name, why in sorted(REFUSED.items())]
    return "\n".join(
        [
            "# Architectures",
            "",
            f"{len(found)} of the {len(NAMES)} Mixture-of-Experts models that llama.cpp's own test of",
            "architectures writes can be converted. For each of them a test calibrates with all default",
            "types, plans, quantizes with two types in every stack of experts, loads the file, compares its",
            "logits with those of the same weights as F32, and drops experts (`tests/architectures`). Their",
            "weights are random; trained models were only tried of the architecture `llama` (Mixtral).",
            "",
            "The function is what an expert computes between its matrices, as it is read from the runtime's",
            "graph and verified against the values that the runtime computed.",
            "",
            "| Architecture | Matrices of an expert; other matrices whose type is planned | Function |",
            "|---|---|---|",
            *rows,
            "",
            "Not possible:",
            "",
            "| Architecture | Why |",
            "|---|---|",
            *refused,
            "",
        ]
    )
