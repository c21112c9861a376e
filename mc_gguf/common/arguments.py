"""What callers may write for an argument of a public function: text or values, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mc_gguf.common.errors import McError, about
from mc_gguf.common.units import parse_duration, parse_size

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
    """The names; text is split at its commas."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


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


def check_at_least(minimum: int, **arguments: int | None) -> None:
    """Raises McError, about the first of `arguments` that is below `minimum`; None stands for a default."""
    for parameter, value in arguments.items():
        if value is not None and value < minimum:
            raise McError(f"{parameter} must be at least {minimum}, not {value}", parameter=parameter)


def check_at_most(maximum: int, **arguments: int | None) -> None:
    """Raises McError, about the first of `arguments` that is above `maximum`; None stands for a default."""
    for parameter, value in arguments.items():
        if value is not None and value > maximum:
            raise McError(f"{parameter} must be at most {maximum}, not {value}", parameter=parameter)
