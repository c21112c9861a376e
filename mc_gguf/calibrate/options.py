"""What is to be measured: the options of a calibration, the types that they stand for, and all that the
result depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mc_gguf.artifacts import Calibration, ModelInfo
from mc_gguf.calibrate.disturbance import SENSITIVITY_TOKENS
from mc_gguf.calibrate.expert_errors import MAX_ROWS, MAX_TOKENS
from mc_gguf.calibrate.matrices import MATRIX_TOKENS
from mc_gguf.common.errors import McError
from mc_gguf.ggml.types import CANDIDATES, FALLBACKS, TYPES, ggml_type
from mc_gguf.source.text import Corpus


@dataclass(frozen=True)
class CalibrationOptions:
    """What is measured, how exactly, and with how many threads.

    Attributes:
        types: names of the ggml types whose errors are measured; None: those that `measured_types` chooses.
        max_rows: rows of a matrix that its errors are measured on; the result is scaled to all rows.
        max_tokens: tokens of an expert that its errors are measured on; the result is scaled to all of its
            tokens.
        sensitivity_tokens: tokens that show how sensitive each layer is to dropped and to rounded experts.
        matrix_tokens: tokens that errors and prices of other matrices are measured on.
        seed: random seed for the choice of rows and tokens.
        threads: 0 means all cores. The result does not depend on it.
        gpu_layers: layers that the runtime computes on a GPU.
        cpu_moe: how many of them keep their experts in the CPU's memory.
    """

    types: tuple[str, ...] | None = None
    max_rows: int = MAX_ROWS
    max_tokens: int = MAX_TOKENS
    sensitivity_tokens: int = SENSITIVITY_TOKENS
    matrix_tokens: int = MATRIX_TOKENS
    seed: int = 0
    threads: int = 0
    gpu_layers: int = 0
    cpu_moe: int = 0


DEFAULT_OPTIONS = CalibrationOptions()


def measured_types(info: ModelInfo, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The types to measure, by size: `wanted`, or by default the candidates that fit some projection, and
    FALLBACKS if a candidate does not fit every projection.

    Raises McError when a type is unknown, or none of the types fits some projection.
    """
    # The widths of rows, each with a projection that has it.
    widths = {stack.shape[0]: projection for (_, projection), stack in info.stacks.items()}
    names = [ggml_type(name).name for name in wanted] if wanted else list(CANDIDATES)
    if not wanted and any(not TYPES[n].fits(w) for n in CANDIDATES for w in widths):
        names += FALLBACKS
    usable = {n for n in names if any(TYPES[n].fits(w) for w in widths)}
    for width, projection in widths.items():
        if not any(TYPES[n].fits(width) for n in usable):
            raise McError(
                f"none of the types {', '.join(names)} fits rows of {width} weights ({projection}); try F16",
                parameter="types",
            )
    return tuple(sorted(usable, key=lambda n: (TYPES[n].bpw, n)))


def calibration_identity(
    info: ModelInfo, text: Corpus, types: Sequence[str], options: CalibrationOptions
) -> dict[str, Any]:
    """All that the result depends on; the number of threads is not part of it."""
    return {
        "model": info.fingerprint,
        "corpus": text.to_json(),
        "types": list(types),
        "max_rows": options.max_rows,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        "sensitivity_tokens": options.sensitivity_tokens,
        "matrix_tokens": options.matrix_tokens,
    }


def is_calibration_of(
    calibration: Calibration, info: ModelInfo, text: Corpus, options: CalibrationOptions
) -> bool:
    """Whether `calibration` holds what calibrate() would measure with these arguments; it may hold more
    types.
    """
    wanted = calibration_identity(info, text, measured_types(info, options.types), options)
    found = dict(calibration.corpus.get("measured", {}))
    types = found.pop("types", ())
    return set(wanted.pop("types")) <= set(types) and found == wanted
