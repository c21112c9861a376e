"""Perplexity through the runtime, against transformers on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf.errors import McError
from mc_gguf.evaluate import Perplexity, perplexity

pytestmark = pytest.mark.native


def test_standard_error_by_hand() -> None:
    nll = np.log(np.array([2.0, 8.0, 2.0, 8.0]))
    found = Perplexity.of(nll, 512)
    assert found.value == pytest.approx(4.0)
    assert found.standard_error == pytest.approx(4.0 * np.log(2) * (4 / 3) ** 0.5 / 2)
    assert found.n_scored == 4


def test_equals_transformers(tiny_model: Path, tiny_gguf: Path, repo_root: Path) -> None:
    import torch
    from transformers import AutoTokenizer, MixtralForCausalLM

    text = (repo_root / "tests" / "data" / "wikitext-2.test.txt").read_text(encoding="utf-8")[:20_000]
    n_ctx, n_chunk = 256, 4
    found = perplexity(tiny_gguf, text, n_ctx=n_ctx, n_scored=(n_ctx // 2 - 1) * n_chunk, n_threads=2)
    assert found.n_scored == (n_ctx // 2 - 1) * n_chunk

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
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


def test_quantized_attention_runs(tiny_model: Path, tmp_path: Path, repo_root: Path) -> None:
    """Q8_0 and Q6_K attention, which the CPU backend may put into repack or AMX buffers."""
    from click.testing import CliRunner

    from mc_gguf.cli import main

    plain, mixed = tmp_path / "16.gguf", tmp_path / "q.gguf"
    assert (
        CliRunner().invoke(main, ["convert", str(tiny_model), "-o", str(plain), "--bpw", "16"]).exit_code == 0
    )
    options = ["--bpw", "4.5", "--types", "Q3_K,Q4_K", "--tokens", "1024", "--ctx", "128", "--rows", "16"]
    result = CliRunner().invoke(main, ["convert", str(tiny_model), "-o", str(mixed), *options])
    assert result.exit_code == 0, result.output
    text = (repo_root / "tests" / "data" / "wikitext-2.test.txt").read_text(encoding="utf-8")
    of_plain, of_mixed = (perplexity(path, text, 512, 1000, n_threads=2).value for path in (plain, mixed))
    assert of_mixed == pytest.approx(of_plain, rel=0.03)


def test_too_little_text(tiny_gguf: Path) -> None:
    with pytest.raises(McError, match="longer text"):
        perplexity(tiny_gguf, "Once upon a time", n_ctx=256)
