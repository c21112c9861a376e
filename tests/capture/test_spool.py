"""Rows in a spool come back; a run that was killed goes on after the tokens that its sums have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mc_gguf.capture.capture import sampled_tokens
from mc_gguf.capture.spool import Spool, from_half, to_half

rng = np.random.default_rng(0)


def floats(values: object) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_rows_come_back_from_their_places(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    rows = Spool(tmp_path).rows("blk.0.x", dtype, shape)
    values = (rng.standard_normal((12, *shape)) * 100).astype(dtype)
    for first, last in ((7, 12), (0, 4), (4, 7)):
        rows.write(first, values[first:last])
    rows.write(3, values[3:5])  # again
    np.testing.assert_array_equal(rows.read(12), values)
    np.testing.assert_array_equal(Spool(tmp_path).rows("blk.0.x", dtype, shape).read(5), values[:5])
    assert rows.read(0).shape == (0, *shape)
    assert rows.row_bytes * 12 == rows.path.stat().st_size


def test_half_precision_keeps_eleven_bits_of_numbers_of_any_size() -> None:
    values = rng.standard_normal((6, 64)).astype(np.float32)
    values *= floats([1, 1e3, 1e5, 1e20, 1e37, 0])[:, None]
    half, scale = to_half(values)
    assert np.isfinite(half).all()
    assert scale[:2].tolist() == [1, 1]
    assert scale[5] == 1
    assert (np.log2(scale) % 1 == 0).all()
    found = from_half(half, scale).numpy()
    error = np.abs(found - values)
    # Numbers far below the row's largest may fall below float16's smallest.
    assert (error <= 2.0**-11 * np.abs(values) + 2.0**-24 * scale[:, None]).all()


def test_what_fits_is_not_scaled() -> None:
    values = floats([[32768, -1], [0.1, 3e-8]])
    half, scale = to_half(values)
    assert scale.tolist() == [1, 1]
    np.testing.assert_array_equal(from_half(half, scale), values.astype(np.float16).astype(np.float32))
    just_above = floats([[32769.0, 1.0]])
    assert to_half(just_above)[1].tolist() == [2]


def test_half_precision_of_no_rows() -> None:
    half, scale = to_half(np.zeros((0, 4), np.float32))
    assert from_half(half, scale).shape == (0, 4)


def test_sums_and_facts_are_those_of_the_last_save(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert (spool.done, spool.sums, spool.facts) == (0, {}, {})
    spool.add("a", floats([1, 2]))
    spool.largest("b", 3.0)
    spool.facts["blk.0"] = {"n_used": 2, "expression": ["SQR", ["product", "up"]]}
    spool.save(64)
    spool.add("a", floats([10, 10]))
    spool.largest("b", 2.0)
    assert spool.sums["b"] == [3.0]
    found = Spool(tmp_path)  # as a run that was killed here leaves it
    assert found.done == 64
    np.testing.assert_array_equal(found.sums["a"], [1, 2])
    assert found.facts == spool.facts
    found.add("a", floats([10, 10]))
    found.largest("b", 4.0)
    found.save(128)
    again = Spool(tmp_path)
    np.testing.assert_array_equal(again.sums["a"], [11, 12])
    assert again.done == 128
    assert again.sums["b"] == [4.0]


def test_sums_are_added_in_double_precision(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    values = floats([16777216.0])
    spool.add("n", values)
    for _ in range(8):
        spool.add("n", floats([1.0]))
    assert spool.sums["n"] == [16777224.0]
    assert values == [16777216.0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no header"])
def test_a_damaged_spool_is_an_empty_one(tmp_path: Path, damage: str) -> None:
    spool = Spool(tmp_path)
    spool.add("a", np.ones(4))
    spool.save(64)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if damage == "no header":
        from safetensors.numpy import save

        data = save({"a": np.ones(4)})
    path.write_bytes(
        {"cut": data[:-8], "flipped": data[:8] + b"\xff" + data[9:], "empty": b""}.get(damage, data)
    )
    found = Spool(tmp_path)
    assert (found.done, found.sums, found.facts) == (0, {}, {})


def test_sampled_tokens_are_spread_over_the_text() -> None:
    found = sampled_tokens(100, 512, 2048, 512)
    assert found.reshape(4, 512)[:, 0].tolist() == [0, 33 * 512, 66 * 512, 99 * 512]
    assert (np.diff(found.reshape(4, 512)) == 1).all()
    assert (sampled_tokens(3, 512, 2048, 512) == np.arange(3 * 512)).all()
    assert len(sampled_tokens(100, 512, 1100, 512)) == 2 * 512
    assert (sampled_tokens(100, 512, 200, 512) == np.arange(200)).all()
    assert sampled_tokens(100, 512, 256, 128).tolist() == [*range(128), *range(99 * 512, 99 * 512 + 128)]
