"""The bank gives back exactly what was put for the same key and place, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mc_gguf.common.errors import McError
from mc_gguf.compensate.bank import Bank, bank_key

PLACE = (3, "down", 5, "IQ2_S")
KEY = bank_key("model", "calibration", "ggml")


def blocks(seed: int = 0, rows: int = 256, row_bytes: int = 82) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, row_bytes), dtype=np.uint8)


def stored(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    assert Bank(tmp_path, KEY).get(*PLACE) is None
    Bank(tmp_path, KEY).put(*PLACE, blocks())
    found = Bank(tmp_path, KEY).get(*PLACE)
    assert found is not None
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, blocks())
    assert len(stored(tmp_path)) == 1


def test_a_view_and_an_empty_matrix(tmp_path: Path) -> None:
    bank = Bank(tmp_path, KEY)
    bank.put(*PLACE, blocks()[::2, ::2])
    np.testing.assert_array_equal(bank.get(*PLACE), blocks()[::2, ::2])
    bank.put(*PLACE, blocks()[:0])
    found = bank.get(*PLACE)
    assert found is not None
    assert found.shape == (0, 82)


def test_the_later_one_counts(tmp_path: Path) -> None:
    bank = Bank(tmp_path, KEY)
    bank.put(*PLACE, blocks(0))
    bank.put(*PLACE, blocks(1))
    np.testing.assert_array_equal(bank.get(*PLACE), blocks(1))


@pytest.mark.parametrize(
    "other", [(2, "down", 5, "IQ2_S"), (3, "up", 5, "IQ2_S"), (3, "down", 4, "IQ2_S"), (3, "down", 5, "Q2_K")]
)
def test_every_part_of_the_place_counts(tmp_path: Path, other: tuple[int, str, int, str]) -> None:
    bank = Bank(tmp_path, KEY)
    bank.put(*PLACE, blocks())
    assert bank.get(*other) is None


def test_every_part_of_the_key_counts(tmp_path: Path) -> None:
    Bank(tmp_path, KEY).put(*PLACE, blocks())
    for key in (
        bank_key("x", "calibration", "ggml"),
        bank_key("model", "x", "ggml"),
        bank_key("model", "calibration", "x"),
    ):
        assert Bank(tmp_path, key).get(*PLACE) is None


def test_a_file_of_another_key_or_place_is_not_taken(tmp_path: Path) -> None:
    bank, other = Bank(tmp_path, KEY), Bank(tmp_path, bank_key("other", "", ""))
    bank.put(*PLACE, blocks())
    (path,) = stored(tmp_path)
    for target, there in ((other, PLACE), (bank, (3, "down", 6, "IQ2_S"))):
        target.put(*there, blocks(1))
        new = next(p for p in stored(target.folder) if p != path)
        new.write_bytes(path.read_bytes())
        assert target.get(*there) is None


def test_every_damaged_byte_and_length_is_seen(tmp_path: Path) -> None:
    bank = Bank(tmp_path, KEY)
    bank.put(*PLACE, blocks(rows=2, row_bytes=3))
    (path,) = stored(tmp_path)
    good = path.read_bytes()
    damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    for data in (*damaged, *(good[:n] for n in range(len(good))), good + b"\0"):
        path.write_bytes(data)
        assert bank.get(*PLACE) is None
    bank.put(*PLACE, blocks(rows=2, row_bytes=3))
    assert path.read_bytes() == good


def test_type_names_in_any_case(tmp_path: Path) -> None:
    bank = Bank(tmp_path, KEY)
    bank.put(3, "down", 5, "iq2_s", blocks())
    assert bank.get(*PLACE) is not None
    with pytest.raises(McError, match="unknown ggml type"):
        bank.get(3, "down", 5, "IQ9")


def test_a_wrong_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    bank = Bank(tmp_path, KEY)
    for wrong in (blocks().reshape(-1), blocks().astype(np.int16)):
        with pytest.raises(ValueError, match="blocks are"):
            bank.put(*PLACE, wrong)  # type: ignore[arg-type]
    assert stored(tmp_path) == []


STORE = f"""
import sys
from pathlib import Path
import numpy as np
from mc_gguf.compensate.bank import Bank
bank, blocks = Bank(Path(sys.argv[1]), {KEY!r}), np.load(sys.argv[2])
while not Path(sys.argv[3]).exists():
    bank.put(*{PLACE!r}, blocks)
"""


def test_two_processes_store_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "blocks.npy", blocks())
    bank, enough = tmp_path / "bank", tmp_path / "enough"
    command: list[str | Path] = [sys.executable, "-c", STORE, bank, tmp_path / "blocks.npy", enough]
    both = [subprocess.Popen(command) for _ in range(2)]
    seen = 0
    while seen < 200:
        assert all(process.poll() is None for process in both)
        found = Bank(bank, KEY).get(*PLACE)
        if found is not None:  # whole at any moment
            np.testing.assert_array_equal(found, blocks())
            seen += 1
    enough.touch()
    assert [process.wait() for process in both] == [0, 0]
    np.testing.assert_array_equal(Bank(bank, KEY).get(*PLACE), blocks())
    assert len(stored(bank)) == 1
