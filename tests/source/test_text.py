"""Calibration text: the whole of it is represented, BOS, seeds, hash, errors and warnings."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mc_gguf.common.errors import SourceError
from mc_gguf.source.text import MIN_TOKENS, load_corpus


@dataclass
class Bytes:
    """One token per byte."""

    bos_id: int | None = 1000
    add_bos: bool = True

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """40,000 bytes; a token's value tells the quarter of the text that it comes from: 0 1 2 3."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(bytes([quarter]) * 10_000 for quarter in range(4)))
    return path


def test_rows_start_with_bos_and_come_from_everywhere(text: Path) -> None:
    corpus = load_corpus(Bytes(), [text], tokens=800, ctx=100)
    assert corpus.rows.shape == (8, 100)
    assert (corpus.rows[:, 0] == 1000).all()
    assert {0, 1, 2, 3} == set(corpus.rows[:, 1:].ravel().tolist())
    assert (np.diff(corpus.rows[:, 1]) >= 0).all()


@pytest.mark.parametrize("tokenizer", [Bytes(add_bos=False), Bytes(bos_id=None)])
def test_no_bos_where_the_model_adds_none(text: Path, tokenizer: Bytes) -> None:
    corpus = load_corpus(tokenizer, [text], tokens=800, ctx=100)
    assert corpus.rows.shape == (8, 100)
    assert corpus.rows.max() < 4


def test_rows_do_not_overlap(tmp_path: Path) -> None:
    class Numbers(Bytes):
        def tokenize(self, text: str) -> list[int]:
            return list(range(5000))

    path = tmp_path / "t"
    path.write_text("x")
    for tokens in (500, 3000, 100_000):
        body = load_corpus(Numbers(), [path], tokens=tokens, ctx=50, seed=tokens).rows[:, 1:]
        assert len(np.unique(body)) == body.size
        assert (np.diff(body, axis=1) == 1).all()


def test_seed_changes_the_windows_and_only_the_seed(text: Path) -> None:
    path = text.with_name("digits")
    path.write_bytes(np.random.default_rng(0).integers(0, 128, 20_000, dtype=np.uint8).tobytes())
    one, same, other = (load_corpus(Bytes(), [path], tokens=1000, ctx=50, seed=s).rows for s in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_records_what_it_used(text: Path) -> None:
    more = text.with_name("more.txt")
    more.write_text("y" * 500)
    corpus = load_corpus(Bytes(), [text, more], tokens=2000, ctx=100, seed=5)
    assert corpus.to_json() == {
        "sources": ["text.txt", "more.txt"],
        "sha256": hashlib.sha256(text.read_bytes() + more.read_bytes()).hexdigest(),
        "available_tokens": 40_500,
        "tokens": 2000,
        "rows": 20,
        "ctx": 100,
        "seed": 5,
    }


def test_the_bundled_text_is_the_default_and_large_enough() -> None:
    corpus = load_corpus(Bytes())
    assert corpus.sources == ("calibration-mix.txt",)
    assert corpus.rows.shape == (128, 512)


def test_context_is_capped_to_the_models(text: Path) -> None:
    assert load_corpus(Bytes(), [text], tokens=1000, ctx=512, max_ctx=64).rows.shape == (15, 64)


def test_few_tokens_are_warned_about(text: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_corpus(Bytes(), [text], tokens=MIN_TOKENS, ctx=128)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(Bytes(), [text], tokens=50_000, ctx=128)
    assert "only 40192 of the 50000 tokens" in caplog.text
    assert corpus.n_tokens == 40_192
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_corpus(Bytes(), [text], tokens=1000, ctx=128)
    assert "896 tokens of text are few" in caplog.text


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    short, binary = tmp_path / "short", tmp_path / "binary"
    short.write_text("too short")
    binary.write_bytes(b"abc\xff")
    with pytest.raises(SourceError, match="is less than one row of 512"):
        load_corpus(Bytes(), [short])
    with pytest.raises(SourceError, match=r"binary is not UTF-8 \(see byte 3\)"):
        load_corpus(Bytes(), [binary])
    with pytest.raises(SourceError, match="missing"):
        load_corpus(Bytes(), [tmp_path / "missing"])
    with pytest.raises(SourceError, match="cannot cut 10 tokens into rows of 20"):
        load_corpus(Bytes(), [short], tokens=10, ctx=20)
