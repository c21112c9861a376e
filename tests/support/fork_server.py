"""A process that has loaded the runtime, but no model, and forks a child for every piece of code.

So what may kill or hang a process is tried in 0.1 s:

    with ForkServer(Path("model.gguf")) as server:
        server.run("llm(n_ctx=256)('Once', max_tokens=4)").text

The code sees the names of this module; its last expression is the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import ROOT
from tools.forks import Limits, forked

LIMITS = Limits(memory=16 << 30, seconds=60)


@dataclass(frozen=True)
class Result:
    """`kind` is "ok", the name of an exception, or that of the signal that killed the child. `text` is the
    repr of the value, or the message.
    """

    kind: str
    text: str


class ForkServer:
    """The server with one model, as a context manager."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "tests.support.fork_server", str(model)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        return Result(*json.loads(self._process.stdout.readline()))

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def serve(model: str) -> None:
    """Answers every line of stdin, a JSON string of code, with a line [kind, text]."""
    names = _names(model)
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    for line in sys.stdin:
        answer = forked(partial(_try, json.loads(line), names), LIMITS)
        os.write(out, json.dumps(answer).encode() + b"\n")


def _try(code: str, names: dict[str, Any]) -> tuple[str, str]:
    *before, last = code.strip().splitlines()
    try:
        exec("\n".join(before), names)
        return "ok", repr(eval(last, names))[:2000]
    except Exception as error:  # noqa: BLE001  what is raised is the result
        return type(error).__name__, str(error)[:2000]


def _names(model: str) -> dict[str, Any]:
    import numpy

    from mc_gguf.common.errors import LlamaError
    from mc_gguf import Llama  # isort: skip  # first: it picks the libraries that llama_cpp loads

    import llama_cpp  # isort: skip
    from llama_cpp import llama_speculative  # isort: skip

    def llm(**options: Any) -> Llama:
        return Llama(model, **({"n_ctx": 256, "n_threads": 1} | options))

    def chat(**options: Any) -> Any:
        return llm().create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=9, **options)

    return {
        "Draft": llama_speculative.LlamaPromptLookupDecoding,
        "Grammar": llama_cpp.llama_grammar.LlamaGrammar.from_string,
        "Llama": Llama,
        "LlamaError": LlamaError,
        "chat": chat,
        "inf": float("inf"),
        "model": model,
        "nan": float("nan"),
        "np": numpy,
        "llm": llm,
        "processed": lambda process: llm()("x", max_tokens=3, logits_processor=[process]),
        "schema": lambda schema: chat(response_format={"type": "json_object", "schema": schema}),
    }


if __name__ == "__main__":
    serve(sys.argv[1])
