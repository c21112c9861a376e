"""mc-gguf as a user calls it, in this process."""

from __future__ import annotations

import re

from click.testing import CliRunner, Result

from mc_gguf.cli import main


def invoke(*arguments: object) -> Result:
    """`mc-gguf ARGUMENTS`: exit code, stdout, stderr."""
    return CliRunner().invoke(main, [*map(str, arguments)])


def fails_with(message: str, *arguments: object) -> None:
    """`mc-gguf ARGUMENTS` ends with exit code 1 and one line on stderr that matches `message`, a regex."""
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert re.search(message, result.stderr)
    assert len(result.stderr.splitlines()) == 1
