"""The numbers themselves: against the definitions in float64, and what storage costs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from mc_gguf.evaluate import logprobs
from mc_gguf.evaluate.logprobs import by_blocks
from mc_gguf.evaluate.result import statistics
from mc_gguf.evaluate.scorer import Scores

RNG = np.random.default_rng(5)


def logits(n: int = 200, n_vocab: int = 1000, spread: float = 4.0) -> NDArray[np.float32]:
    return RNG.normal(0, spread, (n, n_vocab)).astype(np.float32)


def log_p(values: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=1, keepdims=True)))


def stored(base: NDArray[np.float32]) -> NDArray[np.uint16]:
    rows = np.zeros((len(base), logprobs.row_words(base.shape[1])), dtype=np.uint16)
    logprobs.encode(base, np.zeros(len(base), dtype=np.int32), rows)
    return rows


@pytest.mark.parametrize(("n_vocab", "words"), [(4096, 4100), (33, 38), (1, 6)])
def test_row_words(n_vocab: int, words: int) -> None:
    assert logprobs.row_words(n_vocab) == words


def test_a_stored_row_by_hand() -> None:
    """Two tokens, 16 nats and more apart, one between: the codes span the 16 nats below the largest."""
    row = stored(np.array([[8.0, 0.0, -8.0, -30.0, 8.0]], dtype=np.float32))[0]
    assert row[4:].tolist() == [65535, 32768, 0, 0, 65535, 0]  # one word of padding
    scale, smallest = row[:4].view(np.float32)
    assert scale == pytest.approx(16 / 65535)
    assert smallest == pytest.approx(-16 - np.log(2), abs=2e-4)


def test_rows_of_equal_logits() -> None:
    """Scale 0."""
    row = stored(np.zeros((1, 4), dtype=np.float32))
    found = logprobs.compare(np.zeros((1, 4), np.float32), np.array([2], np.int32), row)
    assert found[:, 0] == pytest.approx([np.log(4), np.log(4), 0, 1], abs=1e-6)


def test_stored_values_are_close_and_sum_up() -> None:
    base = logits()
    rows = stored(base)
    scale, smallest = rows[:, :4].view(np.float32).T.astype(np.float64)
    found = rows[:, 4:] * scale[:, None] + smallest[:, None]
    exact = log_p(base)
    kept = exact > -16
    assert np.abs(found - exact)[kept].max() < 16 / 65535  # half a step, and the shift of the whole row
    error = (np.exp(found) - np.exp(exact)) * kept
    assert np.abs(error.sum(axis=1)).max() < 3e-6  # upstream's rows: 2e-5


def test_compare_is_the_definition() -> None:
    base = logits()
    mine = base + RNG.normal(0, 0.3, base.shape).astype(np.float32)
    targets = RNG.integers(0, base.shape[1], len(base)).astype(np.int32)
    p, q = log_p(base), log_p(mine)
    rows = np.arange(len(base))
    found = logprobs.compare(mine, targets, stored(base))
    assert found[0] == pytest.approx(-q[rows, targets], abs=1e-5)
    likely = p[rows, targets] > -16
    assert found[1][likely] == pytest.approx(-p[rows, targets][likely], abs=2e-4)
    assert found[2] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1), abs=2e-5)
    assert (found[3] == (base.argmax(axis=1) == mine.argmax(axis=1))).all()
    assert logprobs.log_likelihood(mine, targets) == pytest.approx(found[0], abs=1e-5)


def test_storage_does_not_matter_at_small_divergences() -> None:
    """A divergence of 1e-4: the mean is right to 1e-7."""
    base = logits(n=2000)
    mine = base + RNG.normal(0, 0.015, base.shape).astype(np.float32)
    p, q = log_p(base), log_p(mine)
    exact = (np.exp(p) * (p - q)).sum(axis=1)
    found = logprobs.compare(mine, np.zeros(len(base), np.int32), stored(base))[2]
    assert 0.5e-4 < exact.mean() < 2e-4
    assert found.mean(dtype=np.float64) == pytest.approx(exact.mean(), abs=1e-7)
    assert (found - exact).std() < 2e-6


def test_improbable_reference_tokens_are_left_out() -> None:
    """Below -16 nats, also where the model rules a token out."""
    base = np.array([[0.0, 0.0, -20.0]], dtype=np.float32)
    mine = np.array([[0.0, 0.0, -np.inf]], dtype=np.float32)
    assert logprobs.compare(mine, np.array([0], np.int32), stored(base))[2] == pytest.approx(0, abs=1e-6)


def test_blocks_and_threads_change_nothing() -> None:
    base, mine = logits(50, 20_000), logits(50, 20_000)
    rows, targets = stored(base), np.arange(50, dtype=np.int32)
    whole = logprobs.compare(mine, targets, rows)
    with ThreadPoolExecutor(2) as pool:
        for threads in (None, pool):
            assert np.array_equal(by_blocks(logprobs.compare, threads, mine, targets, rows), whole)


def test_statistics_by_hand() -> None:
    nll = np.log(np.array([2.0, 8.0, 2.0, 8.0], dtype=np.float32))
    found = statistics(Scores(nll))
    assert found["perplexity"] == pytest.approx(4.0)
    assert found["perplexity_se"] == pytest.approx(4.0 * np.log(2) * (4 / 3) ** 0.5 / 2)
    assert found["tokens"] == 4
    base = np.log(np.array([4.0, 4.0, 2.0, 8.0], dtype=np.float32))
    kld = np.array([0.0, 0.1, 0.2, 0.5], dtype=np.float32)
    found = statistics(Scores(nll, base, kld, np.array([True, False, True, True])))
    assert found["mean_kld"] == pytest.approx(0.2)
    assert found["mean_kld_se"] == pytest.approx(np.std([0, 0.1, 0.2, 0.5], ddof=1) / 2)
    assert found["median_kld"] == pytest.approx(0.15)
    assert found["p99_kld"] == pytest.approx(0.2 + 0.3 * 0.97)
    assert found["top1_agreement"] == 0.75
    assert found["top1_agreement_se"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert found["mean_p_diff"] == pytest.approx((0.25 - 0.125) / 4)
    assert found["rms_p_diff"] == pytest.approx(((0.25**2 + 0.125**2) / 4) ** 0.5)
    assert found["ln_ppl_ratio"] == pytest.approx(0, abs=1e-6)
    assert found["base_perplexity"] == pytest.approx(4.0)
