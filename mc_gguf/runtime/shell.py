"""Run a build's commands: their output goes to a log file, their lines to the progress display, and a failure
becomes one clear error.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mc_gguf.common.errors import RuntimeBuildError

TAIL_LINES = 20


@dataclass(frozen=True)
class Log:
    """The full log of one build, appended to by each command."""

    path: Path

    def run(
        self,
        what: str,
        command: Sequence[str | Path],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> str:
        """Run `command` and return its output, stderr included; each line goes to the log and to `on_line`.

        Raises RuntimeBuildError when it cannot start or fails; the last lines of its output are then printed
        on stderr.
        """
        words = [str(word) for word in command]
        output: list[str] = []
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as log:
            log.write(f"\n$ {shlex.join(words)}\n")
            log.flush()
            try:
                process = subprocess.Popen(
                    words,
                    cwd=cwd,
                    env=dict(env) if env is not None else None,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    encoding="utf-8",
                    errors="replace",
                )
            except OSError as error:
                raise RuntimeBuildError(f"{what}: cannot run {words[0]}: {error.strerror}") from error
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    output.append(line)
                    on_line(line.rstrip())
        if process.returncode:
            self._show_tail(output)
            raise RuntimeBuildError(
                f"{what} failed with exit code {process.returncode}; full log: {self.path}"
            )
        return "".join(output)

    def _show_tail(self, output: Sequence[str]) -> None:
        tail = deque(output, maxlen=TAIL_LINES)
        sys.stderr.write(f"\n--- last lines of {self.path}\n{''.join(tail)}---\n")


def git_env(folder: Path) -> dict[str, str]:
    """The environment for git in `folder`: no configuration, hooks or identity of the user or the system, and
    no search for a repository above (in a plain folder inside another repository, git would act on that one).
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    identity = {"NAME": "mc_gguf", "EMAIL": "mc_gguf@localhost", "DATE": "2026-01-01T00:00:00Z"}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_{key}": value for key, value in identity.items()}
    return env | {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent),
        "GIT_TERMINAL_PROMPT": "0",
        "XDG_CONFIG_HOME": os.devnull,  # git/attributes and git/ignore of the user
        "LC_ALL": "C",
    }
