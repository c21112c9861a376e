"""ggml's quantizers, given what no model has: an error or sane blocks, never an abort or silent zeros."""

from __future__ import annotations

import json

import pytest

from tests.support.child import run_python

pytestmark = pytest.mark.native

# Prints [type, weights, importance, error or relative squared error] of every combination.
TRY = """
import json
import numpy as np
from mc_gguf.common.errors import McError
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import TYPES

rng = np.random.default_rng(0)
plain = rng.standard_normal((4, 256)).astype(np.float32)

def one(value, array=plain):
    changed = array.copy()
    changed.reshape(-1)[300 % array.size] = value
    return changed

weights = {"plain": plain, "small": plain * np.float32(1e-4), "large": plain * np.float32(1e4)}
weights |= {"tiny": plain * np.float32(1e-30), "denormal": plain * np.float32(1e-42)}
weights |= {"zeros": plain * 0, "constant": np.full_like(plain, 0.5), "one 6e4": one(6e4)}
weights |= {f"one {v:g}": one(v) for v in (1e5, -1e9, 1e15, 1e19, -1e30, 3e38, np.inf, -np.inf, np.nan)}
ones = np.ones(256, dtype=np.float32)
wild = (10.0 ** rng.uniform(-38, 38, 256)).astype(np.float32)
importance = {"ones": ones, "wild": wild, "zeros": ones * 0, "one 3e38": one(3e38, ones), "none": None}
importance |= {f"{v:g}": np.full(256, v, dtype=np.float32) for v in (1e-44, 1e-30, 1e10, 1e30, 3e38)}
importance |= {f"one {v:g}": one(v, ones) for v in (np.nan, np.inf, -1)}
importance["short"] = ones[:100]
for kind in TYPES:
    for w, rows in weights.items():
        for i, values in importance.items():
            if w != "plain" and i not in ("ones", "wild", "3e+38"):
                continue
            try:
                blocks = quantize_rows(rows, kind, values, 1)
                found = dequantize_rows(blocks, kind, 256, 4).astype(np.float64)
                size = (rows.astype(np.float64) ** 2).sum()
                result = float(((found - rows) ** 2).sum() / size) if size else float((found ** 2).sum())
            except McError as error:
                result = str(error)
            print(json.dumps([kind, w, i, result]))
"""
REFUSED_WEIGHTS = ("100000", "-1e+09", "1e+15", "1e+19", "-1e+30", "3e+38", "inf", "-inf", "nan")
REFUSED_IMPORTANCE = ("one nan", "one inf", "one -1", "short")


def test_no_value_aborts_and_none_gives_zeros() -> None:
    done = run_python(TRY, timeout=300)
    assert done.code == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({kind for kind, *_ in results}) >= 17
    for kind, weights, importance, result in results:
        case = (kind, weights, importance, result)
        value = weights.removeprefix("one ")
        if importance in REFUSED_IMPORTANCE:
            assert "importance matrix" in result, case
        elif value in REFUSED_WEIGHTS and not (kind in ("F32", "BF16") and abs(float(value)) <= 3e38):
            assert isinstance(result, str), case
            assert "row 1 has the weight" in result, case
            assert "the source is damaged" in result, case
        elif importance == "none" and isinstance(result, str):
            assert "needs an importance matrix" in result, case
        else:
            assert isinstance(result, float), case
            _check_error(case, weights, importance, result)


def _check_error(case: object, weights: str, importance: str, error: float) -> None:
    """ggml takes groups of tiny weights for zeros, and `wild` says that most of a row does not matter."""
    if weights in ("tiny", "denormal"):
        assert error <= 1.0 + 1e-9, case
    elif weights == "zeros":
        assert error < 1e-9, case
    elif weights.startswith("one ") or importance in ("wild", "one 3e38"):
        assert error < 30, case
    else:
        assert error < 0.45, case


def test_only_ratios_of_importances_count() -> None:
    code = """
import numpy as np
from mc_gguf.ggml.quantizers import quantize_rows
rng = np.random.default_rng(1)
rows = rng.standard_normal((4, 512)).astype(np.float32)
importance = rng.random(512).astype(np.float32) + np.float32(0.01)
for kind in ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q2_K", "Q4_K", "IQ4_XS"):
    wanted = quantize_rows(rows, kind, importance, 1)
    for exponent in (-100, -60, -12, 12, 60, 100):
        found = quantize_rows(rows, kind, np.ldexp(importance, exponent), 1)
        assert (found == wanted).all(), (kind, exponent)
"""
    done = run_python(code, timeout=120)
    assert done.code == 0, done.stderr[-2000:]


def test_what_is_too_small_for_a_type_is_said() -> None:
    """A warning where, and only where, most of a matrix is lost."""
    code = """
import logging
import numpy as np
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows, warn_if_lost
from mc_gguf.ggml.types import TYPES

said = []
handler = logging.Handler()
handler.emit = said.append
logging.getLogger("mc_gguf").addHandler(handler)
plain = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
lost = kept = 0
for kind in TYPES:
    for factor in (1, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 0):
        rows = plain * np.float32(factor)
        blocks = quantize_rows(rows, kind, np.ones(512, np.float32), 1)
        found = dequantize_rows(blocks, kind, 512, 4).astype(np.float64)
        said.clear()
        warn_if_lost("a.weight", rows, blocks, kind)
        wrong = ((found - rows) ** 2).sum() > 0.5 * (rows.astype(np.float64) ** 2).sum()
        assert len(said) == wrong, (kind, factor)
        if wrong:
            assert "a.weight: its weights, at most" in said[0].getMessage()
        lost, kept = lost + wrong, kept + (not wrong)
assert lost > 20 and kept > 50, (lost, kept)
"""
    done = run_python(code, timeout=120)
    assert done.code == 0, done.stderr[-2000:]
