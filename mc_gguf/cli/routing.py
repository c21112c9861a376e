"""`mc-gguf routing`: what a GGUF carries of dynamic expert routing, shown and set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mc_gguf.routing import RoutingMetadata


@click.group()
def command() -> None:
    """Show or set which experts a GGUF drops while it runs: thresholds, layers, protected tokens.

    Only metadata is changed, never a weight. Any GGUF of a Mixture-of-Experts model can carry it, mixed or
    plain; other programs ignore it.
    """


@command.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def show(model: Path, as_json: bool) -> None:
    """Show the thresholds in MODEL, the layers that may drop experts, and what is predicted of it."""
    from mc_gguf.common.errors import McError
    from mc_gguf.container import read_routing

    metadata = read_routing(model)
    if metadata is None:
        raise McError(
            f"{model} carries no routing; give it some with: mc-gguf routing set --calibration FILE"
        )
    _print(model, metadata, as_json)


@command.command("set")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write a copy.  [default: MODEL is replaced]"
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Calibration of this model.  [default: what MODEL carries of it]",
)
@click.option(
    "--quantile",
    metavar="Q",
    help="Share of the slots below the first that every layer drops, instead of --target-drop; 0.5 is the "
    "published rule.",
)
@click.option(
    "--target-drop",
    metavar="SHARE",
    help="Share of all expert activations to drop, 15% or 0.15, spread over the layers so that the predicted "
    "damage is least.  [default: 15%]",
)
@click.option(
    "--protect",
    metavar="SHARE",
    default="2%",
    show_default=True,
    help="Share of a prompt's tokens that keep all their experts under policy odp.",
)
@click.option(
    "--layers",
    metavar="auto|all|0,1,...",
    help="Layers that may drop experts; auto: those that tolerate it.  [default: all, with --quantile auto]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def set_(
    model: Path,
    output: Path | None,
    calibration: Path | None,
    quantile: str | None,
    target_drop: str | None,
    protect: str,
    layers: str | None,
    as_json: bool,
) -> None:
    """Compute thresholds anew and write them into MODEL; every tensor stays as it is, byte for byte.

    MODEL is replaced at the end, by a rename: an interrupted run leaves it as it was. In a split GGUF the
    first shard carries the metadata.
    """
    from mc_gguf.artifacts import Calibration
    from mc_gguf.common.progress import progress
    from mc_gguf.common.units import parse_layers, parse_share
    from mc_gguf.container import MixedGguf, base_metadata, write_routing
    from mc_gguf.routing.metadata import choose_thresholds

    if quantile is not None and target_drop is not None:
        raise click.UsageError("--quantile and --target-drop exclude each other; give one of them")
    header = MixedGguf.open(model).header
    base = base_metadata(header, Calibration.load(calibration) if calibration else None)
    metadata = choose_thresholds(
        base,
        parse_share(quantile) if quantile is not None else None,
        parse_share(target_drop) if target_drop is not None else None,
        parse_layers(layers) if layers is not None else None,
        parse_share(protect),
    )
    with progress("copy", unit="MB") as bar:
        write_routing(model, output or model, metadata, bar)
    _print(output or model, metadata, as_json)


def _print(path: Path, metadata: RoutingMetadata, as_json: bool) -> None:
    import json

    from mc_gguf.routing.report import describe, summary, table

    description = describe(metadata)
    if as_json:
        click.echo(json.dumps({"path": str(path), **description}, indent=1))
    else:
        click.echo("\n".join([f"{path}: {summary(description)}", "", *table(description)]))
