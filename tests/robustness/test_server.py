"""llama_cpp.server with our Llama: what would end the process is an HTTP error, and the server goes on.

It runs where the packages of the server are installed (pip install 'mc-gguf[dev]').
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from mc_gguf import Llama

import llama_cpp  # isort: skip
from llama_cpp.server.app import create_app  # isort: skip
from llama_cpp.server.settings import ModelSettings, ServerSettings  # isort: skip
from starlette.testclient import TestClient  # isort: skip

pytestmark = pytest.mark.native

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FEW = {"prompt": "one two", "max_tokens": 3}
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, FEW | {"grammar": 'root ::= root "a"'}, "left recursion"),
    (COMPLETIONS, FEW | {"grammar": "root ::= foo"}, "Undefined rule identifier 'foo'"),
    (COMPLETIONS, FEW | {"grammar": 'x ::= "a"'}, "'root' symbol"),
    (COMPLETIONS, FEW | {"prompt": "king " * 1000}, "maximum context length is 256 tokens"),
    (CHAT, HELLO | {"messages": [{"role": "user", "content": "king " * 1000}]}, "maximum context length"),
    (COMPLETIONS, FEW | {"logit_bias": {"99999": 1}}, "no token 99999"),
    (CHAT, HELLO | {"logit_bias": {"99999": 1}}, "no token 99999"),
    (COMPLETIONS, FEW | {"top_k": 2**40}, "top_k must be"),
    (COMPLETIONS, FEW | {"seed": 2**40}, "seed must be"),
    (COMPLETIONS, FEW | {"suffix": "x"}, "suffix is not supported"),
    ("/v1/embeddings", {"input": "x"}, "embedding=True"),
    ("/extras/detokenize", {"tokens": [10**6]}, "no token 1000000"),
]


@pytest.fixture(scope="module")
def client(tiny_gguf: Path) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "Llama", Llama)  # by this name the server makes it
        model = ModelSettings(model=str(tiny_gguf), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
        app = create_app(server_settings=ServerSettings(), model_settings=[model])
        yield TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(("place", "body", "message"), REFUSED)
def test_what_is_refused_is_an_http_error(
    client: TestClient, place: str, body: dict[str, Any], message: str
) -> None:
    answer = client.post(place, json=body)
    assert 400 <= answer.status_code < 600
    assert message in answer.json()["error"]["message"]
    assert client.post(COMPLETIONS, json=FEW).json()["usage"]["completion_tokens"] == 3


def test_a_schema_is_kept_to(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer = client.post(CHAT, json=HELLO | {"response_format": {"type": "json_object", "schema": schema}})
    assert re.match(r'\{\s*"a"\s*:\s*-?\d', answer.json()["choices"][0]["message"]["content"])
    for broken in ({"type": "nope"}, {"$ref": "#/x/y"}):
        form = {"type": "json_object", "schema": broken}
        answer = client.post(CHAT, json=HELLO | {"response_format": form})
        assert answer.status_code == 500
        assert "this schema cannot be followed" in answer.json()["error"]["message"]


def test_a_long_text_is_tokenized(client: TestClient) -> None:
    assert len(client.post("/extras/tokenize", json={"input": "a" * 100_000}).json()["tokens"]) == 100_001
