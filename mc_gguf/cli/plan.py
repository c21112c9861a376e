"""`mc-gguf plan`: from a calibration and a budget to the type of every expert."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mc_gguf.cli.options import PlanOptions, plan_options


@click.command()
@click.argument("calibration", metavar="CALIB", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The plan to write (JSON).")
@plan_options
@click.option("--dry-run", is_flag=True, help="Print the summary and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def command(
    calibration: Path, output: Path | None, options: PlanOptions, dry_run: bool, as_json: bool
) -> None:
    """Decide the type of every expert under a budget and write it to a plan.

    CALIB is a file made by calibrate, or published statistics (JSON; with --bits-per-layer only). Give
    exactly one of --bpw, --size and --bits-per-layer. A summary is printed before the plan is written.
    """
    from mc_gguf.artifacts import Calibration
    from mc_gguf.plan.summary import summarize

    if output is None and not dry_run:
        raise click.UsageError("say where to write the plan with -o, or give --dry-run")
    plan = options.plan(Calibration.load(calibration))
    summary = summarize(plan)
    click.echo(json.dumps(summary.to_json(), indent=1) if as_json else "\n".join(summary.lines()))
    if output is not None and not dry_run:
        plan.save(output)
        click.echo(f"wrote {output}", err=True)
