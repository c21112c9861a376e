"""The command line: a group that imports a command's module when it is needed, and the single error edge.

Each module mc_gguf/cli/<name>.py defines one click command object named `command`. Their imports are cheap
(click and mc_gguf's light modules), their bodies import the rest, so `mc-gguf --help` needs neither torch nor
numpy.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable
from typing import Any

import click

from mc_gguf import __version__
from mc_gguf.common.errors import McError

COMMANDS: tuple[str, ...] = (
    "calibrate",
    "plan",
    "refine",
    "quantize",
    "convert",
    "inspect",
    "routing",
    "chat",
    "eval",
    "runtime",
)
# What the system refuses for reasons that the user can change; other OSErrors are bugs with a traceback.
USER_ERRNOS = frozenset(
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOENT EISDIR ENOTDIR EMFILE ENAMETOOLONG".split()
)


class CommandGroup(click.Group):
    """Loads commands by name, in the order of COMMANDS, behind the error edge."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mc_gguf.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        return guarded(lambda: super(CommandGroup, self).invoke(ctx))


def guarded(call: Callable[[], Any]) -> Any:
    """The error edge: what `call` returns, or one line on stderr and exit code 1 (130 when interrupted)."""
    try:
        return call()
    except McError as error:
        _fail(f"Error: {error}", 1)
    except KeyboardInterrupt:
        _fail("\nInterrupted", 130)
    except OSError as error:
        if error.errno not in USER_ERRNOS:  # click deals with EPIPE
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"Error: {where}{error.strerror}", 1)


def _fail(line: str, code: int) -> None:
    click.echo(line, err=True)
    raise SystemExit(code)


@click.group(
    cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="mc-gguf")
def main() -> None:
    """Mixed-expert GGUF files for Mixture-of-Experts models: every expert gets its own quantization type.

    `convert` makes one from a Hugging Face directory or a 16-bit GGUF, `chat` runs it.
    """
