"""Routing: what a user asks of dynamic expert routing, in Python or as text.

    Routing("odp", quantile=0.3)    Routing.parse("odp:quantile=0.3")    "auto"    "off"

policy.py says what each policy drops, options.py which values the options take, and resolve.py makes of a
Routing what the runtime is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mc_gguf.common.errors import McError
from mc_gguf.routing.options import OPTIONS
from mc_gguf.routing.policy import POLICIES, THRESHOLD_SOURCES

if TYPE_CHECKING:
    from mc_gguf.routing.metadata import RoutingMetadata


@dataclass(frozen=True)
class Routing:
    """A policy with its options. Raises McError unless the options of other policies keep their defaults.

    policy       auto, off, odp, threshold, keep_min, top_p or random
    quantile     thresholds at this quantile of the w_r / w_0 seen in calibration: 0.5 drops half of a rank
    threshold    thresholds as numbers: one for all, one per layer (of all layers, or of those with experts
                 where the file or the calibration says which these are), or rows [layer][rank - 1]
    target_drop  share of all expert activations to drop, at the least predicted damage. All layers may drop
                 unless `layers` names some
    protect      share of a prompt's tokens that keep all experts; None: what the file says, else 0.02
    importance   how those tokens are chosen: attention, l1, mean, variance, kurtosis or last
    layers       layers in which experts may be dropped: numbers, "all" or "auto" (those that tolerate it);
                 None: what the file says, else all
    keep_min     the least number of experts that a token keeps under policy keep_min
    ratio        policy keep_min drops an expert when w_r < ratio * w_0
    top_p        share of the selected experts' weight that policy top_p keeps
    rate         probability that policy random drops an expert
    seed         random seed of policy random
    calibration  a file of mc-gguf calibrate to take thresholds and layers from instead of the GGUF

    Without quantile, threshold and target_drop, odp and threshold use the thresholds that the file carries.
    """

    policy: str = "odp"
    quantile: float | None = None
    threshold: float | Sequence[float] | Sequence[Sequence[float]] | None = None
    target_drop: float | None = None
    protect: float | None = None
    importance: str = "attention"
    layers: Sequence[int] | str | None = None
    keep_min: int = 1
    ratio: float = 0.0
    top_p: float = 1.0
    rate: float = 0.0
    seed: int = 0
    calibration: Path | str | None = None

    def __post_init__(self) -> None:
        _check_policy(self.policy)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "policy" or (value is None and field.default is None):
                continue
            checked = OPTIONS[field.name].check(value)
            object.__setattr__(self, field.name, checked)
            if checked != field.default:
                _check_option(self.policy, field.name)
        given = [name for name in THRESHOLD_SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise McError(f"routing takes one of {' and '.join(given)}, not both")

    @classmethod
    def parse(cls, text: str) -> Routing:
        """A routing from text: POLICY or POLICY:option=value,option=value.

        Shares may be percentages, and lists are separated by commas: "odp:target_drop=15%,layers=0,1,5".
        Raises McError for anything else.
        """
        policy, _, rest = text.strip().partition(":")
        _check_policy(policy)
        given: dict[str, str] = {}
        for piece in rest.split(",") if rest else []:
            name, has_value, value = piece.partition("=")
            name = name.strip()
            if has_value and name in given:
                raise McError(f"routing {text!r} gives {name} twice")
            if has_value:
                given[name] = value.strip()
            elif given:  # one more number of a list
                given[[*given][-1]] += f",{piece.strip()}"
            else:
                raise McError(f"routing {text!r}: {piece!r} is not option=value")
        for name in given:
            _check_option(policy, name)
        return cls(policy, **{name: OPTIONS[name].parse(value) for name, value in given.items()})

    @classmethod
    def of(cls, routing: Routing | str) -> Routing:
        """`routing` itself, or what its text stands for. Raises McError for anything else."""
        if not isinstance(routing, str | Routing):
            raise McError(f"routing is {routing!r}; give a policy as text, like 'odp', or a Routing")
        return cls.parse(routing) if isinstance(routing, str) else routing

    def settled(self, metadata: RoutingMetadata | None) -> Routing:
        """Policy auto is replaced by what it means for a file that carries `metadata`."""
        if self.policy != "auto":
            return self
        return replace(self, policy="off" if metadata is None else "odp")


def _check_policy(name: str) -> None:
    if name not in POLICIES:
        raise McError(f"there is no routing policy {name!r}; choose from {', '.join(POLICIES)}")


def _check_option(policy: str, name: str) -> None:
    options = POLICIES[policy].options
    if name not in options:
        raise McError(
            f"routing {policy!r} has no option {name!r}; its options: {', '.join(options) or 'none'}"
        )
