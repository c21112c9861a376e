"""Perplexity and KL divergence through the runtime: against transformers, by hand, and on bad input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf.common.errors import McError
from mc_gguf.evaluate import files
from mc_gguf.evaluate.cache import references
from mc_gguf.evaluate.evaluation import evaluate_model, perplexity
from mc_gguf.evaluate.result import result_table
from mc_gguf.evaluate.scorer import Scorer
from mc_gguf.evaluate.text import Text
from tests.support import WIKITEXT

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("own_cache")]


@pytest.fixture(scope="module")
def text() -> Text:
    whole = Text.read(WIKITEXT)
    return Text(whole.name, whole.content[:40_000])


def stored(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "references").glob("*"))


def test_equals_transformers(tiny_model: Path, tiny_gguf: Path, text: Text) -> None:
    import torch
    from transformers import AutoTokenizer, MixtralForCausalLM

    content = text.content.decode()[:20_000]
    n_ctx, n_chunk = 256, 4
    found = perplexity(tiny_gguf, content, n_ctx=n_ctx, n_scored=(n_ctx // 2 - 1) * n_chunk, n_threads=2)
    assert found.n_scored == (n_ctx // 2 - 1) * n_chunk

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids]
    rows = torch.tensor(ids[: n_ctx * n_chunk]).reshape(n_chunk, n_ctx)
    rows[:, 0] = tokenizer.bos_token_id
    model: Any = MixtralForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(rows).logits[:, n_ctx // 2 : -1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), rows[:, n_ctx // 2 + 1 :].flatten()
    )
    assert found.value == pytest.approx(float(loss.exp()), rel=0.01)  # BF16 against float32


def test_quantized_attention_runs(tiny_model: Path, tmp_path: Path, text: Text) -> None:
    """Q8_0 and Q6_K attention, which the CPU backend may put into repack or AMX buffers; a mixed file."""
    from click.testing import CliRunner

    from mc_gguf.cli import main

    plain, mixed = tmp_path / "16.gguf", tmp_path / "q.gguf"
    assert (
        CliRunner().invoke(main, ["convert", str(tiny_model), "-o", str(plain), "--bpw", "16"]).exit_code == 0
    )
    options = ["--bpw", "4.5", "--types", "Q3_K,Q4_K", "--tokens", "1024", "--ctx", "128", "--rows", "8"]
    result = CliRunner().invoke(main, ["convert", str(tiny_model), "-o", str(mixed), *options])
    assert result.exit_code == 0, result.output
    [found] = evaluate_model(
        mixed, [text], references(plain, [text], n_tokens=1000), n_tokens=1000, n_threads=2
    )
    assert found.base_perplexity is not None
    assert found.mean_kld is not None
    assert found.perplexity == pytest.approx(found.base_perplexity, rel=0.03)
    assert 0.001 < found.mean_kld < 0.05


def test_chunks_in_one_batch_do_not_see_each_other(tiny_gguf: Path, text: Text) -> None:
    """Five chunks, four of them in the first batch, against each alone, in another order."""
    with Scorer(tiny_gguf, 512, n_threads=1) as scorer:
        chunks = scorer.cut(text, 5 * 255)
        together = scorer.score(chunks).nll
        alone = [scorer.score(chunk[None]).nll for chunk in chunks[::-1]]
    assert len(chunks) == 5
    assert np.concatenate(alone[::-1]) == pytest.approx(together, abs=2e-3)  # kernels depend on the batch


def test_threads_change_nothing(tiny_gguf: Path, text: Text) -> None:
    one, two = (evaluate_model(tiny_gguf, [text], n_tokens=500, n_threads=n)[0] for n in (1, 2))
    assert one.perplexity == pytest.approx(two.perplexity, rel=1e-6)


def test_a_model_without_bos(tiny_gguf: Path, tmp_path: Path, text: Text) -> None:
    """No token is put in front, and none is replaced: what a chunk begins with counts."""
    from mc_gguf.ggml.gguf_file import Value
    from tests.support.gguf_models import take_apart, write_parts

    bool_type = 7
    kv, parts = take_apart(tiny_gguf)
    write_parts(tmp_path / "m.gguf", kv | {"tokenizer.ggml.add_bos_token": Value(bool_type, False)}, parts)
    with Scorer(tiny_gguf, 64, n_threads=1) as usual, Scorer(tmp_path / "m.gguf", 64, n_threads=1) as scorer:
        chunks = scorer.cut(text, 31)
        assert chunks[0, 0] != usual.llm.token_bos()
        assert usual.cut(text, 31)[0, 0] == usual.llm.token_bos()
        assert (usual.cut(text, 31)[0, 1:] == chunks[0, :-1]).all()
        other = chunks.copy()
        other[0, 0] += 1
        assert (scorer.score(other).nll != scorer.score(chunks).nll).any()
        assert (usual.score(other).nll == usual.score(chunks).nll).all()


def test_a_context_larger_than_a_batch(tiny_gguf: Path, tmp_path: Path, text: Text) -> None:
    """3,000 tokens in batches of 2,048: the scored half lies in both, as it does when stored."""
    with Scorer(tiny_gguf, 3000, n_threads=1) as scorer:
        chunks = scorer.cut(text, 1)
        reference = scorer.store(chunks, tmp_path / "r.logits")
        found = scorer.score(chunks, reference)
    assert found.nll.size == 1499
    assert found.kld is not None
    assert np.abs(found.kld).max() < 1e-4
    assert found.nll == pytest.approx(found.nll_base, abs=1e-3)


def test_tokens_are_rounded_up_to_chunks_and_limited_by_the_text(tiny_gguf: Path, text: Text) -> None:
    short = Text("short", text.content[:6000])
    some, most = (
        evaluate_model(tiny_gguf, [short], n_ctx=256, n_tokens=n, n_threads=1)[0] for n in (128, 10**9)
    )
    assert some.tokens == 2 * 127
    [everything] = evaluate_model(tiny_gguf, [short], n_ctx=256, n_threads=1)
    assert (most.tokens, most.perplexity) == (everything.tokens, everything.perplexity)
    assert most.tokens % 127 == 0
    assert most.tokens > some.tokens
    with pytest.raises(McError, match=r"only .* tokens to score: give a longer one"):
        perplexity(tiny_gguf, short.content.decode(), 256, 10**9, 1)


def test_too_little_text(tiny_gguf: Path) -> None:
    with pytest.raises(McError, match=r"text has \d+ tokens, but 256 are needed: give a longer text"):
        perplexity(tiny_gguf, "Once upon a time", n_ctx=256)


def test_a_longer_context_than_the_model_knows_is_warned_of(
    tiny_gguf: Path, text: Text, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for a model, and even where no progress is shown."""
    monkeypatch.setattr(Scorer, "n_ctx_train", 256)
    evaluate_model(tiny_gguf, [text, text], n_ctx=512, n_tokens=1, n_threads=1, quiet=True)
    [warning] = caplog.messages
    assert warning == "the context is 512, but tiny-bf16.gguf was trained on 256"


