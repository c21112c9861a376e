"""`mc-gguf convert`: calibrate, plan, refine and quantize in one."""

from __future__ import annotations

from pathlib import Path

import click

from mc_gguf.cli.calibrate_options import CalibrateOptions, calibrate_options
from mc_gguf.cli.options import PlanOptions, plan_options


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The GGUF to write.")
@plan_options
@calibrate_options
@click.option(
    "--calibration",
    "calibration_file",
    type=click.Path(path_type=Path),
    help="Use this calibration file.  [default: the one beside the output if it fits, else a new one]",
)
@click.option(
    "--calibration-seed", type=int, default=0, show_default=True, help="For what calibration draws by lot."
)
@click.option(
    "--compensate/--no-compensate",
    default=True,
    show_default=True,
    help="Round experts with error compensation, on the calibration's text: slower, much closer to 16 bits.",
)
@click.option(
    "--refine",
    "refine_time",
    metavar="T",
    help="Search so long (90s, 10m, 2h) for a better plan of the same size, by the KL divergence of the "
    "model's output; see refine.  [default: no search]",
)
@click.option("--dry-run", is_flag=True, help="Calibrate and plan, print the summary, write no model.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Continue a run that was killed.")
@click.option("--quiet", is_flag=True, help="No progress lines.")
def command(
    source: Path,
    output: Path,
    options: PlanOptions,
    calibration: CalibrateOptions,
    calibration_file: Path | None,
    calibration_seed: int,
    compensate: bool,
    refine_time: str | None,
    dry_run: bool,
    resume: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE (HF directory or 16-bit GGUF) into a mixed-expert GGUF within a budget.

    Give exactly one of --bpw, --size and --bits-per-layer. The calibration and the plan stay beside the
    output; a killed run is continued by the same command and gives the same bytes (with --refine: once the
    search is over, which depends on how far it came in its time; its plan, .refined.plan.json, is kept too).
    """
    from mc_gguf.artifacts import Calibration
    from mc_gguf.common.errors import McError
    from mc_gguf.common.units import format_size, parse_duration
    from mc_gguf.common.workdir import forget_work
    from mc_gguf.pipeline import Conversion, refinement_text
    from mc_gguf.plan.summary import summarize
    from mc_gguf.source import open_checkpoint, refuse_to_overwrite

    inputs = [*calibration.text, *([calibration_file] if calibration_file else [])]
    refuse_to_overwrite(output, source, *inputs)
    seconds = parse_duration(refine_time) if refine_time else 0.0
    if seconds and options.budget.is_sixteen_bit:
        raise McError("--refine: 16-bit experts leave nothing to refine; give a smaller --bpw")
    search = calibration.refinement(seconds, compensate, calibration_seed) if seconds else None
    work = Conversion(open_checkpoint(source), output, resume, quiet)
    if options.budget.is_sixteen_bit:
        statistics = Calibration.blank(work.checkpoint.info)
    else:
        options.check(work.checkpoint.info)  # before the long step
        request = calibration.request(work.checkpoint, options.types, calibration_seed)
        statistics = work.calibrate(*request, calibration_file)
    plan = work.plan(statistics, options.plan)
    if search:
        plan = work.refine(statistics, plan, search)
        click.echo(refinement_text(plan))
    click.echo("\n".join(summarize(plan).lines()))
    if not dry_run:
        model = work.quantize(
            statistics, plan, calibration.threads, compensate, calibration.text, keep_bank=search is not None
        )
        click.echo(
            f"{output}: {format_size(model.header.file_bytes)}, {model.expert_bpw:.4f} bits per expert weight"
        )
    elif search:
        forget_work(output)
