"""The report of an evaluation: one HTML file that needs nothing else, readable in light and dark mode."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from mc_gguf import __version__
from mc_gguf.common.files import atomic_write
from mc_gguf.common.units import format_size
from mc_gguf.evaluate.result import Result, columns
from mc_gguf.evaluate.tasks.runner import TaskResult, value_text
from mc_gguf.runtime import upstream

WIDTH, HEIGHT = 640, 320  # of a plot
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 44

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2329; --soft: #5d6873; --line: #d8dde2; --page: #fff; --mark: #0b62b5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b0; --line: #39424b; --page: #14181c; --mark: #6cb2f5 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { color: var(--soft); font-weight: 600 } .left { text-align: left }
code { font-size: .85rem; overflow-wrap: anywhere } dt { color: var(--soft) } dd { margin: 0 0 .7rem }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: var(--soft) } svg .name { fill: var(--ink) } svg line { stroke: var(--line) }
svg circle { fill: var(--mark) } svg .error { stroke: var(--mark) }
"""

DEFINITIONS = """ <p>Definitions are those of llama.cpp's <code>llama-perplexity --kl-divergence</code>. A
text is cut into chunks of as many tokens as the context; the second half of each chunk is scored. ± is the
standard error of the mean. <b>Perplexity</b>: exp of the mean negative log-likelihood. <b>KLD</b>:
Kullback-Leibler divergence of the model's next-token distribution from the reference's, nats per token:
mean, median and 99 % quantile over the scored tokens. <b>Same top-1</b>: share of tokens for which both
find the same token most probable. <b>Δp</b>: change of the probability of the correct token: mean, 99 %
quantile and root mean square. <b>Dropped</b>: share of expert activations that dynamic routing skipped,
over all tokens that were computed.</p>
"""


@dataclass(frozen=True)
class Report:
    """What a report shows. `hashes` maps the names of models, reference and texts to their SHA-256."""

    results: tuple[Result, ...]
    tasks: tuple[TaskResult, ...]
    command: str
    hashes: dict[str, str]
    reference: Path | None


def write_report(path: Path, report: Report) -> None:
    with atomic_write(path) as file:
        file.write(render(report).encode("utf-8", "backslashreplace"))  # names of files need not be UTF-8


