"""Result: what the evaluation of one model on one text found. Statistics are those of llama-perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.units import format_size
from mc_gguf.evaluate.scorer import Scores


@dataclass(frozen=True)
class Result:
    """One model on one text.

    KL divergence and log-ratio are in nats per token, probabilities and shares from 0 to 1. `tokens` is how
    many tokens were scored; names that end in _se are standard errors of means. The fields from
    base_perplexity to top1_agreement_se compare with the reference and are None without one:

    ln_ppl_ratio    ln(perplexity / base_perplexity), with the standard error of the paired difference
    p_diff          change of the probability of the correct token; negative: less probable than before
    p01, p99        quantiles
    top1_agreement  share of tokens for which both find the same token most probable

    `dropped_share` is the share of all slots of routed experts that were dropped while the text was
    evaluated, context tokens included; None with routing off. `model_sha256` is None unless it was asked
    for.
    """

    model: str
    file_bytes: int
    text: str
    ctx: int
    tokens: int
    perplexity: float
    perplexity_se: float
    base_perplexity: float | None = None
    ln_ppl_ratio: float | None = None
    ln_ppl_ratio_se: float | None = None
    mean_kld: float | None = None
    mean_kld_se: float | None = None
    median_kld: float | None = None
    p99_kld: float | None = None
    max_kld: float | None = None
    mean_p_diff: float | None = None
    mean_p_diff_se: float | None = None
    p01_p_diff: float | None = None
    p99_p_diff: float | None = None
    rms_p_diff: float | None = None
    top1_agreement: float | None = None
    top1_agreement_se: float | None = None
    dropped_share: float | None = None
    routing: str = "off"
    seconds: float = 0.0
    model_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def statistics(scores: Scores) -> dict[str, Any]:
    """The fields of Result that come from the scores."""
    nll = scores.nll.astype(np.float64)
    value = math.exp(nll.mean())
    found: dict[str, Any] = {
        "tokens": nll.size,
        "perplexity": value,
        "perplexity_se": value * standard_error(nll),
    }
    if scores.kld is None or scores.nll_base is None or scores.p_diff is None or scores.same_top is None:
        return found
    kld, p_diff = scores.kld.astype(np.float64), scores.p_diff.astype(np.float64)
    ratio, same = nll - scores.nll_base, float(scores.same_top.mean())
    return found | {
        "base_perplexity": math.exp(scores.nll_base.astype(np.float64).mean()),
        "ln_ppl_ratio": float(ratio.mean()),
        "ln_ppl_ratio_se": standard_error(ratio),
        "mean_kld": float(kld.mean()),
        "mean_kld_se": standard_error(kld),
        "median_kld": float(np.median(kld)),
        "p99_kld": float(np.quantile(kld, 0.99)),
        "max_kld": float(kld.max()),
        "mean_p_diff": float(p_diff.mean()),
        "mean_p_diff_se": standard_error(p_diff),
        "p01_p_diff": float(np.quantile(p_diff, 0.01)),
        "p99_p_diff": float(np.quantile(p_diff, 0.99)),
        "rms_p_diff": float(np.sqrt((p_diff**2).mean())),
        "top1_agreement": same,
        "top1_agreement_se": math.sqrt(same * (1 - same) / max(1, nll.size - 1)),
    }


def standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0


# heading, whether the column is text (aligned left), and the cell of a result
Column = tuple[str, bool, Any]


def columns(results: Sequence[Result]) -> list[Column]:
    """The columns of a table of results: comparisons and routing only where there are any."""

    def percent(name: str, digits: int = 2) -> Any:
        return lambda r: _cell(getattr(r, name), lambda v: f"{100 * v:.{digits}f} %")

    def number(name: str) -> Any:
        return lambda r: _cell(getattr(r, name), lambda v: f"{v:.5f}")

    found: list[Column] = [
        ("model", True, lambda r: r.model),
        ("size", False, lambda r: format_size(r.file_bytes)),
        ("text", True, lambda r: r.text),
        ("tokens", False, lambda r: f"{r.tokens:,}"),
        ("perplexity", False, lambda r: f"{r.perplexity:.4f} ± {r.perplexity_se:.4f}"),
    ]
    if any(r.mean_kld is not None for r in results):
        found += [
            ("mean KLD", False, lambda r: _cell(r.mean_kld, lambda v: f"{v:.5f} ± {r.mean_kld_se:.5f}")),
            ("median", False, number("median_kld")),
            ("99 %", False, number("p99_kld")),
            ("same top-1", False, percent("top1_agreement")),
            ("mean Δp", False, percent("mean_p_diff", 3)),
            ("99 % Δp", False, percent("p99_p_diff")),
            ("RMS Δp", False, percent("rms_p_diff")),
        ]
    if any(r.dropped_share is not None for r in results):
        found.append(("dropped", False, percent("dropped_share", 1)))
    return found


def result_table(results: Sequence[Result]) -> str:
    """The results as aligned text, one line each."""
    chosen = columns(results)
    rows = [[heading for heading, _, _ in chosen], *([cell(r) for _, _, cell in chosen] for r in results)]
    return align_columns(rows, [left for _, left, _ in chosen])


def align_columns(rows: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    """Rows of cells as text; the columns that are not `left` are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            cell.ljust(n) if is_left else cell.rjust(n)
            for cell, n, is_left in zip(row, widths, left, strict=True)
        ]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _cell(value: float | None, text: Any) -> str:
    return "" if value is None else str(text(value))
