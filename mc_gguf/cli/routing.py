"""`mc-gguf routing`: what a GGUF carries of dynamic expert routing, shown and set; the policies there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli import result
from mc_gguf.cli.command import Command, SuggestingGroup, section

if TYPE_CHECKING:
    from mc_gguf.routing import RoutingMetadata

thresholds = section("Thresholds")


@click.group(cls=SuggestingGroup)
def command() -> None:
    """Show or set which experts a GGUF may drop.

    A file carries thresholds, the layers that may drop experts, and the share of protected tokens. Only
    metadata is changed, never a weight. Any GGUF of a Mixture-of-Experts model can carry it, mixed or
    plain; other programs ignore it.
    """


@command.command(cls=Command)
@click.argument("model", type=o.PATH)
@o.json_option
def show(model: Path, as_json: bool) -> None:
    """Show the thresholds in MODEL and their predicted effect."""
    from mc_gguf.container import load_routing

    _show(model, load_routing(model), as_json)


@command.command("set", cls=Command)
@click.argument("model", type=o.PATH)
@thresholds("-o", "--output", type=o.PATH, help="Write a copy.  [default: MODEL is replaced]")
@thresholds(
    "--target-drop",
    metavar="SHARE",
    help="Share of all expert activations to drop, 15% or 0.15, spread over the layers so that the predicted "
    "damage is least.  [default: 15%]",
)
@thresholds(
    "--quantile",
    metavar="SHARE",
    help="Instead: share of the slots below the first that every layer drops; 0.5 is the published rule.",
)
@thresholds(
    "--protect",
    metavar="SHARE",
    default="2%",
    show_default=True,
    help="Share of a prompt's tokens that keep all their experts under policy odp.",
)
@thresholds(
    "--layers",
    metavar="auto|all|0,1,...",
    help="Layers that may drop experts; auto: those that tolerate it.  [default: all, with --quantile auto]",
)
@thresholds(
    "--calibration", type=o.PATH, help="A calibration of this model.  [default: what MODEL carries of one]"
)
@o.quiet_option
@o.json_option
def set_(model: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Compute the thresholds of MODEL anew.

    They are written into MODEL; every tensor stays as it is, byte for byte. MODEL is replaced at the end, by
    a rename: an interrupted run leaves it as it was. In a split GGUF the first shard carries the metadata.
    """
    from mc_gguf.container import update_routing

    _show(output or model, update_routing(model, output, **options), as_json)


@command.command(cls=Command)
def policies() -> None:
    """List the policies and options that --routing takes."""
    from mc_gguf.routing import describe_policies

    click.echo("\n".join(describe_policies()))


def _show(path: Path, metadata: RoutingMetadata, as_json: bool) -> None:
    from mc_gguf.routing.report import describe_routing, layer_table, summary

    description = describe_routing(metadata)
    lines = [f"{path}: {summary(description)}", "", *layer_table(description)]
    result.show({"path": str(path), **description}, "\n".join(lines), as_json)