def render(report: Report) -> str:
    """The whole page."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>mc-gguf eval</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Evaluation</h1>"
    ]
    if report.results:
        parts.append(results_html(report.results))
        parts += [plot(text, found) for text, found in _comparisons(report.results)]
    if report.tasks:
        parts.append(tasks_html(report.tasks))
    parts.append(_method(report))
    return "\n".join(parts) + "\n</body>\n</html>\n"


def results_html(results: Sequence[Result]) -> str:
    chosen = columns(results)
    left = [is_left for _, is_left, _ in chosen]
    rows = [[cell(r) for _, _, cell in chosen] for r in results]
    return _table([heading for heading, _, _ in chosen], rows, left)


def tasks_html(tasks: Sequence[TaskResult]) -> str:
    headings = ["model", "size", "task", "metric", "value", "examples", "documents"]
    rows = [
        [
            t.model,
            format_size(t.file_bytes),
            t.task,
            t.metric,
            value_text(t),
            str(t.n_fewshot),
            f"{t.documents:,}",
        ]
        for t in tasks
    ]
    left = [True, False, True, True, False, False, False]
    return "<h2>Tasks (lm-evaluation-harness)</h2>\n" + _table(headings, rows, left)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[bool]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marked = zip(cells, left, strict=True)
        return "".join(
            f"<{tag}{' class=left' if is_left else ''}>{escape(cell)}</{tag}>" for cell, is_left in marked
        )

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    head = f"<thead><tr>{row(headings, 'th')}</tr></thead>"
    return f'<div class="wide"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _comparisons(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """The results by text, if there is something to draw: a divergence above 0."""
    compared = [r for r in results if r.mean_kld is not None and r.mean_kld > 0]
    return [(t, [r for r in compared if r.text == t]) for t in dict.fromkeys(r.text for r in compared)]


@dataclass(frozen=True)
class Axes:
    """Where values lie in a plot: file sizes in MiB are linear, divergences logarithmic."""

    sizes: tuple[float, float]
    powers: tuple[int, int]  # of ten

    def x(self, size: float) -> float:
        low, high = self.sizes
        return LEFT + (size - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, kld: float) -> float:
        low, high = self.powers
        share = (math.log10(max(kld, 10.0**low)) - low) / (high - low)
        return HEIGHT - BOTTOM - min(1.0, share) * (HEIGHT - TOP - BOTTOM)


def plot(text: str, results: Sequence[Result]) -> str:
    """Mean KL divergence (logarithmic) with its standard error against file size, as inline SVG."""
    points = [(Path(r.model), r.file_bytes / 2**20, r.mean_kld or 0.0, r.mean_kld_se or 0.0) for r in results]
    marks = ticks(min(size for _, size, _, _ in points), max(size for _, size, _, _ in points))
    low = math.floor(math.log10(min(kld for _, _, kld, _ in points)))
    high = max(low + 1, math.ceil(math.log10(max(kld for _, _, kld, _ in points))))
    axes = Axes((marks[0], marks[-1]), (low, high))
    parts = [
        f"<h2>KL divergence and file size, {escape(text)}</h2>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="KL divergence against file size">',
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "file size, MiB", "middle"),
        _text(LEFT, TOP - 8, "mean KLD, nats per token", "start"),
    ]
    for height, label in ((axes.y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)):
        parts += [_line(LEFT, height, WIDTH - RIGHT, height), _text(LEFT - 8, height + 4, label, "end")]
    parts += [_text(axes.x(mark), HEIGHT - BOTTOM + 18, f"{mark:g}", "middle") for mark in marks]
    for point in points:
        parts += _point(axes, *point)
    return "\n".join(parts) + "\n</svg>"


def _point(axes: Axes, model: Path, size: float, kld: float, error: float) -> list[str]:
    """A dot with its error bar, its name, and its numbers for the mouse pointer."""
    x, y = axes.x(size), axes.y(kld)
    title = escape(f"{model}: {kld:.5f} ± {error:.5f}, {size:.1f} MiB")
    anchor, shift = ("end", -8) if x > WIDTH * 0.7 else ("start", 8)
    return [
        _line(x, axes.y(kld - error), x, axes.y(kld + error), "error"),
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>',
        _text(x + shift, y - 6, model.stem, anchor, "name"),
    ]


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers that span low..high."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step *= next(f for f in (0.2, 0.5, 1.0, 2.0) if span / (step * f) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<line{chosen} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text{chosen} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _method(report: Report) -> str:
    """What was measured and how."""
    pin = upstream.pin()
    contexts = sorted({r.ctx for r in report.results})
    facts = {"Command": f"<code>{escape(report.command)}</code>"}
    if report.results:
        facts["Context"] = ", ".join(f"{ctx:,} tokens" for ctx in contexts)
    if report.reference:
        facts["Reference"] = f"<code>{escape(str(report.reference))}</code>, all experts of every token"
    routings = sorted({r.routing for r in report.results} | {t.routing for t in report.tasks})
    facts["Routing"] = f"<code>{escape(', '.join(routings))}</code>"
    facts["Versions"] = (
        f"mc_gguf {__version__}, llama.cpp {pin.commit[:12]}, patch set {upstream.patchset_digest()[:12]}, "
        f"Python {platform.python_version()}, {escape(platform.machine())}"
    )
    facts["Date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    listed = "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    hashes = _table(["file", "SHA-256"], list(report.hashes.items()), [True, True])
    return f"<h2>How it was measured</h2>\n{DEFINITIONS}<dl>\n{listed}\n</dl>\n{hashes}"
