"""The command line: a group that imports a command's module when it is needed.

Each module mc_gguf/cli/NAME.py defines one click command named `command`. It maps its options to the
parameters of one function of the library, and prints what the function returns; it decides nothing. The
modules' imports are cheap and the commands' bodies import the rest, so `mc-gguf --help` needs neither torch
nor numpy.
"""

from __future__ import annotations

import importlib
import logging

import click

from mc_gguf import __version__
from mc_gguf.cli.command import SuggestingGroup
from mc_gguf.common.machine import wait_briefly

SECTIONS: dict[str, tuple[str, ...]] = {
    "Make and run a file": ("convert", "chat", "inspect", "eval", "routing"),
    "The steps of convert": ("calibrate", "plan", "refine", "quantize"),
    "Set up": ("runtime",),
}
COMMANDS: tuple[str, ...] = tuple(name for names in SECTIONS.values() for name in names)


class CommandGroup(SuggestingGroup):
    """Loads commands by name, and lists them by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mc_gguf.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(title):
                formatter.write_dl([(n, c.get_short_help_str(100)) for n, c in commands.items() if c])


@click.group(
    cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="mc-gguf")
def main() -> None:
    """Mixed-expert GGUF files for Mixture-of-Experts models: every expert gets its own quantization type.

    `convert` makes one from a Hugging Face directory or a 16-bit GGUF, and `chat` runs it.
    """
    wait_briefly()  # before a command loads torch or the runtime
    _show_log()


def _show_log() -> None:
    """What mc_gguf logs goes to stderr as plain lines, as other libraries' warnings do by default."""
    logging.getLogger("mc_gguf").setLevel(logging.INFO)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.INFO)
