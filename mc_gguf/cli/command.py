"""What every command is made of: options in sections, and the single error edge.

Cheap to import: click and mc_gguf's light modules.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import click

from mc_gguf.cli.proposals import proposal_lines
from mc_gguf.common.errors import McError, NoBudgetError

# What the system refuses for reasons that the user can change; other OSErrors are bugs with a traceback.
USER_ERRNOS = frozenset(
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOENT EISDIR ENOTDIR EMFILE ENAMETOOLONG".split()
)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
OptionMaker = Callable[..., Decorator]  # click.option, or what section() makes of it


class SectionOption(click.Option):
    """An option under a heading of the help text."""

    def __init__(self, *names: Any, section: str, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.section = section


def section(title: str) -> OptionMaker:
    """click.option for the options under the heading `title`."""

    def option(*names: str, **attributes: Any) -> Decorator:
        return click.option(*names, cls=SectionOption, section=title, **attributes)

    return option


def together(*options: Decorator) -> Decorator:
    """Options that several commands share, as one decorator; they keep their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class SuggestingGroup(click.Group):
    """A group that names the nearest of its commands when there is none of the name that was typed."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name.lower(), self.list_commands(ctx), n=1, cutoff=0.5)
            hint = (
                f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(self.list_commands(ctx))}."
            )
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)


class Command(click.Command):
    """A command whose help shows its options by section and whose errors are one line. Without the arguments
    that it needs, it shows its help.
    """

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.no_args_is_help = any(
            isinstance(parameter, click.Argument) and parameter.required for parameter in self.params
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections in the order of their first options, and options without one at the end."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for option in sorted(options, key=lambda option: not isinstance(option, SectionOption)):
            title = option.section if isinstance(option, SectionOption) else "Other options"
            if row := option.get_help_record(ctx):
                sections.setdefault(title, []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """The error edge: what the command returns, or one line on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except McError as error:
            lines = proposal_lines(error, ctx) if isinstance(error, NoBudgetError) else []
            _fail(error.exit_code, f"Error: {self._described(error)}", *lines)
        except KeyboardInterrupt:
            _fail(130, "\nInterrupted")
        except MemoryError as error:
            _fail(1, f"Error: there is too little memory{f': {error}' if str(error) else ''}")
        except OSError as error:
            refuse(error)

    def _described(self, error: McError) -> str:
        """The message after the options that stand for the parameters that it is about."""
        options = list(self._options(error.parameters))
        return f"{', '.join(options)}: {error}" if options else str(error)

    def _options(self, parameters: tuple[str, ...]) -> Iterator[str]:
        for name in parameters:
            for parameter in self.params:
                if parameter.name == name and isinstance(parameter, click.Option):
                    yield "/".join([max(parameter.opts, key=len), *parameter.secondary_opts])


def refuse(error: OSError) -> NoReturn:
    """One line for what the system refuses, and an exit code; bugs are raised."""
    if error.errno not in USER_ERRNOS:  # click deals with EPIPE
        raise error
    _fail(1, f"Error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")


def _fail(code: int, *lines: str) -> NoReturn:
    for line in lines:
        click.echo(line, err=True)
    raise SystemExit(code)
