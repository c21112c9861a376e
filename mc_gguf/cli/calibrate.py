"""`mc-gguf calibrate`: measure every expert on text."""

from __future__ import annotations

from pathlib import Path

import click

from mc_gguf.cli.calibrate_options import CalibrateOptions, calibrate_options


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The calibration file to write."
)
@calibrate_options
@click.option("--types", metavar="T,T,...", help="Types to measure.  [default: all candidates]")
@click.option("--seed", type=int, default=0, show_default=True, help="For what is drawn by lot.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Continue a run that was killed.")
@click.option("--quiet", is_flag=True, help="No progress line.")
def command(
    source: Path,
    output: Path,
    calibration: CalibrateOptions,
    types: str | None,
    seed: int,
    resume: bool,
    quiet: bool,
) -> None:
    """Measure the experts of SOURCE (HF directory or 16-bit GGUF): use, importance, error under every type.

    A killed run is continued by the same command. The file is what plan and quantize read.
    """
    from mc_gguf.calibrate.super_experts import super_experts
    from mc_gguf.source import open_checkpoint, refuse_to_overwrite

    refuse_to_overwrite(output, source, *calibration.text)
    names = tuple(t.strip() for t in types.split(",") if t.strip()) if types is not None else None
    result = calibration.calibrate(open_checkpoint(source), output, names, seed, resume, quiet)
    found = super_experts(result)
    n_tokens, n_layer = result.corpus["tokens"], len(result.layers)
    click.echo(
        f"{output}: {n_layer} layers, {result.n_expert} experts, {len(result.types)} types, {n_tokens} tokens"
    )
    click.echo("super experts: " + ("; ".join(map(str, found)) or "none"))
