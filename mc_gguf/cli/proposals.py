"""The sizes that `convert` proposes when it is given no budget, with the command lines to copy."""

from __future__ import annotations

import shlex

import click

from mc_gguf.common.errors import NoBudgetError
from mc_gguf.common.units import format_size, format_size_up


def proposal_lines(error: NoBudgetError, ctx: click.Context) -> list[str]:
    """A table of the proposals, and the command of each."""
    memory = format_size(error.memory_bytes)
    rows = [
        (format_size_up(p.size_bytes), f"{p.bpw:.2f}", "yes" if p.fits else "no") for p in error.proposals
    ]
    paths = (str(ctx.params["source"]), "-o", str(ctx.params["output"]))
    command = shlex.join([*ctx.command_path.split(), *paths])
    return [
        f"Sizes to choose from; this machine has {memory} of memory. The bits hold with attention in its",
        "default types; --size chooses smaller ones where that pays, and gives the rest to the experts:",
        "",
        f"{'size':>12}  {'bits per expert weight':>22}  {'fits into memory':>16}",
        *(f"{size:>12}  {bpw:>22}  {fits:>16}" for size, bpw, fits in rows),
        "",
        *(f"{command} --size {size}" for size, _, _ in rows),
    ]
