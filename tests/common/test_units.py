"""Sizes and durations, read from text and written as text."""

from __future__ import annotations

import pytest

from mc_gguf.common.errors import BudgetError, McError
from mc_gguf.common.units import (
    format_size,
    format_size_up,
    parse_duration,
    parse_layers,
    parse_share,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("123456", 123456),
        ("1b", 1),
        ("15.5GiB", 31 << 29),
        ("15.5 gib", 31 << 29),
        ("13GB", 13_000_000_000),
        ("0.1GB", 100_000_000),
        ("750MB", 750_000_000),
        (" 2k ", 2048),
        ("3M", 3 << 20),
        ("1TiB", 1 << 40),
        (".5KiB", 512),
        ("5.GB", 5_000_000_000),
    ],
)
def test_sizes_are_read_exactly(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3GB", "-1GB", "1e9", "12 parsecs", "nan", "٣GB"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BudgetError, match=r"15\.5GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0.4", "0GiB"])
def test_a_size_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="at least one byte"):
        parse_size(text)


def test_sizes_are_written_in_binary_units() -> None:
    assert format_size(912) == "912 B"
    assert format_size(1 << 10) == "1.00 KiB"
    assert format_size(31 << 29) == "15.50 GiB"
    assert format_size(5 << 40) == "5.00 TiB"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (912, "912.00B"),
        (1 << 30, "1.00GiB"),
        ((1 << 30) + 1, "1.01GiB"),
        (6_815_745, "6.51MiB"),  # 6.5 MiB and a byte
        ((1 << 20) - 1, "1024.00KiB"),
    ],
)
def test_a_size_rounded_up_is_enough(size: int, text: str) -> None:
    assert format_size_up(size) == text
    assert parse_size(text) >= size


@pytest.mark.parametrize(
    ("text", "share"),
    [("0.15", 0.15), ("15%", 0.15), ("0", 0.0), ("100 %", 1.0), (" 2.5% ", 0.025), ("1", 1.0)],
)
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize(
    "text", ["", "%", "15", "101%", "-0.1", "nan", "inf", "a third", "1e400%", "1e99999999%"]
)
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(McError, match="is not a share; write a number from 0 to 1, or 0% to 100%"):
        parse_share(text)


def test_layers() -> None:
    assert (parse_layers("auto"), parse_layers("all"), parse_layers(" 3, 0,12")) == (
        "auto",
        "all",
        (3, 0, 12),
    )
    for text in ("", "none", "1,", "0-3", "-1", "1.5"):
        with pytest.raises(McError, match="names no layers; write auto, all, or numbers such as 0,2,5"):
            parse_layers(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), (" 2 H ", 7200), ("10min", 600), (".5s", 0.5)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "0s", "-1m", "5 days", "1e3", "soon"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(McError, match="is not a duration"):
        parse_duration(text)
