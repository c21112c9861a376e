"""`mc-gguf inspect`: what is inside a GGUF, ours or plain."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def command(model: Path, as_json: bool) -> None:
    """Show the experts' types per layer, sizes and bits of MODEL, after checking the whole file."""
    import json

    from mc_gguf.container import MixedGguf, describe_model
    from mc_gguf.container.table import render_description

    description = describe_model(MixedGguf.open(model))
    click.echo(json.dumps(description, indent=1) if as_json else render_description(description))
