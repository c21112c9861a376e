"""Our ops on the CPU: MUL_MAT_ID_GROUPED equals MUL_MAT_ID bit for bit; routing; upstream's test program."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest

from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.runtime import Runtime, check_struct
from mc_gguf.runtime.builder import build_tests, compile_program
from tests.support import ROOT

pytestmark = pytest.mark.native
SOURCES = ROOT / "tests" / "native"


@pytest.mark.parametrize("tiled", ["0", "1"])
def test_op_equals_mul_mat_id_bit_for_bit(runtime: Runtime, tiled: str) -> None:
    program = compile_program(runtime, SOURCES / "test-mul-mat-id-grouped.cpp", "test-mul-mat-id-grouped")
    env = os.environ | {"GGML_CPU_TILED_MM": tiled}
    done = subprocess.run([program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    passed, _, failed, _ = done.stdout.splitlines()[-1].split()
    assert int(passed) > 500
    assert int(failed) == 0


def test_routing_ops(runtime: Runtime) -> None:
    program = compile_program(runtime, SOURCES / "test-routing-ops.cpp", "test-routing-ops")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.fullmatch(r"passed [1-9]\d+ failed 0", done.stdout.splitlines()[-1])


def test_compensation_library(runtime: Runtime) -> None:
    source = SOURCES / "test-mc-quantize.cpp"
    program = compile_program(runtime, source, "test-mc-quantize", libraries=("mc-quantize",))
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.fullmatch(r"passed [1-9]\d+ failed 0", done.stdout.splitlines()[-1])


def test_a_struct_of_another_size_is_refused(runtime: Runtime) -> None:
    class Params(ctypes.Structure):
        _fields_ = (("policy", ctypes.c_int32),)

    with pytest.raises(RuntimeBuildError, match=r"mc_routing_params has \d+ bytes .* declares 4; run:"):
        check_struct("mc_routing_params", Params)
    with pytest.raises(RuntimeBuildError, match=r"no_such_struct has 0 bytes"):
        check_struct("no_such_struct", Params)


def test_backend_ops_cases_pass(runtime: Runtime) -> None:
    program = build_tests(runtime)
    command: list[str | Path] = [
        program,
        "test",
        "-b",
        "CPU",
        "-o",
        "MUL_MAT_ID_GROUPED,MC_QK_RECEIVED,MC_MASK_WEIGHTS,MC_COUNT",  # outputs: a chain goes by its last op
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert_all_passed(done.stdout)


def assert_all_passed(output: str) -> None:
    """Of the cases that were asked for at least one ran, and none failed."""
    counts = [(int(n), int(of)) for n, of in re.findall(r"(\d+)/(\d+) tests passed", output)]
    assert counts, output[-2000:]
    assert all(n == of > 0 for n, of in counts), counts


def test_upstreams_own_cases_still_pass(runtime: Runtime) -> None:
    program = build_tests(runtime)
    shapes = "m=512,n=(1|32|129),k=256"  # the shapes of whole models take minutes and gigabytes
    command: list[str | Path] = [program, "test", "-b", "CPU", "-o", "MUL_MAT_ID,MUL_MAT,GLU", "-p", shapes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert_all_passed(done.stdout)
