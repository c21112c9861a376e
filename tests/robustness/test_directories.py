"""Files beside the weights: what does not matter to them stops nothing, and the rest is one line."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mc_gguf.common.errors import McError
from mc_gguf.source import Checkpoint, open_checkpoint
from tests.support import TINY

pytestmark = pytest.mark.native

TOKENIZER = json.loads((TINY / "tokenizer.json").read_text())
TEMPLATE = "chat_template of tokenizer_config.json"
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
BOTH = "the tokenizer (tokenizer.json, tokenizer.model) cannot be read"
CONFIG = json.loads((TINY / "tokenizer_config.json").read_text())


def _directory(folder: Path, files: dict[str, object]) -> Path:
    """The bundled model with other files: text, bytes, JSON documents, or None for a file that is missing."""
    folder.mkdir()
    for path in TINY.iterdir():
        if path.name not in files:
            (folder / path.name).symlink_to(path)
    for name, content in files.items():
        if content is not None:
            data = content if isinstance(content, str | bytes) else json.dumps(content)
            (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"padding": {**PADDING, "strategy": {"Fixed": 2**63 - 1}}},
    ],
)
def test_a_tokenizer_that_panics_is_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    files: dict[str, object] = {"tokenizer.json": TOKENIZER | changes, "tokenizer.model": None}
    with pytest.raises(McError, match=r"the tokenizer .* cannot be read"):
        open_checkpoint(_directory(tmp_path / "source", files)).tokenize("one two")


def _name(checkpoint: Checkpoint) -> Any:
    class Writer:
        def __init__(self) -> None:
            self.kv: dict[str, Any] = {}

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda key, value, *_, **__: self.kv.__setitem__(key, value)

    writer = Writer()
    checkpoint.copy_kv(writer)
    return writer.kv["general.name"].decode().lower()


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        ({"README.md": "---\ntitle: A: B\n---\n"}, "README.md: title"),
        ({"README.md": b"---\ntitle: \xff\n---\n"}, None),
        ({"README.md": "---\nlicense: 2024-01-01\nlanguage: [no, en]\ntags: [1, a]\n---\n"}, None),
        ({"README.md": "---\n- a\n---\n"}, "README.md: its front matter"),
        ({"generation_config.json": "[1]"}, None),
        ({"generation_config.json": b"\xff"}, None),
        ({"tokenizer_config.json": CONFIG | {"chat_template": "{{ if .System }}x{{ end }}"}}, None),
        ({"tokenizer_config.json": CONFIG | {"chat_template": 5}}, TEMPLATE),
        ({"tokenizer_config.json": CONFIG | {"chat_template": [3]}}, TEMPLATE),
        ({"chat_template.jinja": b"\xff\xfe{{"}, "chat_template.jinja"),
        ({"chat_template.json": "[3]"}, "chat_template.json"),
        ({"chat_template.json": ""}, None),
    ],
)
def test_what_does_not_matter_stops_nothing(
    files: dict[str, object], left_out: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = open_checkpoint(_directory(tmp_path / "m", files))
    assert found.info.fingerprint == open_checkpoint(TINY).info.fingerprint
    words = [record.getMessage() for record in caplog.records]
    assert [line.endswith(f"left out of the metadata: {left_out}") for line in words] == [True] * bool(
        left_out
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": "[1]"}, "tokenizer.json is not a JSON object"),
        ({"tokenizer_config.json": "[1]"}, "tokenizer_config.json is not a JSON object"),
        ({"special_tokens_map.json": "5"}, "special_tokens_map.json is not a JSON object"),
        ({"added_tokens.json": "[1]"}, "added_tokens.json is not a JSON object"),
        ({"config.json": "null"}, "config.json is not a JSON object"),
        ({"tokenizer.model": b"\0 no model" * 50}, BOTH),
        (
            {"tokenizer.model": b"\0", "tokenizer.json": None},
            "the tokenizer (tokenizer.model) cannot be read",
        ),
        ({"tokenizer_config.json": CONFIG | {"added_tokens_decoder": [1]}}, BOTH),
        ({"tokenizer.json": TOKENIZER | {"model": {"type": "Weird"}}}, "the tokenizer (tokenizer.json, "),
        ({"tokenizer.json": TOKENIZER | {"model": [1]}}, "the tokenizer (tokenizer.json, "),
        ({"tokenizer.json": TOKENIZER | {"added_tokens": 5}}, "the tokenizer (tokenizer.json, "),
    ],
)
def test_tokenizers_that_cannot_be_read(files: dict[str, object], words: str, tmp_path: Path) -> None:
    folder = _directory(tmp_path / "m", files)
    with pytest.raises(McError) as caught:
        open_checkpoint(folder).tokenize("some text")
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "download" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_model_is_enough(tmp_path: Path) -> None:
    found = open_checkpoint(_directory(tmp_path / "m", {"tokenizer.json": None}))
    whole = open_checkpoint(TINY)
    for text in ("Hello <s> world", "  two\n\nlines é 中 \N{GRINNING FACE}", ""):
        assert found.tokenize(text) == whole.tokenize(text)


def test_the_fingerprint_is_of_weights_not_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = open_checkpoint(TINY).info.fingerprint
    moved = tmp_path / "another name"
    shutil.copytree(TINY, moved)
    (moved / "README.md").write_text("---\nname: Other\nlicense: mit\n---\n")
    monkeypatch.chdir(moved)
    found = open_checkpoint(Path())
    assert (found.info.fingerprint, _name(found)) == (wanted, "other")
    (moved / "README.md").unlink()
    found = open_checkpoint(Path())
    assert (found.info.fingerprint, _name(found)) == (wanted, "another name")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert open_checkpoint(moved).info.fingerprint != wanted
