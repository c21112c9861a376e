"""What several scripts share: places in the repository, the bundled tokenizer, the mc-gguf command, plots."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mc_gguf.common.errors import McError

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-mixtral"  # the bundled model
WIKITEXT = ROOT / "tests" / "data" / "wikitext-2.test.txt"
CALIBRATION_TEXT = ROOT / "mc_gguf" / "source" / "data" / "calibration-mix.txt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")

# Relative squared error of each type on unit Gaussian rows with a flat importance matrix, measured.
RELATIVE_ERROR = {
    "IQ1_S": 0.251,
    "IQ1_M": 0.222,
    "IQ2_XXS": 0.123,
    "IQ2_XS": 0.096,
    "IQ2_S": 0.065,
    "Q2_K": 0.074,
    "IQ3_XXS": 0.036,
    "IQ3_S": 0.020,
    "Q3_K": 0.021,
    "IQ4_XS": 0.0058,
    "IQ4_NL": 0.0056,
    "Q4_K": 0.0051,
    "Q5_0": 0.0016,
    "Q5_K": 0.0014,
    "Q6_K": 0.0003,
    "Q8_0": 0.00003,
}


def run_tool(main: click.Command, name: str) -> None:
    """Run a script's command; an error ends it with one line and an exit code."""
    try:
        main(standalone_mode=False)
    except McError as error:
        sys.exit(f"{name}: {error}")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


def copy_tokenizer(folder: Path) -> None:
    """Copy the bundled model's tokenizer into a Hugging Face directory."""
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL / name, folder / name)


def mc_gguf(*arguments: object) -> list[str]:
    """The command line that runs `mc-gguf ARGUMENTS` with this Python."""
    return [sys.executable, "-m", "mc_gguf", *map(str, arguments)]


def panels(n_panel: int) -> tuple[Any, Sequence[Any]]:
    """A matplotlib figure and its panels side by side, with one y axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "mc_gguf", "font.size": 8})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, n_panel, figsize=(4 * n_panel, 3.6), sharey=True, squeeze=False)
    return figure, axes[0]


def save_svg(figure: Any, path: Path) -> None:
    """Write the figure, the same bytes for the same data; the legend is the last panel's."""
    figure.axes[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
