"""What callers may write for an argument of a public function: text or values, one or several."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mc_gguf.common.errors import McError, about
from mc_gguf.common.units import parse_duration, parse_size

MAX_THREADS = 512  # GGML_MAX_N_THREADS
MAX_INT = 2**31 - 1
FLOAT32_MAX = 3.4028234e38

PathLike = str | Path
Paths = PathLike | Sequence[PathLike]
Names = str | Sequence[str]  # "Q2_K,Q3_K" or ("Q2_K", "Q3_K")


def to_path(value: PathLike | None) -> Path | None:
    return None if value is None else Path(value)


def to_paths(value: Paths | None) -> tuple[Path, ...]:
    """No path, one path or several, as paths."""
    if value is None:
        return ()
    return (Path(value),) if isinstance(value, str | Path) else tuple(map(Path, value))


def to_names(value: Names) -> tuple[str, ...]:
    """The names; text is split at its commas. Raises McError for what is no text."""
    parts = value.split(",") if isinstance(value, str) else value
    names = list(parts) if isinstance(parts, Iterable) else [parts]
    if not all(isinstance(name, str) for name in names):
        raise McError(f"give names, as a text or a list of texts, not {value!r}")
    return tuple(name.strip() for name in names if name.strip())


def to_types(value: Names) -> tuple[str, ...]:
    """Names of ggml types, in upper case; text is split at its commas."""
    return tuple(name.upper() for name in to_names(value))


def to_bytes(value: str | int, parameter: str) -> int:
    """Bytes of "15.5GiB", or of a number. Raises BudgetError, about `parameter`."""
    with about(parameter):
        return parse_size(str(value))


def to_seconds(value: str | float, parameter: str) -> float:
    """Seconds of "90s", "10m", or of a number. Raises McError, about `parameter`."""
    with about(parameter):
        return parse_duration(str(value))


def whole(
    minimum: int, maximum: int | None = None, *, or_none: bool = False, **arguments: int | None
) -> tuple[Any, ...]:
    """The values of `arguments` as Python's integers; with `or_none`, None stays, which stands for a default.

    Raises McError about the first that is no whole number, or not from `minimum` to `maximum`.
    """
    for parameter, value in arguments.items():
        if value is None and or_none:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise McError(f"{parameter} must be a whole number, not {value!r}", parameter=parameter)
        if value < minimum:
            raise McError(f"{parameter} must be at least {minimum}, not {value}", parameter=parameter)
        if maximum is not None and value > maximum:
            raise McError(f"{parameter} must be at most {maximum}, not {value}", parameter=parameter)
    return tuple(None if value is None else int(value) for value in arguments.values())


def number(parameter: str, value: float | None) -> float | None:
    """`value` as a Python number; None stays. Raises McError, about `parameter`, for anything else."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise McError(f"{parameter} must be a number, not {value!r}", parameter=parameter)
    return float(value)