def test_logits_that_are_no_numbers(tiny_gguf: Path, tmp_path: Path, text: Text) -> None:
    """A damaged file: the norm before the output is NaN."""
    from mc_gguf.ggml.gguf_file import read_header

    broken = tmp_path / "nan.gguf"
    data = bytearray(tiny_gguf.read_bytes())
    entry = read_header(tiny_gguf).tensors["output_norm.weight"]
    data[entry.offset : entry.offset + entry.n_bytes] = np.full(entry.n_bytes // 4, np.nan, "<f4").tobytes()
    broken.write_bytes(data)
    with pytest.raises(McError, match=r"nan\.gguf gives logits that are not numbers in chunk 1"):
        evaluate_model(broken, [text], n_tokens=1, n_threads=1)
    with pytest.raises(McError, match="not numbers"):
        references(broken, [text], n_tokens=1, n_threads=1)
    assert stored(tmp_path) == []


def test_against_itself(tiny_gguf: Path, tmp_path: Path, text: Text) -> None:
    """What is left is the storage's error: far below a divergence of 1e-4."""
    open_references = references(tiny_gguf, [text], n_tokens=1000, n_threads=1)
    [found] = evaluate_model(tiny_gguf, [text], open_references, n_tokens=1000, n_threads=1)
    assert found.mean_kld == pytest.approx(0, abs=3e-7)
    assert found.max_kld == pytest.approx(0, abs=1e-5)
    assert found.top1_agreement == 1
    assert found.rms_p_diff == pytest.approx(0, abs=5e-5)
    assert found.ln_ppl_ratio == pytest.approx(0, abs=1e-5)
    assert found.base_perplexity == pytest.approx(found.perplexity, rel=1e-5)
    assert "same top-1" in result_table([found])
    assert "dropped" not in result_table([found])


def test_a_reference_is_computed_once(tiny_gguf: Path, tmp_path: Path, text: Text) -> None:
    references(tiny_gguf, [text], n_tokens=200, n_threads=1)
    [path] = stored(tmp_path)
    before = path.stat().st_mtime_ns
    references(tiny_gguf, [text], n_tokens=200, n_threads=1)
    assert [p.stat().st_mtime_ns for p in stored(tmp_path)] == [before]


def test_a_changed_model_text_or_request_gets_its_own_reference(
    tiny_gguf: Path, tmp_path: Path, text: Text
) -> None:
    model = tmp_path / "m.gguf"
    data = bytearray(tiny_gguf.read_bytes())
    model.write_bytes(data)
    references(model, [text], n_tokens=100, n_threads=1)
    data[-1000] ^= 1  # same size
    model.write_bytes(data)
    references(model, [text], n_tokens=100, n_threads=1)
    references(model, [Text(text.name, text.content[100:])], n_tokens=100, n_threads=1)
    references(model, [text], n_ctx=256, n_tokens=100, n_threads=1)
    references(model, [text], n_tokens=300, n_threads=1)
    assert len(stored(tmp_path)) == 5


def test_routing_is_counted_for_what_is_evaluated(tiny_gguf: Path, text: Text) -> None:
    """One expert fewer everywhere: half of the slots of a top-2 model; the reference keeps all."""
    open_references = references(tiny_gguf, [text], n_tokens=500, n_threads=1)
    [off] = evaluate_model(tiny_gguf, [text], open_references, n_tokens=500, n_threads=1)
    short = Text("short", text.content[:3000])
    results = evaluate_model(
        tiny_gguf,
        [text, short],
        [*open_references, *references(tiny_gguf, [short], n_threads=1)],
        n_tokens=500,
        n_threads=1,
        routing="keep_min:ratio=1",
    )
    assert off.dropped_share is None
    assert [r.dropped_share for r in results] == [0.5, 0.5]
    assert results[0].mean_kld is not None
    assert results[0].mean_kld > 0.01
    assert "50.0 %" in result_table([off, *results])


def test_as_many_references_as_texts(tiny_gguf: Path, text: Text) -> None:
    with pytest.raises(McError, match="1 texts need as many references, but there are 0"):
        evaluate_model(tiny_gguf, [text], [])


def test_interrupted_or_without_space_nothing_is_left(
    tiny_gguf: Path, tmp_path: Path, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(n: int) -> None:
        raise KeyboardInterrupt

    with Scorer(tiny_gguf, 512, n_threads=1) as scorer, pytest.raises(KeyboardInterrupt):
        scorer.store(scorer.cut(text, 600), tmp_path / "stored" / "r.logits", interrupt)
    assert list((tmp_path / "stored").iterdir()) == []

    usage = type("Usage", (), {"free": 260 << 20})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    message = r"has 260\.00 MiB free, but storing .* takes 30\d\.\d+ MiB; score fewer tokens.*MC_GGUF_CACHE"
    with pytest.raises(McError, match=message):
        references(tiny_gguf, [text], n_tokens=6000, n_threads=1)
    assert stored(tmp_path) == []


def test_a_large_file_is_hashed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MEMOISED_BYTES", 0)
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1.0)
    read: list[Path] = []

    def hexadecimal(path: Path) -> str:
        read.append(path)
        return path.read_bytes().hex()

    monkeypatch.setattr(files, "sha256_of", hexadecimal)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    found = [files.model_sha256(path), files.model_sha256(path)]
    assert found == [b"one".hex()] * 2
    assert len(read) == 1
    before = path.stat()
    path.write_bytes(b"two")  # as many bytes, and the time of change set back
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.model_sha256(path) == b"two".hex()
    next((tmp_path / "cache" / "hashes").iterdir()).write_text("{")
    assert files.model_sha256(path) == b"two".hex()
    assert len(read) == 3


def test_shards_are_one_model(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        (tmp_path / f"m-{i:05}-of-00003.gguf").write_bytes(bytes(i))
    first = tmp_path / "m-00001-of-00003.gguf"
    assert len(files.files_of(first)) == 3
    assert files.model_file_bytes(first) == 6
    before = files.model_sha256(first)
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(b"abc")
    assert files.model_sha256(first) != before
