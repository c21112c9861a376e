"""The statistics published with the Mixture Compressor paper (arXiv 2410.06270), a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mc_gguf.artifacts.header import why
from mc_gguf.artifacts.model import Floats
from mc_gguf.common.errors import ArtifactError

NOMINAL_BITS = (1, 2, 3)
# The ggml types that stand for them.
NOMINAL_TYPES = ("IQ1_S", "IQ2_XXS", "IQ3_XXS")


@dataclass(frozen=True, eq=False)
class PublishedStatistics:
    """Statistics of L layers with E experts each.

    Attributes:
        about: where the numbers come from.
        frequency: [L, E] tokens routed to each expert.
        routing_weight: [L, E] sum of their routing weights.
        nominal_error: [L, E, 3] Frobenius norm of the output's change at NOMINAL_BITS.
    """

    about: str
    frequency: Floats
    routing_weight: Floats
    nominal_error: Floats

    @classmethod
    def load(cls, path: Path) -> PublishedStatistics:
        """Read and check `path`. Raises ArtifactError."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            frequency = np.asarray(data["frequency"], dtype=np.float64)
            weight = np.asarray(data["routing_weight"], dtype=np.float64)
            losses = [
                [[expert[str(n)] for n in NOMINAL_BITS] for expert in layer] for layer in data["quant_loss"]
            ]
            loss = np.asarray(losses, dtype=np.float64)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is neither a calibration file nor published statistics: {why(error)}"
            ) from error
        n_layer, n_expert = frequency.shape if frequency.ndim == 2 else (0, 0)
        if (
            not n_layer
            or weight.shape != frequency.shape
            or loss.shape != (n_layer, n_expert, len(NOMINAL_BITS))
        ):
            raise ArtifactError(
                f"{path}: frequency and routing_weight must be [layer][expert] and quant_loss "
                f"[layer][expert][bits]; found {frequency.shape}, {weight.shape}, {loss.shape}"
            )
        return cls(data.get("about", ""), frequency, weight, loss)


def is_published(path: Path) -> bool:
    """Whether `path` begins like JSON, which a calibration file never does."""
    with path.open("rb") as file:
        return file.read(1) == b"{"
