"""The training tool on a tiny model: it learns, and it continues where it was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mc_gguf.source import open_checkpoint
from mc_gguf.source.decoder import Decoder
from tests.support import WIKITEXT
from tools.experiments import train_moe


@pytest.fixture
def settings() -> Any:
    return train_moe.Settings(
        layers=1,
        embd=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        experts=4,
        top_k=2,
        expert_ff=32,
        steps=12,
        rows=2,
        ctx=16,
        rate=1e-2,
        balance=0.01,
        seed=0,
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 50)
    return path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


class Killed(Exception):
    pass


def test_a_killed_run_continues_to_the_same_weights(
    settings: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_moe.train(tmp_path / "whole", settings, (text,), 5, compiled=False)

    def windows(stream: Any, settings: Any, step: int) -> Any:
        if step == 8:
            raise Killed
        return draw(stream, settings, step)

    draw = train_moe.windows
    monkeypatch.setattr(train_moe, "windows", windows)
    longer = replace(settings, steps=20)  # before the rate falls it is the same run
    with pytest.raises(Killed):
        train_moe.train(tmp_path / "killed", longer, (text,), 5, compiled=False)
    monkeypatch.setattr(train_moe, "windows", draw)
    train_moe.train(tmp_path / "killed", settings, (text,), 5, compiled=False)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not (tmp_path / "killed" / "training.safetensors").exists()


def test_a_state_of_other_options_is_not_continued(settings: Any, text: Path, tmp_path: Path) -> None:
    run = train_moe.Training(tmp_path, settings, "0", compiled=False)
    run.advance(torch.ones(2, 16, dtype=torch.int64))
    run.save()
    with pytest.raises(click.ClickException, match="other options"):
        train_moe.Training(tmp_path, replace(settings, seed=1), "0", compiled=False)


@pytest.mark.native
def test_the_command_learns_and_its_directory_is_a_source_model(text: Path, tmp_path: Path) -> None:
    sizes = ["--layers", 1, "--embd", 64, "--heads", 2, "--kv-heads", 1, "--head-dim", 32, "--experts", 4]
    sizes += ["--top-k", 2, "--expert-ff", 64, "--ctx", 32, "--rows", 4, "--steps", 40, "--rate", 0.02]
    sizes.append("--no-compile")
    result = CliRunner().invoke(train_moe.main, [str(tmp_path / "hf"), "--text", str(text), *map(str, sizes)])
    assert result.exit_code == 0, result.output
    decoder = Decoder(open_checkpoint(tmp_path / "hf"))
    assert decoder.checkpoint.info.architecture == "qwen3moe"
    tokens = [1, *decoder.checkpoint.tokenize("The quick brown fox jumps over the lazy dog. The quick brown")]
    hidden = decoder.embed(np.array([tokens], dtype=np.int32))
    decoder.attention(0, hidden)
    decoder.feed_forward(0, hidden)
    loss = torch.nn.functional.cross_entropy(decoder.logits(hidden)[0, :-1], torch.tensor(tokens[1:]))
    assert loss < 5  # 8.3 before


def test_default_texts_leave_the_evaluation_text_out() -> None:
    texts = train_moe.default_texts()
    assert {"calibration-mix.txt", "README.md", "LOG.md"} < {path.name for path in texts}
    assert all(path.is_file() for path in texts)
    assert WIKITEXT not in texts


def test_imbalance_is_1_for_even_use_and_grows_with_the_load_of_one() -> None:
    even = 5 * torch.eye(4).repeat(3, 1)
    assert float(train_moe.imbalance(even, 1)) == pytest.approx(1.0)
    most = float(torch.softmax(even[0], dim=0)[0])
    assert float(train_moe.imbalance(even[:1].repeat(9, 1), 1)) == pytest.approx(4 * most)
