"""`mc-gguf quantize`: carry a plan out on a source model."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The GGUF to write.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Calibration file with the importance matrices.  [default: the plan's, found beside the plan]",
)
@click.option(
    "--compensate/--no-compensate",
    default=True,
    show_default=True,
    help="Round experts with error compensation, on the calibration's text: slower, much closer to 16 bits.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="The text that the calibration was made from; may be repeated.  [default: the bundled mixture]",
)
@click.option(
    "--bank",
    type=click.Path(path_type=Path),
    help="Take compensated experts from this folder (see refine --bank), and keep them there.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Continue a run that was killed.")
def command(
    source: Path,
    plan: Path,
    output: Path,
    calibration: Path | None,
    compensate: bool,
    text: tuple[Path, ...],
    bank: Path | None,
    threads: int | None,
    resume: bool,
) -> None:
    """Quantize SOURCE (HF directory or 16-bit GGUF) by PLAN into one GGUF.

    A killed run is continued by the same command and gives the same bytes.
    """
    from mc_gguf.artifacts import Plan
    from mc_gguf.artifacts.matching import find_calibration
    from mc_gguf.common.units import format_size
    from mc_gguf.pipeline import Conversion
    from mc_gguf.source import open_checkpoint, refuse_to_overwrite

    refuse_to_overwrite(output, source, plan, *text, *([calibration] if calibration else []))
    the_plan = Plan.load(plan)
    statistics = find_calibration(the_plan, plan.parent, calibration)
    work = Conversion(open_checkpoint(source), output, resume)
    model = work.quantize(statistics, the_plan, threads, compensate, text, bank)
    size = format_size(model.header.file_bytes)
    click.echo(f"{output}: {size}, {model.expert_bpw:.4f} bits per expert weight")
