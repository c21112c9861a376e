"""Llama: llama_cpp.Llama on the patched runtime, with dynamic expert routing. All of its methods work.

    from mc_gguf import Llama
    llm = Llama("model.gguf", n_ctx=2048)
    print(llm("Once upon a time", max_tokens=32)["choices"][0]["text"])
    llm.routing = "threshold:threshold=0.5"      # from the next token on
    print(llm.routing_stats())

Importing this module loads the runtime and checks its patch set; RuntimeBuildError says what to run when
that fails.
"""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration
from mc_gguf.common.downloads import HEAD_BYTES, placeholder
from mc_gguf.common.errors import FormatError, McError, SourceError
from mc_gguf.common.machine import usable_cores
from mc_gguf.container import expert_bytes, has_own_keys, read_routing
from mc_gguf.ggml.gguf_file import MAGIC
from mc_gguf.routing import Routing, RoutingMetadata, RoutingStats, resolve
from mc_gguf.run import routing_api
from mc_gguf.runtime.llama_library import listen, llama_cpp, reason

CONTEXT_STEP = 256  # tokens


class Llama(llama_cpp.Llama):
    """A llama_cpp.Llama that is quiet and uses all cores by default.

    Args:
        model_path: a GGUF file, plain or mixed-expert.
        routing: a Routing or its text (Routing.parse). "auto" does what the file says.
        verbose: print llama.cpp's log.
        options: all other keyword arguments are those of llama_cpp.Llama.

    Raises:
        SourceError: there is no such file.
        FormatError: llama.cpp cannot load it, for the reason that the message gives.
        McError: the routing does not fit the model.

    With policy odp the runtime measures how much attention each token of a prompt receives within the part
    of the prompt that is computed at once (n_ubatch tokens). Without flash attention it reads the softmax
    that is there anyway. With flash_attn=True it computes the same sums from queries and keys: the measure
    stays exact, and the prompt takes a little longer. Generated tokens come one at a time and cost nothing
    extra either way.
    """

    _stack = contextlib.ExitStack()  # so that __del__ works on an object whose __init__ raised early

    def __init__(
        self, model_path: str | Path, *, routing: Routing | str = "off", verbose: bool = False, **options: Any
    ) -> None:
        path = Path(model_path)
        check_file(path)
        wanted_routing = Routing.of(routing)
        if not options.get("n_threads"):
            options["n_threads"] = usable_cores()
        if not options.get("n_threads_batch"):
            options["n_threads_batch"] = options["n_threads"]
        if wanted := options.get("n_ctx"):
            # llama.cpp rounds up by itself, but llama_cpp sizes its arrays by the number that it was given.
            options["n_ctx"] = -(-wanted // CONTEXT_STEP) * CONTEXT_STEP
        listen()
        try:
            super().__init__(str(path), verbose=verbose, **options)
        except ValueError as error:
            is_about_the_file = str(error).startswith("Failed to ")
            if not is_about_the_file:  # but about an argument
                raise
            raise FormatError(f"{path}: {reason() or error}") from error
        try:
            self._routing = Routing("off")
            self.routing = wanted_routing
        except McError:
            self.close()
            raise

    @property
    def routing(self) -> Routing:
        """The routing that was set last; "auto" has become odp or off.

        A new one, which may be text, holds from the next token on; the context with all that was computed
        stays. When it does not fit the model, setting it raises McError and changes nothing.
        """
        return self._routing

    @routing.setter
    def routing(self, routing: Routing | str) -> None:
        wanted = Routing.of(routing)
        context = self._open_context()
        metadata = None if wanted.policy == "off" else self._routing_metadata
        wanted = wanted.settled(metadata)
        calibration = None if wanted.calibration is None else Calibration.load(Path(wanted.calibration))
        params = resolve(wanted, metadata, routing_api.routing_shape(context), calibration)
        if wanted != self._routing or wanted.policy != "off":  # a new context is off already
            routing_api.set_routing(context, params)
        self._routing = wanted

    def routing_stats(self) -> RoutingStats:
        """What was routed and dropped since the model was loaded or reset_routing_stats() was called."""
        context = self._open_context()
        slots, experts = routing_api.read_counters(context)
        return RoutingStats.of(slots, experts, self._expert_bytes)

    def reset_routing_stats(self) -> None:
        """Start counting from zero again. The routing stays as it is."""
        routing_api.reset_counters(self._open_context())

    def _open_context(self) -> Any:
        context = self._ctx.ctx
        if context is None:
            raise McError("this Llama is closed; load the model again")
        return context

    @cached_property
    def _expert_bytes(self) -> NDArray[np.int64]:
        shape = routing_api.routing_shape(self._open_context())
        return expert_bytes(Path(self.model_path), shape.n_layer, shape.n_expert)

    @cached_property
    def _routing_metadata(self) -> RoutingMetadata | None:
        """What the file says about routing.

        Only a file that mc_gguf wrote is read here once more: for others that would be slow, and our reader
        is stricter than llama.cpp.
        """
        has_experts = routing_api.routing_shape(self._open_context()).n_expert > 0  # not with vocab_only
        return read_routing(Path(self.model_path)) if has_experts and has_own_keys(self.metadata) else None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {"routing": self.routing}


def check_file(path: Path) -> None:
    """Raises SourceError unless `path` is a readable file, FormatError unless it begins like a GGUF."""
    if not path.exists():
        raise SourceError(
            f"{path}: no such file; give the path of a GGUF, for instance one made by mc-gguf convert"
        )
    if path.is_dir():
        raise SourceError(
            f"{path} is a directory; give the path of a GGUF, for instance one made by mc-gguf convert"
        )
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if what := placeholder(head):
        raise FormatError(f"{path} {what}")
    if not head.startswith(MAGIC):
        raise FormatError(f"{path} is not a GGUF: it begins with {head[:4]!r}, not {MAGIC!r}")
