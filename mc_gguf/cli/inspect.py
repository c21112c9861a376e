"""`mc-gguf inspect`: what is inside a GGUF, ours or plain."""

from __future__ import annotations

from pathlib import Path

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command
from mc_gguf.cli.result import show


@click.command(cls=Command)
@click.argument("model", type=o.PATH)
@o.json_option
def command(model: Path, as_json: bool) -> None:
    """Show the experts' types in MODEL, sizes and bits.

    The whole file is checked first. Of a split GGUF, give any of its shards.
    """
    from mc_gguf.container import MixedGguf, describe_model
    from mc_gguf.container.table import render_description

    description = describe_model(MixedGguf.open(model))
    show(description, "" if as_json else render_description(description), as_json)
