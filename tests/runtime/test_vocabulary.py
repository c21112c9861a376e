"""llama.cpp's tokenizer without the weights, and llama.cpp's own words where it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_gguf import Llama
from mc_gguf.common.errors import FormatError
from mc_gguf.runtime.llama_library import listen, reason
from mc_gguf.runtime.vocabulary import Vocabulary
from mc_gguf.source import open_checkpoint
from tests.support.random_models import write_random_model

pytestmark = pytest.mark.native
TEXTS = ["Once upon a time", "  two spaces,\n\tand a tab ", "<s> is text </s>", "Übung \u2603 \U0001f600", ""]


def test_a_gguf_source_has_the_tokenizer_of_llama(tiny_gguf: Path) -> None:
    llm, source, vocabulary = Llama(tiny_gguf, n_ctx=16), open_checkpoint(tiny_gguf), Vocabulary(tiny_gguf)
    for text in TEXTS:
        expected = llm.tokenize(text.encode(), add_bos=False, special=False)
        assert vocabulary.tokenize(text) == expected
        assert source.tokenize(text) == expected
    llm.close()


def test_a_split_model_needs_all_shards(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m.gguf", "qwen3moe", shard_tensors=5)
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert len(others) > 1
    Vocabulary(first)
    others[0].unlink()
    with pytest.raises(FormatError, match=f"failed to open .*{others[0].name}"):
        Vocabulary(first)


def test_llama_cpp_says_what_is_wrong(tiny_gguf: Path, tmp_path: Path) -> None:
    """Each time its words on this file, not on the one before."""
    whole, damaged = tiny_gguf.read_bytes(), tmp_path / "damaged.gguf"
    version = whole[:4] + (77).to_bytes(4, "little") + whole[8:]
    model = whole.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modex", 1)
    for data, words in (
        (b"no GGUF" * 20, "invalid magic"),
        (version, "version"),
        (whole[:3000], "failed to read"),
        (model, "tokenizer.ggml.model"),
    ):
        damaged.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            Vocabulary(damaged)
        assert str(caught.value).startswith(f"{damaged}: ")
        assert words in str(caught.value)
        assert words in reason()
    listen()
    assert reason() == ""
