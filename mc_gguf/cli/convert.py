"""`mc-gguf convert`: calibrate, plan, refine and quantize in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command
from mc_gguf.cli.result import file_facts, file_line, results


@click.command(cls=Command)
@click.argument("source", type=o.PATH)
@o.output_option("The GGUF to write.", option=o.budget)
@o.budget_options
@o.budget(
    "--refine",
    metavar="TIME",
    help="Search this long (90s, 10m, 2h) for a better plan of the same size, by the KL divergence of the "
    "model's output; see refine.  [default: no search]",
)
@o.budget("--dry-run", is_flag=True, help="Calibrate and plan, print the summary, write no model.")
@o.calibration_options
@o.calibration(
    "--calibration",
    type=o.PATH,
    help="Use this calibration file.  [default: the one beside the output if it fits, else a new one]",
)
@o.tensor_options
@o.threads_option
@o.gpu_options
@o.compensate_option
@o.resume_option
@o.quiet_option
@o.json_option
@o.research_options
def command(source: Path, output: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Make a mixed-expert GGUF from SOURCE within a budget.

    SOURCE is a Hugging Face directory or a GGUF. Give --size or --bpw; without either, sizes for
    this machine's memory are proposed. The calibration and the plan stay beside the output. The same
    command continues a killed run and gives the same bytes. (With --refine the result depends on how far
    the search got in its time; the plan that it found is kept, too.)
    """
    from mc_gguf.conversion import Conversion, ConversionRequest
    from mc_gguf.plan.summary import summarize_plan

    work = Conversion(source, output, ConversionRequest(**options))
    with results(as_json) as found, work.reserved():
        plan = work.plan()
        summary = summarize_plan(plan)
        found.add({"plan": summary.to_json()}, "\n".join(summary.lines()))
        if dry_run:
            work.discard(plan)
        else:
            model = work.write(plan)
            found.add(file_facts(output, model), file_line(output, model))
