"""A piece of work in a fork of this process, under limits: for what might end the process, or hang."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

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
        become(lambda: _answer(reader, writer, work, limits))
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


def become(work: Callable[[], None]) -> NoReturn:
    """Do `work` in a fork and end it, whatever happens: its parent's frames must not clean up twice."""
    try:
        work()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  it has no one else to tell
        os.write(2, f"{error!r}\n".encode(errors="replace"))
    finally:
        os._exit(1)


def _answer(reader: int, writer: int, work: Callable[[], tuple[str, str]], limits: Limits) -> None:
    os.close(reader)
    _limit(limits)
    with os.fdopen(writer, "w") as answer:
        json.dump(work(), answer)


def _limit(limits: Limits) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limits.seconds)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
