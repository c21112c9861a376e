"""Command lines in the documents: each names a command, options and arguments that exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from mc_gguf import cli
from tests.support import ROOT
from tests.support.documents import Command, commands, documents

COMMANDS = [command for path in documents() for command in commands(path)]


def parse(words: tuple[str, ...]) -> None:
    """Parse as click would, without looking at files or values. Raises click.UsageError."""
    command: click.Command = cli.main
    context = click.Context(command, info_name="mc-gguf", **command.context_settings)
    left = list(words)
    while isinstance(command, click.Group) and left and not left[0].startswith("-"):
        name = left.pop(0)
        below = command.get_command(context, name)
        if below is None:
            raise click.UsageError(f"no such command {name}")
        command, context = below, click.Context(below, info_name=name, parent=context)
    values, rest, _ = command.make_parser(context).parse_args(left)
    if rest:
        raise click.UsageError(f"unexpected {rest}")
    for parameter in command.params:
        missing = parameter.value_is_missing(values.get(parameter.name))
        if isinstance(parameter, click.Argument) and parameter.required and missing:
            raise click.UsageError(f"no {parameter.name}")


def test_the_documents_show_commands() -> None:
    assert len(COMMANDS) > 10
    assert {"README.md"} < {command.path.name for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_line_is_understood(command: Command) -> None:
    parse(command.words)


@pytest.mark.parametrize(
    "line", ["convert a -o b --bitz 2", "quantise a b", "inspect", "inspect a b", "chat a --temp"]
)
def test_a_wrong_command_line_is_not(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(tuple(line.split()))


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_that_is_named_exists(path: Path) -> None:
    for name in re.findall(r"python -m (tools[\w.]*)", path.read_text(encoding="utf-8")):
        module = ROOT / name.rstrip(".").replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), name
