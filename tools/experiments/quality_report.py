"""The tables and the plot of tools/experiments/quality_experiment.py: KL divergences at equal file bytes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.common import panels, save_svg

Record = dict[str, Any]


def tables(records: Sequence[Record]) -> str:
    """Markdown with a table per text: the mean KL divergence in 0.001 nats per token, as mean and range over
    the seeds; file sizes are below.
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
    """The mean, and the range where there are several values."""
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
    """Plot the mean KL divergence, as mean over the seeds, against the file size, with a panel per text."""
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
    figure, axes = panels(len(texts))
    for axis, text in zip(axes, texts, strict=True):
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
    axes[0].set_ylabel("mean KL divergence from 16 bits, nats per token")
    save_svg(figure, path)
