"""`mc-gguf quantize`: carry a plan out on a source model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command
from mc_gguf.cli.result import file_facts, file_line, show


@click.command(cls=Command)
@click.argument("source", type=o.PATH)
@click.argument("plan", type=o.PATH)
@o.output_option("The GGUF to write.")
@o.plan_calibration_option
@o.calibration_text_option
@o.threads_option
@o.compensate_option
@o.bank_option
@o.resume_option
@o.quiet_option
@o.json_option
def command(source: Path, plan: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Quantize SOURCE by PLAN into one GGUF.

    SOURCE is a Hugging Face directory or a 16-bit GGUF. The same command continues a killed run and gives
    the same bytes.
    """
    from mc_gguf.quantize import quantize

    model = quantize(source, plan, output, **options)
    show(file_facts(output, model), file_line(output, model), as_json)
