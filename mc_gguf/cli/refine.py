"""`mc-gguf refine`: improve a plan by the real KL divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command
from mc_gguf.cli.result import show


@click.command(cls=Command)
@click.argument("source", type=o.PATH)
@click.argument("plan", type=o.PATH)
@o.output_option("The plan to write.")
@o.output(
    "--time",
    default="10m",
    show_default=True,
    metavar="TIME",
    help="How long to search, preparations included: 90s, 10m, 2h.",
)
@o.text_options("Text to measure on", 32_768, "Tokens to use; a quarter is held out for the final check.")
@o.plan_calibration_option
@o.calibration_text_option
@o.threads_option
@o.compensate_option
@o.bank_option
@o.speed("--memory", metavar="SIZE", help="Memory for dequantized experts.  [default: 4GiB]")
@o.resume_option
@o.quiet_option
@o.json_option
@o.seed_option
def command(source: Path, plan: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Improve PLAN by the KL divergence that it causes in SOURCE.

    SOURCE is a Hugging Face directory or a 16-bit GGUF. The budget stays the plan's own. The search stops
    when its time is over, or at Ctrl-C, and writes the best plan found. With compensation it tries the
    types near the plan's, without it all types. The same command continues a killed search.
    """
    from mc_gguf.refine import refine

    found = refine(source, plan, output, **options)
    show(found.to_json(), "\n".join(found.lines()), as_json)
