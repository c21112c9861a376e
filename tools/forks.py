"""A piece of work in a fork of this process, under limits: for what might end the process, or hang."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

HANG = "hang"


@dataclass(frozen=True)
class Limits:
    """Of a fork: bytes of address space, and seconds."""

    memory: int
    seconds: int


def forked(work: Callable[[], tuple[str, str]], limits: Limits) -> tuple[str, str]:
    """What `work` returns. When its fork ended otherwise: (the name of the signal, or HANG at the end of its
    time, ""), or ("exit", the status).
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _limit(limits)
        with os.fdopen(writer, "w") as answer:
            json.dump(work(), answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return HANG if number == signal.SIGALRM else signal.Signals(number).name, ""
    if not text:
        return "exit", str(os.WEXITSTATUS(status))
    kind, words = json.loads(text)
    return kind, words


def _limit(limits: Limits) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limits.seconds)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
