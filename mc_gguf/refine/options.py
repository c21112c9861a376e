"""What a user asks of refine, and what comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mc_gguf.artifacts import Plan

MIN_ROWS = 8  # of text; a quarter of them are held out


@dataclass(frozen=True)
class RefinementOptions:
    """How long to search, and on what text.

    `seconds`           time for everything but the final check
    `text`              UTF-8 files; none: the bundled mixture
    `tokens`, `ctx`     tokens to use, in rows of `ctx`
    `seed`              random seed of the text's rows and of the search
    `threads`           0: all cores
    `memory_bytes`      for dequantized experts; None: 4 GiB
    `bank`              folder that keeps quantized experts; None: they are kept until the search is over
    `compensate`        measure experts as error compensation rounds them, not as ggml does
    `calibration_text`  the calibration's text, which compensation needs; none: the bundled mixture
    """

    seconds: float
    text: tuple[Path, ...] = ()
    tokens: int = 32768
    ctx: int = 512
    seed: int = 1
    threads: int = 0
    memory_bytes: int | None = None
    bank: Path | None = None
    compensate: bool = True
    calibration_text: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Refined:
    """What a search found. KL divergences are means in nats per token, of the plan before and after.

    `held_out_change_se`  standard error of the change on held-out text
    `changed`             matrices that have another type than before
    """

    plan: Plan
    search_start: float
    search_kld: float
    held_out_start: float
    held_out_kld: float
    held_out_change_se: float
    rounds: int
    accepted: int
    evaluations: int
    changed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        body = {k: v for k, v in asdict(self).items() if k != "plan"}
        return body | {"expert_bpw": self.plan.expert_bpw, "file_bytes": self.plan.file_bytes}

    def lines(self) -> list[str]:
        """The result as text, one fact per line."""
        change, error = self.held_out_kld - self.held_out_start, self.held_out_change_se
        share = self.held_out_kld / self.held_out_start if self.held_out_start > 0 else 1.0
        rows = [
            ("search KLD", f"{self.search_start:.5f} -> {self.search_kld:.5f} nats per token"),
            (
                "held-out KLD",
                f"{self.held_out_start:.5f} -> {self.held_out_kld:.5f} nats per token "
                f"({share:.3f} of it; change {change:+.5f} ± {error:.5f})",
            ),
            (
                "search",
                f"{self.rounds} rounds, {self.accepted} steps accepted, {self.evaluations} "
                f"measurements, {self.seconds:.0f} s",
            ),
            ("changed", f"{self.changed} matrices have another type"),
            ("bits", f"{self.plan.expert_bpw:.4f} per expert weight"),
        ]
        return [f"{name:<16}{text}" for name, text in rows]
