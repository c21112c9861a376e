"""Quantities as people write them: sizes ("15.5GiB", "750MB", "123456"), durations ("90s", "10m"), shares
("15%", "0.15") and layers ("auto", "0,2,5").
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from mc_gguf.common.errors import BudgetError, McError

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
}
_PATTERN = re.compile(r"(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})\s*([a-z]*)", re.ASCII)
_SHARE = re.compile(r"(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(e-?\d{1,2})?\s*(%?)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """The bytes that `text` means, rounded down. GB is 10^9, GiB (and G, as in other command lines) is 2^30.

    Raises BudgetError for anything that is not a positive size.
    """
    match = _PATTERN.fullmatch(text.strip().lower())
    if match is None or match[2] not in _FACTORS:
        raise BudgetError(
            f"{text!r} is not a size; write bytes or a number with a unit: 15.5GiB, 16GB, 750MB"
        )
    size = int(Fraction(match[1].rstrip(".")) * _FACTORS[match[2]])
    if size < 1:
        raise BudgetError(f"a size must be at least one byte, not {text!r}")
    return size


def format_size(size: int) -> str:
    """`size` bytes with a binary unit and three significant digits or more: 15.50 GiB, 912 B."""
    value, unit = _in_binary_unit(size)
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"


def format_size_up(size: int) -> str:
    """A text such as 15.51GiB that parse_size reads as at least `size` bytes: rounded up to two decimals."""
    value, unit = _in_binary_unit(size)
    return f"{math.ceil(value * 100) / 100:.2f}{unit}"


def _in_binary_unit(size: int) -> tuple[float, str]:
    """`size` bytes in the largest unit that leaves 1 or more."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return value, unit


def parse_duration(text: str) -> float:
    """The seconds that "90", "90s", "1.5m" or "2h" means. Raises McError for all but a positive time."""
    match = _PATTERN.fullmatch(text.strip().lower())
    factor = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}.get(match[2]) if match else None
    if match is None or factor is None or not float(match[1]) > 0:
        raise McError(f"{text!r} is not a duration; write seconds or a number with a unit: 90s, 10m, 2h")
    return float(Fraction(match[1].rstrip(".")) * factor)


def parse_share(text: str) -> float:
    """A share from 0 to 1, written as "0.15" or "15%". Raises McError for anything else."""
    match, share = _SHARE.fullmatch(text.strip()), -1.0
    if match:
        number = Fraction(match[1].rstrip(".") + (match[2] or ""))
        share = float(number / 100 if match[3] else number)
    if not 0 <= share <= 1:
        raise McError(f"{text!r} is not a share; write a number from 0 to 1, or 0% to 100%")
    return share


def parse_layers(text: str) -> str | tuple[int, ...]:
    """The numbers of layers in "0,2,5"; "auto" and "all" as they are. Raises McError for anything else."""
    if text in ("auto", "all"):
        return text
    if not re.fullmatch(r"\d{1,6}(\s*,\s*\d{1,6})*", text.strip(), re.ASCII):
        raise McError(f"{text!r} names no layers; write auto, all, or numbers such as 0,2,5")
    return tuple(int(number) for number in text.split(","))
