"""Measure what dropping experts costs in quality, for every policy and importance measure.

    python -m tools.experiments.odp_experiment /tmp/odp [--tokens 4096] [--ctx 512] [-- CONVERT_OPTIONS]

The script converts the bundled model to 16 bits and to about 2 bits per expert weight, calibrated on the
bundled text or as CONVERT_OPTIONS say. On WikiText-2 test and on C++ (src/llama-vocab.cpp of the pinned
llama.cpp, which is not in the calibration text) it then measures perplexity and the mean KL divergence from
the same file with routing off, against the share of expert activations that the runtime's counters say were
dropped. Every token is scored, so what is counted is what is scored. A window of --ctx tokens is one prompt,
within which importance is ranked.

It writes results.json, table.md (interpolated between the measured points at 5, 10, 15, 20 and 30 %) and
curves.svg (with matplotlib: pip install 'mc-gguf[plot]'). A measured point is not measured again: delete
results.json to start over.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from tools.common import MODEL, WIKITEXT, mc_gguf, panels, save_svg

SHARES = (0.05, 0.10, 0.15, 0.20, 0.30)
IMPORTANCES = ("attention", "l1", "mean", "variance", "kurtosis", "last")
PROTECT = 0.02


@dataclass(frozen=True)
class Point:
    """One measurement: the share of expert activations dropped, the perplexity, and the mean KL divergence
    from routing off in nats per token, with its standard error.
    """

    file: str
    text: str
    policy: str
    setting: str
    dropped: float
    perplexity: float
    kld: float
    kld_error: float


def settings() -> Iterator[tuple[str, str]]:
    """The name of the curve and the routing of every point. With two experts per token, a share s of all
    activations is dropped at the quantile 2 s of the second expert's ratios.
    """
    grid = [round(2 * s, 3) for s in (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.26, 0.33)]
    for q in grid:
        yield "threshold, one quantile", f"threshold:quantile={q},layers=all"
        yield "threshold, least damage", f"threshold:target_drop={q / 2}"
        for importance in IMPORTANCES:
            yield (
                f"odp, {importance}",
                f"odp:quantile={q},layers=all,protect={PROTECT},importance={importance}",
            )
        yield "odp, attention, least damage", f"odp:target_drop={q / 2},protect={PROTECT}"
        yield "random", f"random:rate={q},seed=1"
    for ratio in (0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65):
        yield "keep_min", f"keep_min:ratio={ratio}"
        yield "top_p", f"top_p:top_p={1 / (1 + ratio)}"  # for two experts the same decision


@dataclass
class Scores:
    """Log-probabilities at the n scored tokens of a text: all [n, n_vocab], and the right token's [n]."""

    log_probs: NDArray[np.float32]
    right: NDArray[np.float64]


def measure(llm: Any, windows: NDArray[np.int64]) -> Scores:
    """The scores of all tokens of each window but its first."""
    log_probs, right = [], []
    for window in windows:
        llm.reset()
        llm.eval(window.tolist())
        logits = llm.scores[: len(window) - 1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        log_probs.append(logits.astype(np.float32))
        right.append(np.take_along_axis(logits, window[1:, None], axis=1)[:, 0])
    return Scores(np.concatenate(log_probs), np.concatenate(right))


def divergence(base: Scores, other: Scores) -> tuple[float, float]:
    """Mean KL(base || other) in nats per token, and its standard error."""
    per_token = np.concatenate(
        [
            (np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q)).sum(axis=1)
            for p, q in zip(
                np.array_split(base.log_probs, 16), np.array_split(other.log_probs, 16), strict=True
            )
        ]
    )
    return float(per_token.mean()), float(per_token.std(ddof=1) / per_token.size**0.5)


def cut(llm: Any, text: str, n_tokens: int, ctx: int) -> NDArray[np.int64]:
    """The first n_tokens of a text as windows [n, ctx], each beginning with BOS."""
    found = np.asarray(llm.tokenize(text.encode(), add_bos=False, special=False))
    n = min(n_tokens, len(found)) // ctx
    windows = found[: n * ctx].reshape(n, ctx).copy()
    windows[:, 0] = llm.token_bos()
    return windows


def convert(folder: Path, model: Path, bpw: float, options: tuple[str, ...]) -> dict[str, Path]:
    """Make the two files, which share a calibration."""
    paths = {}
    for name, arguments in {"16 bit": (16,), f"mixed, {bpw:g} bpw": (bpw, *options)}.items():
        path = folder / f"{name.split(',')[0].replace(' ', '-')}.gguf"
        paths[name] = path
        if not path.exists():
            source = folder / "tiny-mixtral"
            if not source.exists():
                shutil.copytree(model, source)
            subprocess.run(mc_gguf("convert", source, "-o", path, "--bpw", *arguments), check=True)
    calibration = next(folder.glob("*.calib.safetensors"))
    command = mc_gguf("routing", "set", paths["16 bit"], "--calibration", calibration)
    subprocess.run(command, check=True, capture_output=True)
    return paths


def texts() -> dict[str, str]:
    from mc_gguf.runtime import packages

    code = packages.source_dir() / "src" / "llama-vocab.cpp"
    return {"WikiText-2": WIKITEXT.read_text(encoding="utf-8"), "C++": code.read_text(encoding="utf-8")}


