"""Tables and plot of tools/experiments/quality_experiment.py: KL divergences of equal bytes side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def tables(records: Sequence[Record]) -> str:
    """Markdown, a table a text: mean KL divergence in units of 0.001 nats a token, mean and range of the
    seeds; file sizes below.
    """
    lines = []
    for text in dict.fromkeys(r["text"] for r in records):
        for recipes in (False, True):
            mine = [r for r in records if r["text"] == text and r["size"].startswith("recipe ") == recipes]
            if mine:
                lines += [f"**{text}, at the bytes of {'llama-quantize' if recipes else 'one type'}**", ""]
                lines += [*_table(mine), ""]
    lines += [
        "**File bytes, lowest and highest of all arms relative to the first one's**",
        "",
        *_bytes(records),
        "",
    ]
    return "\n".join(lines)


def _table(records: Sequence[Record]) -> list[str]:
    sizes = list(dict.fromkeys(r["size"] for r in records))
    lines = [
        "| | " + " | ".join(s.removeprefix("recipe ") for s in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for arm in dict.fromkeys(r["arm"] for r in records):
        cells = [_cell([r["mean_kld"] for r in records if (r["arm"], r["size"]) == (arm, s)]) for s in sizes]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Sequence[float]) -> str:
    """Mean, and the range where there are several."""
    if not values:
        return ""
    scaled = [1000 * v for v in values]
    spread = f" ({min(scaled):.1f}-{max(scaled):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(scaled):.1f}{spread}"


def _bytes(records: Sequence[Record]) -> list[str]:
    lines = ["| size | bytes | lowest | highest |", "|---|---|---|---|"]
    for size in dict.fromkeys(r["size"] for r in records):
        mine = [r["file_bytes"] for r in records if r["size"] == size]
        lines.append(
            f"| {size} | {mine[0]:,} | {min(mine) / mine[0] - 1:+.3%} | {max(mine) / mine[0] - 1:+.3%} |"
        )
    return lines


def plot(records: Sequence[Record], path: Path) -> None:
    """Mean KL divergence (mean of the seeds) against file size, one panel a text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "mc_gguf", "font.size": 8})
    from matplotlib import pyplot

    shown = (
        "llama-quantize",
        "uniform",
        "uniform + compensation",
        "layer",
        "layer + compensation",
        "mc",
        "pmq",
        "pmq + compensation",
        "pmq-attention + compensation",
    )
    texts = list(dict.fromkeys(r["text"] for r in records))
    figure, axes = pyplot.subplots(1, len(texts), figsize=(4 * len(texts), 3.6), sharey=True)
    for axis, text in zip(np.atleast_1d(axes), texts, strict=True):
        for arm in shown:
            points: dict[int, list[float]] = {}
            for r in records:
                if (r["text"], r["arm"]) == (text, arm) and (arm == "llama-quantize" or r["seed"] == 0):
                    points.setdefault(r["file_bytes"], []).append(r["mean_kld"])
            x = sorted(points)
            style = "o:" if arm == "llama-quantize" else "o-" if arm.startswith("pmq") else "-"
            axis.plot(
                [b / 1e6 for b in x], [statistics.fmean(points[b]) for b in x], style, ms=3, lw=1, label=arm
            )
        axis.set_yscale("log")
        axis.set_title(text)
        axis.set_xlabel("file, MB")
    np.atleast_1d(axes)[0].set_ylabel("mean KL divergence from 16 bit, nats a token")
    np.atleast_1d(axes)[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
