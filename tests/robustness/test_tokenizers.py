"""Texts and vocabularies on which llama.cpp's tokenizers fail: long runs, missing tokens, long tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mc_gguf.runtime.packages import load_gguf
from tests.support.fork_server import ForkServer

pytestmark = pytest.mark.native

RUN = 60_000  # characters
PLACE = "▁"  # SentencePiece's space


def write_vocabulary(
    path: Path, model: str, tokens: Sequence[str], types: Sequence[int], pre: str | None = None
) -> Path:
    """A GGUF with a vocabulary and nothing else; with `pre` a byte-level BPE with one merge."""
    writer = load_gguf().GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{name}", 32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    if pre is None:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(["a a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's vocabulary, and "aa"."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [*map(chr, shown), *(chr(256 + i) for i in range(len(hidden))), "aa"]


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "llama-bpe", "qwen2", "deepseek-v3"])
def test_long_runs_of_a_character(tmp_path: Path, pre: str) -> None:
    tokens = byte_level()
    path = write_vocabulary(tmp_path / "bpe.gguf", "gpt2", tokens, [1] * len(tokens), pre)
    with ForkServer(path) as server:
        for run in ("a", "A", "1", " ", "\n", ".", "é", "中"):
            result = server.run(
                f"l = llm(vocab_only=True); text = ({run!r} * {RUN}).encode()\n"
                "len(l.detokenize(l.tokenize(text, add_bos=False)))"
            )
            assert (result.kind, result.text) == ("ok", str(len((run * RUN).encode()))), (pre, run)


def test_a_vocabulary_without_the_bytes_of_a_text(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", PLACE, "a", "b"]
    path = write_vocabulary(tmp_path / "spm.gguf", "llama", tokens, [2, 3, 3, 1, 1, 1])
    with ForkServer(path) as server:
        assert server.run("llm(vocab_only=True).tokenize(b'ab')").kind == "ok"
        result = server.run("llm(vocab_only=True).tokenize('é'.encode())")
        assert result.kind == "LlamaError"
        assert result.text.startswith("the model's vocabulary has no tokens for 'é'")


def test_long_tokens_are_written_out(tmp_path: Path) -> None:
    long = "x" * 300
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), PLACE, long]
    types = [2, 3, 3, *[6] * 256, 1, 1]
    path = write_vocabulary(tmp_path / "spm.gguf", "llama", tokens, types)
    with ForkServer(path) as server:
        result = server.run(f"len(llm(vocab_only=True).detokenize([{len(tokens) - 1}]))")
    assert result.text == "300"
