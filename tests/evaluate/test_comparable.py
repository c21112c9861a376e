"""Models whose vocabularies differ, though their sizes do not, are not compared as if nothing were wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_gguf.common.errors import McError
from mc_gguf.evaluate import evaluate
from mc_gguf.evaluate.cache import references
from mc_gguf.evaluate.evaluation import evaluate_model
from mc_gguf.evaluate.reference import Reference, rows_end
from mc_gguf.evaluate.text import Text
from mc_gguf.ggml.gguf_file import Value, read_header
from mc_gguf.runtime.vocabulary import Vocabulary
from tests.support import WIKITEXT
from tests.support.command_line import fails_with, invoke
from tests.support.gguf_models import changed_copy, take_apart, write_parts

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("own_cache")]

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
UNUSED = 5
SMALL = ("--ctx", 64, "--tokens", 60, "--threads", 1, "--quiet")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_bytes(WIKITEXT.read_bytes()[:2000])
    return path


def renamed(model: Path, path: Path, token: int, unused: bool = False) -> Path:
    """A copy in which one token, which the text does not need, is another one."""
    kv = read_header(model).kv
    tokens, types = kv[TOKENS], kv[TYPES]
    texts, kinds = list(tokens.value), list(types.value)
    texts[token] = f"{path.stem}{token}"
    if unused:
        kinds[token] = UNUSED
    changes = {
        TOKENS: Value(tokens.type, texts, tokens.item_type),
        TYPES: Value(types.type, kinds, types.item_type),
    }
    return changed_copy(model, path, changes)


@pytest.fixture(scope="module")
def other(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return renamed(tiny_gguf, tmp_path_factory.mktemp("other") / "other.gguf", 4095)


def test_another_vocabulary_of_the_same_size_is_refused(tiny_gguf: Path, other: Path, text: Path) -> None:
    rest = ("--text", text, *SMALL, "--reference", tiny_gguf)
    fails_with(
        r"--reference: .*other\.gguf has another vocabulary than the reference .*: 1 of 4096 tokens differ, "
        r"the first is 4095: 'other4095' in other\.gguf, '.+' in tiny-bf16\.gguf",
        *("eval", tiny_gguf, other, *rest),
    )
    assert invoke("eval", tiny_gguf, *rest).exit_code == 0


def test_a_stored_reference_knows_its_vocabulary(
    tiny_gguf: Path, other: Path, text: Path, tmp_path: Path
) -> None:
    [stored] = references(tiny_gguf, [Text.read(text)], n_ctx=64, n_tokens=60, quiet=True)
    assert stored.vocabulary == Vocabulary(tiny_gguf).sha256
    options = ("--text", text, *SMALL, "--reference", stored.path)
    fails_with("another vocabulary than the reference .* though of the same size", "eval", other, *options)
    assert invoke("eval", tiny_gguf, *options).exit_code == 0
    whole = stored.path.read_bytes()
    upstream = tmp_path / "upstream.logits"  # which ends where the rows end
    upstream.write_bytes(whole[: rows_end(64, 4096, len(stored.tokens))])
    assert Reference.open(upstream).vocabulary is None
    [found] = evaluate_model(other, [Text.read(text)], [Reference.open(upstream)], n_ctx=64, n_threads=1)
    assert found.mean_kld == pytest.approx(0, abs=1e-3)
    upstream.write_bytes(whole[:-40] + b"x" + whole[-39:])
    with pytest.raises(McError, match="is damaged"):
        Reference.open(upstream)


def test_without_a_reference_it_is_a_warning(
    tiny_gguf: Path, other: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert invoke("eval", tiny_gguf, other, "--text", text, *SMALL).exit_code == 0
    [warning] = caplog.messages
    assert "has another vocabulary than" in warning
    assert warning.endswith("their perplexities are of different tokens, and cannot be compared")


def test_unused_tokens_may_have_any_text(tiny_gguf: Path, tmp_path: Path) -> None:
    first, second = (renamed(tiny_gguf, tmp_path / f"{name}.gguf", 4095, unused=True) for name in "ab")
    assert Vocabulary(first).sha256 == Vocabulary(second).sha256 != Vocabulary(tiny_gguf).sha256


def test_a_quantized_reference_is_warned_of(
    tiny_gguf: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kv, parts = take_apart(tiny_gguf)
    quantized = tmp_path / "quantized.gguf"
    q8_0, rows = 8, b"\0" * (4096 * 256 // 32 * 34)
    parts = [p.__class__(p.name, p.shape, q8_0, rows) if p.name == "output.weight" else p for p in parts]
    write_parts(quantized, kv, parts)
    assert invoke("eval", tiny_gguf, "--text", text, *SMALL, "--reference", quantized).exit_code == 0
    [warning] = caplog.messages
    assert "quantized.gguf is quantized itself (Q8_0)" in warning


def test_nothing_to_evaluate(text: Path) -> None:
    with pytest.raises(McError, match="give a model"):
        evaluate([], text=text)
    with pytest.raises(McError, match="ctx must be at most"):
        evaluate("m.gguf", text=text, ctx=10**12)
    with pytest.raises(McError, match="threads must be at most 512"):
        evaluate("m.gguf", text=text, threads=10**6)
