"""`mc-gguf calibrate`: measure every expert on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command
from mc_gguf.cli.result import show


@click.command(cls=Command)
@click.argument("source", type=o.PATH)
@o.output_option("The calibration file to write.")
@o.calibration_options
@o.calibration("--types", metavar="T,T,...", help="ggml types to measure.  [default: all candidates]")
@o.threads_option
@o.gpu_options
@o.resume_option
@o.quiet_option
@o.json_option
@o.seed_option
def command(source: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Measure the experts of SOURCE on text.

    SOURCE is a Hugging Face directory or a GGUF. The file says how often each expert is used, how
    important it is, and what error every type causes; plan and quantize read it. The same command continues a
    killed run.
    """
    from mc_gguf.calibrate import calibrate
    from mc_gguf.calibrate.summary import summarize_calibration

    summary = summarize_calibration(calibrate(source, output, **options))
    show({"output": str(output), **summary.to_json()}, f"{output}: {summary.text()}", as_json)
