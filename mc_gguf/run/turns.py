"""One call at a time: the threads that share a Llama wait for each other. And what a fork lacks."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from mc_gguf.common.errors import LlamaError
from mc_gguf.runtime.closed import Closed

_living: weakref.WeakSet[Any] = weakref.WeakSet()


class _Process:
    """What this process did. A fork lacks OpenMP's threads, and waits forever for them."""

    has_threads = False
    lost_threads = False


def register(llama: Any) -> None:
    """Give a new Llama its lock."""
    llama._lock = threading.RLock()
    llama._in_callback = False
    _living.add(llama)


def in_turn(method: Callable[..., Any], computes: bool = False) -> Callable[..., Any]:
    """`method` of a Llama under its lock. With `computes`, it is refused where the context cannot be used."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            if isinstance(self, Closed):  # by the thread that this one has waited for
                return self.n_tokens  # raises
            if computes:
                _check_computing(self)
            return method(self, *arguments, **options)

    return call


def computing(method: Callable[..., Any]) -> Callable[..., Any]:
    """in_turn() for what changes the context, or frees it."""
    return in_turn(method, computes=True)


def _check_computing(llama: Any) -> None:
    if llama._in_callback:
        raise LlamaError(
            "a logits processor cannot use the context of the Llama that calls it; take a second Llama"
        )


def check_threads(n_threads: int) -> None:
    """To be called before something is computed. Raises LlamaError in a fork whose threads are lost."""
    if n_threads > 1 and _Process.lost_threads:
        raise LlamaError(
            "this process is a fork of one that has computed with several threads, which a fork lacks; start "
            'it in another way (multiprocessing.set_start_method("spawn")), or compute with n_threads=1'
        )
    _Process.has_threads |= n_threads > 1


def _after_fork() -> None:
    _Process.lost_threads = _Process.lost_threads or _Process.has_threads
    for llama in list(_living):
        if not isinstance(llama, Closed):
            llama._lock = threading.RLock()  # the thread that may have held it is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
