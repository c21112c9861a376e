"""What a calibration holds, for people and for programs: what calibrate prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mc_gguf.artifacts import Calibration
from mc_gguf.calibrate.super_experts import super_experts


@dataclass(frozen=True)
class CalibrationSummary:
    """Counts, the types that were measured, and the super experts in words."""

    n_layer: int
    n_expert: int
    tokens: int
    types: tuple[str, ...]
    super_experts: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        counts = f"{self.n_layer} layers, {self.n_expert} experts, {len(self.types)} types"
        return f"{counts}, {self.tokens} tokens\nsuper experts: {'; '.join(self.super_experts) or 'none'}"


def summarize_calibration(calibration: Calibration) -> CalibrationSummary:
    """The summary of a calibration that calibrate() made."""
    return CalibrationSummary(
        len(calibration.layers),
        calibration.n_expert,
        calibration.corpus["tokens"],
        calibration.types,
        tuple(map(str, super_experts(calibration))),
    )