def run(folder: Path, files: dict[str, Path], n_tokens: int, ctx: int, threads: int) -> list[Point]:
    """Measure the points that results.json lacks."""
    from mc_gguf.run.llama import Llama

    results = folder / "results.json"
    points = [Point(**p) for p in json.loads(results.read_text())] if results.exists() else []
    for name, path in files.items():
        llm = Llama(
            path, n_ctx=ctx, n_batch=ctx, n_ubatch=ctx, logits_all=True, n_threads=threads, routing="off"
        )
        for text_name, text in texts().items():
            todo = [("off", "off"), *settings()]
            done = {(p.policy, p.setting) for p in points if (p.file, p.text) == (name, text_name)}
            todo = [t for t in todo if t not in done]
            if not todo:
                continue
            windows = cut(llm, text, n_tokens, ctx)
            llm.routing = "off"
            base = measure(llm, windows)
            with click.progressbar(todo, label=f"{name}, {text_name}", file=sys.stderr) as bar:
                for policy, setting in bar:
                    llm.routing = setting
                    llm.reset_routing_stats()
                    scores = measure(llm, windows)
                    stats = llm.routing_stats()
                    dropped = 0.0 if setting == "off" else stats.dropped_share
                    points.append(
                        Point(
                            name,
                            text_name,
                            policy,
                            setting,
                            dropped,
                            float(np.exp(-scores.right.mean())),
                            *divergence(base, scores),
                        )
                    )
                    results.write_text(json.dumps([asdict(p) for p in points], indent=1))
        llm.close()
    return points


def curve(points: list[Point], file: str, text: str, policy: str) -> list[Point]:
    """The points of one curve in the order of the dropped share, beginning with routing off."""
    chosen = [p for p in points if (p.file, p.text) == (file, text) and p.policy in (policy, "off")]
    return sorted(chosen, key=lambda p: p.dropped)


def at(points: list[Point], share: float, value: str) -> float | None:
    """A value interpolated between the measured points without overshoot (PCHIP); None outside of them."""
    x = [p.dropped for p in points]
    if len(points) < 2 or not x[0] <= share <= x[-1]:
        return None
    keep = [i for i in range(len(x)) if i == 0 or x[i] > x[i - 1]]
    curve = PchipInterpolator([x[i] for i in keep], [getattr(points[i], value) for i in keep])
    return float(curve(share))


def table(points: list[Point]) -> str:
    """Markdown: KL divergence (perplexity) at the wanted shares, with a table per file and text."""
    lines = []
    for file, text in dict.fromkeys((p.file, p.text) for p in points):
        off = next(p for p in points if (p.file, p.text, p.policy) == (file, text, "off"))
        lines += [f"**{file}, {text}** (perplexity with all experts {off.perplexity:.2f})", ""]
        lines += [
            "| policy | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |",
            "|---" * (len(SHARES) + 1) + "|",
        ]
        for policy in dict.fromkeys(p.policy for p in points if p.policy != "off"):
            found = curve(points, file, text, policy)
            cells = []
            for share in SHARES:
                kld, perplexity = at(found, share, "kld"), at(found, share, "perplexity")
                cells.append("" if kld is None or perplexity is None else f"{kld:.4f} ({perplexity:.2f})")
            lines.append(f"| {policy} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(points: list[Point], path: Path) -> None:
    """KL divergence against the dropped share, with a panel per file and text."""
    pairs = list(dict.fromkeys((p.file, p.text) for p in points))
    figure, axes = panels(len(pairs))
    for axis, (file, text) in zip(axes, pairs, strict=True):
        for policy in dict.fromkeys(p.policy for p in points if p.policy != "off"):
            found = curve(points, file, text, policy)
            style = "--" if policy in ("random", "keep_min", "top_p") else "-"
            axis.plot(
                [100 * p.dropped for p in found], [p.kld for p in found], style, label=policy, linewidth=1
            )
        axis.set_title(f"{file}, {text}")
        axis.set_xlabel("expert activations dropped, %")
        axis.set_xlim(0, 33)
        axis.set_ylim(0, None)
    axes[0].set_ylabel("mean KL divergence from routing off, nats per token")
    save_svg(figure, path)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokens", "n_tokens", default=4096, show_default=True, help="Tokens of each text.")
@click.option("--ctx", default=512, show_default=True, help="Tokens of a window.")
@click.option("--threads", default=1, show_default=True)
@click.option("--model", type=click.Path(path_type=Path), default=MODEL, help="[default: the bundled model]")
@click.option("--bpw", default=2.06, show_default=True, help="Bits per expert weight of the mixed file.")
@click.argument("convert_options", nargs=-1, type=click.UNPROCESSED)
def main(
    folder: Path,
    n_tokens: int,
    ctx: int,
    threads: int,
    model: Path,
    bpw: float,
    convert_options: tuple[str, ...],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    points = run(folder, convert(folder, model, bpw, convert_options), n_tokens, ctx, threads)
    (folder / "table.md").write_text(table(points))
    click.echo(table(points))
    plot(points, folder / "curves.svg")


if __name__ == "__main__":
    main()
