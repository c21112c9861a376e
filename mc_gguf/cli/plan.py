"""`mc-gguf plan`: from a calibration and a budget to the type of every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command
from mc_gguf.cli.result import show


@click.command(cls=Command)
@click.argument("calibration", metavar="CALIB", type=o.PATH)
@o.output_option("The plan to write (JSON).", required=False, option=o.budget)
@o.budget_options
@o.budget("--dry-run", is_flag=True, help="Print the summary and write nothing.")
@o.tensor_options
@o.json_option
@o.research_options
def command(calibration: Path, output: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Decide the type of every expert under a budget.

    CALIB is a file made by calibrate, or published statistics (JSON; with --bits-per-layer only). Give
    exactly one of --size, --bpw and --bits-per-layer.
    """
    from mc_gguf.pipeline import make_plan
    from mc_gguf.plan.summary import summarize_plan

    if output is None and not dry_run:
        raise click.UsageError("say where to write the plan with -o, or give --dry-run")
    target = None if dry_run else output
    summary = summarize_plan(make_plan(calibration, target, **options))
    show(summary.to_json(), "\n".join(summary.lines()), as_json)
    if target:
        click.echo(f"wrote {output}", err=True)
