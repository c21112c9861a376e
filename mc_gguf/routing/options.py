"""The options of Routing in one table: name, values, meaning. Checks, parsing and the help text follow from
it.

To add an option, write its entry here and its field in Routing (request.py). If the runtime is to know it,
also its field in RoutingParams (params.py), which resolve.py fills, and in the structure of
run/routing_api.py, which set_routing fills.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mc_gguf.common.errors import McError
from mc_gguf.common.units import parse_layers, parse_share
from mc_gguf.routing.params import IMPORTANCES

LAYER_WORDS = ("all", "auto")


class Kind(Protocol):
    """What values an option takes. `text` says it to the user."""

    @property
    def text(self) -> str: ...

    def parse(self, name: str, text: str) -> Any:
        """The value that `text` stands for. Raises McError when it stands for none."""

    def check(self, name: str, value: Any) -> Any:
        """`value` in its canonical, hashable form. Raises McError when it is out of range."""


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1, as text also a percentage."""

    text: str = "0 to 1, or a percentage"

    def parse(self, name: str, text: str) -> float:
        return parse_share(text)

    def check(self, name: str, value: Any) -> Any:
        if not 0 <= value <= 1:
            raise McError(f"routing {name} must be from 0 to 1, but it is {value}")
        return value


@dataclass(frozen=True)
class Integer:
    """An integer in a range, both ends included."""

    least: int
    largest: int

    @property
    def text(self) -> str:
        return f"an integer from {self.least}"

    def parse(self, name: str, text: str) -> int:
        try:
            return int(text)
        except ValueError as error:
            raise McError(f"routing {name}={text} is not an integer") from error

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, int) or not self.least <= value <= self.largest:
            raise McError(
                f"routing {name} must be an integer from {self.least} to {self.largest}, but it is {value}"
            )
        return value


@dataclass(frozen=True)
class Ratio:
    """A finite number that is not negative."""

    text: str = "a number from 0"

    def parse(self, name: str, text: str) -> float:
        return _parse_number(name, text)

    def check(self, name: str, value: Any) -> Any:
        if not 0 <= value < math.inf:
            raise McError(f"routing {name} must not be negative, but it is {value}")
        return value


@dataclass(frozen=True)
class Word:
    """One of several words."""

    choices: Sequence[str]

    @property
    def text(self) -> str:
        return ", ".join(self.choices)

    def parse(self, name: str, text: str) -> str:
        return text

    def check(self, name: str, value: Any) -> Any:
        if value not in self.choices:
            raise McError(f"there is no routing {name} {value!r}; choose from {self.text}")
        return value


@dataclass(frozen=True)
class LayerNumbers:
    """Numbers of layers, or one of LAYER_WORDS."""

    text: str = "numbers, all or auto"

    def parse(self, name: str, text: str) -> Any:
        return parse_layers(text)

    def check(self, name: str, value: Any) -> tuple[int, ...] | str:
        if isinstance(value, str) and value in LAYER_WORDS:
            return value
        numbers = [] if isinstance(value, str) else list(value)
        if not numbers or any(int(n) != n or n < 0 for n in numbers):
            words = " or ".join(LAYER_WORDS)
            raise McError(
                f"routing {name} must be numbers from 0, or the word {words}, but they are {value!r}"
            )
        return tuple(sorted({int(n) for n in numbers}))


@dataclass(frozen=True)
class Thresholds:
    """One number, one number per layer, or rows [layer][rank - 1]; as text one number or one per layer."""

    text: str = "a number from 0, or one per layer"

    def parse(self, name: str, text: str) -> Any:
        numbers = [_parse_number(name, part, text) for part in text.split(",")]
        return numbers if len(numbers) > 1 else numbers[0]

    def check(self, name: str, value: Any) -> Any:
        try:
            values = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise McError(
                f"routing {name} must be numbers, in rows of equal length, not {value!r}"
            ) from error
        if values.ndim > 2 or not values.size or not np.isfinite(values).all() or (values < 0).any():
            raise McError(
                f"routing {name} must be a number not below 0, one number per layer, or rows "
                f"[layer][rank - 1], but it is {value!r}"
            )
        if values.ndim == 2:
            return tuple(tuple(row) for row in values.tolist())
        return tuple(values.tolist()) if values.ndim else float(values)


@dataclass(frozen=True)
class File:
    """The path of a file."""

    text: str = "a file"

    def parse(self, name: str, text: str) -> str:
        return text

    def check(self, name: str, value: Any) -> Any:
        return value


def _parse_number(name: str, text: str, whole: str | None = None) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise McError(f"routing {name}={whole or text} is not a number") from error


@dataclass(frozen=True)
class Option:
    """One option: which values it takes, and its meaning in one line for the user."""

    name: str
    kind: Kind
    meaning: str

    def parse(self, text: str) -> Any:
        return self.kind.parse(self.name, text)

    def check(self, value: Any) -> Any:
        return self.kind.check(self.name, value)


_ALL = (
    Option("quantile", Share(), "thresholds at this quantile of the ratios w_r / w_0 seen in calibration"),
    Option("threshold", Thresholds(), "thresholds as numbers"),
    Option("target_drop", Share(), "share of all expert activations to drop, at the least predicted damage"),
    Option("calibration", File(), "take thresholds and layers from this file of mc-gguf calibrate"),
    Option("layers", LayerNumbers(), "layers that may drop experts; auto: those that tolerate it"),
    Option("protect", Share(), "share of a prompt's tokens that keep all of their experts"),
    Option("importance", Word(IMPORTANCES), "how the tokens to protect are chosen"),
    Option("keep_min", Integer(1, 2**31 - 1), "the least number of experts that a token keeps"),
    Option("ratio", Ratio(), "an expert is dropped when w_r < ratio * w_0"),
    Option("top_p", Share(), "share of the selected experts' weight that is kept"),
    Option("rate", Share(), "probability that an expert is dropped"),
    Option("seed", Integer(0, 2**32 - 1), "random seed"),
)
OPTIONS: dict[str, Option] = {option.name: option for option in _ALL}
