"""What `make demo` runs: convert the bundled Mixtral, compare the files, and let the mixed one speak.

    python -m tools.demo [--bpw 2.0625] [--tokens 20480] [-- CONVERT_OPTIONS]

It makes three files: one in 16 bits, one with the same type for all experts, and a mixed one of that size. It
prints their sizes and perplexities, and a few words from the mixed file. CONVERT_OPTIONS go to the command
that makes the mixed file, which also calibrates.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import click

from tools.common import ROOT, WIKITEXT, mc_gguf


def run(*arguments: object) -> None:
    """Show and run one mc-gguf command, as a user would type it in the repository."""
    click.secho(f"\n$ mc-gguf {shlex.join(map(str, arguments))}", bold=True)
    sys.stdout.flush()
    done = subprocess.run(mc_gguf(*arguments), cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def compare(files: dict[str, Path], n_scored: int) -> None:
    """Print a table of sizes, bits per expert weight, and perplexities."""
    from mc_gguf.container import MixedGguf
    from mc_gguf.evaluate.evaluation import perplexity

    click.secho(f"\nWikiText-2 test, first {n_scored:,} scored tokens, context 512", bold=True)
    click.echo(f"{'file':<16}{'bytes':>12}{'bits/expert weight':>20}{'perplexity':>20}")
    for name, path in files.items():
        found = perplexity(path, WIKITEXT.read_text(encoding="utf-8"), n_ctx=512, n_scored=n_scored)
        bpw = MixedGguf.open(path).expert_bpw
        value = f"{found.value:.2f} +- {found.standard_error:.2f}"
        click.echo(f"{name:<16}{path.stat().st_size:>12,}{bpw:>20.4f}{value:>20}")


@click.command(help=__doc__)
@click.option(
    "--bpw", default=2.0625, show_default=True, help="Bits per expert weight; 2.0625 is IQ2_XXS everywhere."
)
@click.option("--tokens", default=20480, show_default=True, help="Tokens to score.")
@click.option("--model", type=click.Path(path_type=Path), default="models/tiny-mixtral", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default="demo", show_default=True)
@click.argument("convert_options", nargs=-1, type=click.UNPROCESSED)
def main(bpw: float, tokens: int, model: Path, folder: Path, convert_options: tuple[str, ...]) -> None:
    files = {name: folder / f"{name}.gguf" for name in ("16bit", "uniform", "mixed")}
    calibration = folder / "mixed.calib.safetensors"
    uniform = ("--strategy", "uniform", "--calibration", calibration, "--no-compensate")  # as stock tools do
    run("convert", model, "-o", files["16bit"], "--bpw", 16)
    run("convert", model, "-o", files["mixed"], "--bpw", bpw, *convert_options)
    run("convert", model, "-o", files["uniform"], "--bpw", bpw, *uniform)
    run("inspect", files["mixed"])
    compare({name: ROOT / path for name, path in files.items()}, tokens)
    sampling = ("-n", 60, "--temp", 0.7, "--seed", 4)
    run("chat", files["mixed"], "-p", "The king looked at the sea and said", *sampling)


if __name__ == "__main__":
    main()
