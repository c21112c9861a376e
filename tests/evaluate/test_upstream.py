"""Against llama.cpp's own llama-perplexity, built from the pinned source: its numbers, and its file format.

The numbers were printed by

    llama-perplexity -m tiny-bf16.gguf -f wikitext-2.test.txt -c 512 --chunks 8 -t 1 --kl-divergence-base base
    llama-perplexity -m q2_k.gguf -f wikitext-2.test.txt -c 512 -t 1 --kl-divergence --kl-divergence-base base

on an x86-64 CPU with AVX-512, where ours agree with every printed digit. Other CPUs round differently, and a
token near the border between two experts may then take the other one: hence 2 % on what depends on the tail.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.evaluate.cache import references
from mc_gguf.evaluate.evaluation import evaluate_model
from mc_gguf.evaluate.reference import MAGIC, TRAILER_BYTES, Reference, file_size, rows_end
from mc_gguf.evaluate.scorer import Scorer
from mc_gguf.evaluate.text import Text
from tests.support import WIKITEXT

pytestmark = pytest.mark.native

Q2_K = 10  # LLAMA_FTYPE_MOSTLY_Q2_K


@pytest.fixture(scope="module")
def wikitext() -> Text:
    return Text.read(WIKITEXT)


@pytest.fixture(scope="module")
def written_by_the_tool(repo_root: Path) -> Path:
    return repo_root / "tests" / "data" / "llama-perplexity.logits"


@pytest.fixture(scope="module")
def q2_k(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mc_gguf.runtime import use_in_llama_cpp

    llama_cpp = use_in_llama_cpp()
    path = tmp_path_factory.mktemp("q") / "q2_k.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, Q2_K
    names = (str(tiny_gguf).encode(), str(path).encode())
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0
    return path


def test_the_tools_numbers(tiny_gguf: Path, q2_k: Path, wikitext: Text, tmp_path: Path) -> None:
    with Scorer(tiny_gguf, n_threads=1) as scorer:
        chunks = scorer.cut(wikitext, 8 * 255)
        reference = scorer.store(chunks, tmp_path / "base")
    [found] = evaluate_model(q2_k, [wikitext], [reference], n_threads=1)
    assert found.tokens == 2040
    assert found.perplexity == pytest.approx(37.514747, rel=2e-3)
    assert found.perplexity_se == pytest.approx(2.308502, rel=5e-3)
    assert found.base_perplexity == pytest.approx(36.268915, rel=1e-3)
    assert found.ln_ppl_ratio == pytest.approx(0.033773, abs=2e-3)
    assert found.ln_ppl_ratio_se == pytest.approx(0.005872, rel=0.02)
    assert found.mean_kld == pytest.approx(0.032145, rel=0.02)
    assert found.mean_kld_se == pytest.approx(0.000995, rel=0.03)
    assert found.median_kld == pytest.approx(0.019675, rel=0.02)
    assert found.p99_kld == pytest.approx(0.218049, rel=0.05)
    assert found.mean_p_diff == pytest.approx(-0.00495, abs=3e-4)
    assert found.mean_p_diff_se == pytest.approx(0.00087, rel=0.03)
    assert found.p01_p_diff == pytest.approx(-0.16258, rel=0.05)
    assert found.p99_p_diff == pytest.approx(0.10337, rel=0.05)
    assert found.rms_p_diff == pytest.approx(0.03955, rel=0.03)
    assert found.top1_agreement == pytest.approx(0.88676, abs=0.005)
    assert found.top1_agreement_se == pytest.approx(0.00702, rel=0.03)


def test_the_tools_file_and_ours_are_one_format(
    tiny_gguf: Path, written_by_the_tool: Path, wikitext: Text, tmp_path: Path
) -> None:
    """Same bytes but for `smallest`, which we shift, what another CPU's rounding does to a code, and the
    vocabulary's hash at our end.
    """
    theirs = Reference.open(written_by_the_tool)
    with Scorer(tiny_gguf, 8, n_threads=1) as scorer:
        ours = scorer.store(scorer.cut(Text("head", wikitext.content[:400]))[:1], tmp_path / "ours")
    assert written_by_the_tool.stat().st_size == (tmp_path / "ours").stat().st_size - TRAILER_BYTES
    header = len(MAGIC) + 12 + 8 * 4
    assert written_by_the_tool.read_bytes()[:header] == (tmp_path / "ours").read_bytes()[:header]
    assert ours.rows.shape == theirs.rows.shape == (1, 3, 4100)
    codes = [np.array(r.rows[..., 4:], dtype=np.int64) for r in (ours, theirs)]
    assert np.abs(codes[0] - codes[1]).max() < 200  # of 65,536 over 16 nats; on the same CPU 0
    heads = [np.array(r.rows[..., :4]).view(np.float32) for r in (ours, theirs)]
    assert heads[0][..., 0] == pytest.approx(heads[1][..., 0], rel=1e-3)
    assert heads[0][..., 1] == pytest.approx(heads[1][..., 1], abs=0.02)


def test_the_tools_file_serves_as_reference(
    tiny_gguf: Path, written_by_the_tool: Path, wikitext: Text
) -> None:
    """All of the text is asked for, the file has its first chunk."""
    stored = references(written_by_the_tool, [wikitext], n_ctx=8)
    [found] = evaluate_model(tiny_gguf, [wikitext], stored, n_ctx=8, n_threads=1)
    assert found.tokens == 3
    assert found.mean_kld == pytest.approx(0, abs=1e-3)


def test_a_reference_that_does_not_fit(tiny_gguf: Path, written_by_the_tool: Path, wikitext: Text) -> None:
    stored = references(written_by_the_tool, [wikitext])
    with pytest.raises(McError, match="made with a context of 8 tokens, not 16: give the context 8"):
        evaluate_model(tiny_gguf, [wikitext], stored, n_ctx=16, n_threads=1)
    with pytest.raises(McError, match=r"the tokens in .* are not those of"):
        evaluate_model(tiny_gguf, [Text("other", wikitext.content[500:])], stored, n_ctx=8, n_threads=1)
    with pytest.raises(McError, match="belongs to one text, but 2 are given"):
        references(written_by_the_tool, [wikitext, wikitext])


def test_another_vocabulary(written_by_the_tool: Path) -> None:
    reference = Reference.open(written_by_the_tool)
    with pytest.raises(McError, match=r"m\.gguf has a vocabulary of 32000 tokens, .* one of 4096"):
        reference.check(reference.tokens, 32000, "", "m.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", MAGIC, MAGIC + bytes(12), b"cut"])
def test_files_that_are_no_reference(content: bytes, written_by_the_tool: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.logits"
    path.write_bytes(written_by_the_tool.read_bytes()[:-2] if content == b"cut" else content)
    with pytest.raises(ArtifactError, match=r"bad\.logits .*: make it again"):
        Reference.open(path)
    with pytest.raises(ArtifactError, match="cannot read"):
        Reference.open(tmp_path / "none")


def test_size() -> None:
    """WikiText-2 test with a vocabulary of 32,000 at context 512."""
    assert rows_end(8, 4096, 1) == 24652
    assert file_size(512, 32000, 655) == pytest.approx(10.7e9, rel=0.01)
