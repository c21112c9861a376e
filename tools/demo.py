"""What `make demo` runs: the bundled Mixtral in 16 bits, with one type for all experts, and mixed at the
same size; sizes, perplexities, and a few words from the mixed file.

    python -m tools.demo [--bpw 2.0625] [--tokens 20480]
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
MODEL = "models/tiny-mixtral"
TEXT = ROOT / "tests" / "data" / "wikitext-2.test.txt"
MC_GGUF = Path(sys.executable).with_name("mc-gguf")


def run(*arguments: str) -> None:
    """Shows and runs one mc-gguf command, as a user would type it in the repository."""
    click.secho(f"\n$ mc-gguf {shlex.join(arguments)}", bold=True)
    sys.stdout.flush()
    done = subprocess.run([MC_GGUF, *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def compare(files: dict[str, Path], n_scored: int) -> None:
    """A table of size, bits per expert weight and perplexity."""
    from mc_gguf.container import MixedGguf
    from mc_gguf.evaluate.evaluation import perplexity

    click.secho(f"\nWikiText-2 test, first {n_scored:,} scored tokens, context 512", bold=True)
    click.echo(f"{'file':<16}{'bytes':>12}{'bits/expert weight':>20}{'perplexity':>20}")
    for name, path in files.items():
        found = perplexity(path, TEXT.read_text(encoding="utf-8"), n_ctx=512, n_scored=n_scored)
        bpw = MixedGguf.open(path).expert_bpw
        value = f"{found.value:.2f} +- {found.standard_error:.2f}"
        click.echo(f"{name:<16}{path.stat().st_size:>12,}{bpw:>20.4f}{value:>20}")


@click.command(help=__doc__)
@click.option(
    "--bpw", default=2.0625, show_default=True, help="Bits per expert weight; 2.0625 is IQ2_XXS everywhere."
)
@click.option("--tokens", default=20480, show_default=True, help="Tokens to score.")
def main(bpw: float, tokens: int) -> None:
    calibration = "demo/mixed.calib.safetensors"
    run("convert", MODEL, "-o", "demo/16bit.gguf", "--bpw", "16")
    run("convert", MODEL, "-o", "demo/mixed.gguf", "--bpw", str(bpw))
    uniform = ("--strategy", "uniform", "--calibration", calibration, "--no-compensate")  # as stock tools do
    run("convert", MODEL, "-o", "demo/uniform.gguf", "--bpw", str(bpw), *uniform)
    run("inspect", "demo/mixed.gguf")
    names = {"16 bit": "16bit", "uniform": "uniform", "mixed": "mixed"}
    compare({name: ROOT / "demo" / f"{stem}.gguf" for name, stem in names.items()}, tokens)
    sampling = ("-n", "60", "--temp", "0.7", "--seed", "4")
    run("chat", "demo/mixed.gguf", "-p", "The king looked at the sea and said", *sampling)


if __name__ == "__main__":
    main()
