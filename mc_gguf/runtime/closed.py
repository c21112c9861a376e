"""What an object becomes when it is closed: everything but its name says so."""

from __future__ import annotations

from functools import cache
from typing import Any

from mc_gguf.common.errors import LlamaError

_KEPT = ("close", "model_path")


class Closed:
    """Mixed into a class in front of it; see closed_type."""

    def __getattribute__(self, name: str) -> Any:
        if name in _KEPT or name.startswith("__"):
            return object.__getattribute__(self, name)
        raise LlamaError("this Llama is closed; load the model again")

    def close(self) -> None:
        """Nothing: it is closed."""

    def __del__(self) -> None:
        pass


@cache
def closed_type(kind: type) -> type:
    """A subclass of `kind` whose every attribute raises LlamaError. An object gets it as its class once what
    it wraps has been freed, so that no method, of llama_cpp or of a subclass, can reach freed memory.
    """
    return type(kind.__name__, (Closed, kind), {"__module__": kind.__module__})
