"""What config.json asks for and the runtime does not do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mc_gguf.common.errors import SourceError
from mc_gguf.source.directory import check_directory
from mc_gguf.source.not_followed import not_followed
from tests.support.hf_directories import write_directory

K = "model_type"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({K: "qwen3_moe"}, "norm_topk_prob is false"),
        ({K: "qwen3_moe", "norm_topk_prob": True}, None),
        ({K: "qwen2_moe"}, None),
        ({K: "qwen2_moe", "norm_topk_prob": True}, "norm_topk_prob is true"),
        ({K: "olmoe", "norm_topk_prob": True}, "norm_topk_prob is true"),
        ({K: "olmoe", "clip_qkv": 8.0}, "clip_qkv is ignored"),
        ({K: "mixtral"}, None),
        ({K: "mixtral", "sliding_window": 4096, "max_position_embeddings": 32768}, "sliding_window"),
        ({K: "mixtral", "sliding_window": 4096, "max_position_embeddings": 4096}, None),
        ({K: "qwen2_moe", "sliding_window": 64, "use_sliding_window": False}, None),
        ({K: "qwen2_moe", "sliding_window": 64, "use_sliding_window": True}, "sliding_window is 64"),
        ({K: "qwen2_moe", "sliding_window": 64, "layer_types": ["sliding_attention"]}, "sliding_window"),
        ({K: "mixtral", "rope_scaling": {"type": "linear", "factor": 2}}, None),
        ({K: "mixtral", "rope_scaling": {"rope_type": "yarn", "factor": 2}}, None),
        ({K: "mixtral", "rope_scaling": {"rope_type": "llama3"}}, None),
        ({K: "olmoe", "rope_scaling": {"rope_type": "llama3"}}, "'llama3' is ignored"),
        ({K: "mixtral", "rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is ignored"),
        ({K: "mixtral", "rope_parameters": {"rope_type": "longrope"}}, "'longrope' is ignored"),
        ({K: "mixtral", "rope_scaling": 2}, "which is no object"),
        ({K: "mixtral", "rope_parameters": {"rope_theta": 10000.0}}, None),
        ({K: "another", "norm_topk_prob": False, "sliding_window": 1}, None),
    ],
)
def test_sentences(config: dict[str, Any], words: str | None) -> None:
    found = not_followed(config)
    assert len(found) == (words is not None)
    assert all(words in sentence for sentence in found if words)


def test_it_is_one_warning_before_anything_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_directory(tmp_path, sliding_window=16, rope_scaling={"type": "dynamic", "factor": 2})
    with caplog.at_level(logging.WARNING):
        check_directory(folder)
    (record,) = caplog.records
    assert "config.json: the runtime does not follow this: sliding_window is 16" in record.getMessage()
    assert "'dynamic' is ignored" in record.getMessage()


def test_another_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"hidden_act is 'gelu', but the runtime's experts use 'silu'"):
        check_directory(write_directory(tmp_path, hidden_act="gelu"))
