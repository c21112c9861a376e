"""Python and mc-gguf in a child process under limits: for what might kill or hang the process it is in."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

TIMEOUT_S = 120
MEMORY_BYTES = 8 << 30


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `signal` is the name of the signal that killed it, or ""."""

    code: int
    stdout: str
    stderr: str

    @property
    def signal(self) -> str:
        return signal.Signals(-self.code).name if self.code < 0 else ""

    @property
    def is_clean(self) -> bool:
        """Whether it ended by itself, without a traceback."""
        return self.code in (0, 1, 2) and "Traceback" not in self.stderr


def run_python(code: str, *arguments: object, **options: object) -> Outcome:
    """`python -c CODE ARGUMENTS`; the options are those of run_child."""
    return run_child([sys.executable, "-c", code, *map(str, arguments)], **options)  # type: ignore[arg-type]


def run_command(*arguments: object, **options: object) -> Outcome:
    """`mc-gguf ARGUMENTS` as a program of its own; the options are those of run_child."""
    return run_child([sys.executable, "-m", "mc_gguf", *map(str, arguments)], **options)  # type: ignore[arg-type]


def run_child(
    command: list[str],
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str | None] | None = None,
    stdin: bytes | None = b"",
    timeout: float = TIMEOUT_S,
    memory: int = MEMORY_BYTES,
    file_size: int = resource.RLIM_INFINITY,
) -> Outcome:
    """Runs `command` with limits on its address space and on the files that it writes, in bytes, and on its
    time, in seconds; subprocess.TimeoutExpired when it hangs. Variables of `environment` that are None are
    removed; stdin None is a closed one.
    """
    changed = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
    done = subprocess.run(
        command,
        cwd=cwd,
        env={key: value for key, value in changed.items() if value is not None},
        input=stdin,
        capture_output=True,
        timeout=timeout,
        preexec_fn=_limits(memory, file_size, stdin is None),
        check=False,
    )
    return Outcome(done.returncode, *(text.decode("utf-8", "replace") for text in (done.stdout, done.stderr)))


def _limits(memory: int, file_size: int, close_stdin: bool) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if close_stdin:
            os.close(0)

    return limit
