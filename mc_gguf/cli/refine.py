"""`mc-gguf refine`: improve a plan by the real KL divergence."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The plan to write.")
@click.option(
    "--time",
    "limit",
    default="10m",
    show_default=True,
    metavar="T",
    help="How long to search, setting up included: 90s, 10m, 2h.",
)
@click.option(
    "--calibration",
    "calibration_file",
    type=click.Path(path_type=Path),
    help="The plan's calibration file.  [default: found beside the plan]",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Text to measure on, UTF-8; may be repeated.  [default: the bundled mixture]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=32768,
    show_default=True,
    help="Tokens of it; a quarter is held out for the final check.",
)
@click.option(
    "--ctx",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens a row; at most the model's context.",
)
@click.option(
    "--seed",
    type=int,
    default=1,
    show_default=True,
    help="For what is drawn by lot; take another than the calibration's.",
)
@click.option(
    "--compensate/--no-compensate",
    default=True,
    show_default=True,
    help="Measure experts as quantize rounds them with error compensation (the types near the plan's; made "
    "first), or as ggml's quantizers make them (all types).",
)
@click.option(
    "--calibration-text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="The text that the calibration was made from; may be repeated.  [default: the bundled mixture]",
)
@click.option(
    "--bank",
    type=click.Path(path_type=Path),
    help="Keep and reuse quantized experts in this folder; quantize --bank takes the compensated ones.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
@click.option("--memory", metavar="SIZE", help="For dequantized experts.  [default: 4 GiB]")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Continue a run that was killed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress line.")
def command(
    source: Path,
    plan: Path,
    output: Path,
    limit: str,
    calibration_file: Path | None,
    text: tuple[Path, ...],
    tokens: int,
    ctx: int,
    seed: int,
    compensate: bool,
    calibration_text: tuple[Path, ...],
    bank: Path | None,
    threads: int | None,
    memory: str | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Improve PLAN for SOURCE by the KL divergence of the model's output, within the plan's own budget.

    Stops at the time limit, or at Ctrl-C, and writes the best plan found. A killed run is continued by the
    same command.
    """
    from mc_gguf.artifacts import Plan
    from mc_gguf.artifacts.matching import find_calibration
    from mc_gguf.common.units import parse_duration, parse_size
    from mc_gguf.refine.options import RefinementOptions
    from mc_gguf.refine.refinement import refine_to_file
    from mc_gguf.source import open_checkpoint, refuse_to_overwrite

    inputs = [plan, *text, *calibration_text, *([calibration_file] if calibration_file else [])]
    refuse_to_overwrite(output, source, *inputs)
    start = Plan.load(plan)
    options = RefinementOptions(
        seconds=parse_duration(limit),
        text=text,
        tokens=tokens,
        ctx=ctx,
        seed=seed,
        threads=threads or 0,
        memory_bytes=parse_size(memory) if memory else None,
        bank=bank,
        compensate=compensate,
        calibration_text=calibration_text,
    )
    statistics = find_calibration(start, plan.parent, calibration_file)
    result = refine_to_file(open_checkpoint(source), statistics, start, output, options, resume, quiet)
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else "\n".join(result.lines()))
