"""The statistics published with the Mixture Compressor paper, as a Calibration without a model (JSON)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mc_gguf.artifacts import Calibration
from mc_gguf.errors import ArtifactError


def load_published(path: Path, fingerprint: str) -> Calibration:
    """Reads frequency, routing_weight and quant_loss. Raises ArtifactError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        frequency = np.asarray(data["frequency"], dtype=np.float64)
        weight = np.asarray(data["routing_weight"], dtype=np.float64)
        losses = [[[expert[bits] for bits in "123"] for expert in layer] for layer in data["quant_loss"]]
        loss = np.asarray(losses, dtype=np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is neither a calibration file nor published statistics: {error!r}"
        ) from error
    n_layer, n_expert = frequency.shape if frequency.ndim == 2 else (0, 0)
    if not n_layer or weight.shape != frequency.shape or loss.shape != (n_layer, n_expert, 3):
        raise ArtifactError(
            f"{path}: frequency and routing_weight must be [layer][expert] and quant_loss "
            f"[layer][expert][bits]; found {frequency.shape}, {weight.shape}, {loss.shape}"
        )
    none, none32 = np.zeros(0), np.zeros(0, dtype=np.float32)
    return Calibration(
        model=None, layers=tuple(range(n_layer)), types=(), corpus={"about": data.get("about", "")},
        frequency=frequency, routing_weight=weight, sq_error=none, output_sq=none, imatrix_in=none32,
        imatrix_mid=none32, ratio_quantiles=none, routing_sensitivity=none, routing_curve=none,
        nominal_error=loss, fingerprint=fingerprint, tool="published",
    )  # fmt: skip
