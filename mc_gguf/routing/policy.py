"""The policies in one table: what each drops, and the options that it takes.

A token's selected experts are ranked by routing weight, w_0 >= w_1 >= ...; rank 0 is never dropped, and
POLICIES says what happens to the others. patches/src/include/ggml-mc-routing.h has the exact definitions.

To add a policy, write its entry here and its name in params.py, in the order of enum ggml_mc_policy; if it
needs more than options, thresholds and layers, extend resolve.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mc_gguf.routing.options import OPTIONS

THRESHOLD_SOURCES = ("quantile", "threshold", "target_drop")  # options, of which at most one is given
_THRESHOLD_OPTIONS = (*THRESHOLD_SOURCES, "calibration", "layers")


@dataclass(frozen=True)
class Policy:
    """What a policy drops, and the options that it takes; one without options drops nothing by itself."""

    name: str
    meaning: str
    options: tuple[str, ...] = ()

    @property
    def has_thresholds(self) -> bool:
        """Whether it compares routing weights with thresholds per layer and rank."""
        return "threshold" in self.options


_ALL = (
    Policy("auto", "odp with the thresholds that the file carries; off when it carries none"),
    Policy("off", "drops nothing"),
    Policy(
        "odp",
        "drops rank r where w_r < threshold * w_0, but not for the most important tokens of a prompt",
        (*_THRESHOLD_OPTIONS, "protect", "importance"),
    ),
    Policy("threshold", "the same without protected tokens", _THRESHOLD_OPTIONS),
    Policy(
        "keep_min",
        "drops ranks from keep_min on where w_r < ratio * w_0 (ik_llama.cpp's -ser)",
        ("keep_min", "ratio", "layers"),
    ),
    Policy(
        "top_p",
        "keeps the fewest ranks that hold the share top_p of the selected experts' weight",
        ("top_p", "layers"),
    ),
    Policy("random", "control: drops every rank with probability rate", ("rate", "seed", "layers")),
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in _ALL}


def describe_policies() -> list[str]:
    """The policies and their options as text, one line each: help for whoever writes a routing."""
    lines = [
        "Policies:",
        *(f"  {policy.name:<13}{policy.meaning}" for policy in POLICIES.values()),
        "Options:",
    ]
    for option in OPTIONS.values():
        users = ", ".join(name for name, policy in POLICIES.items() if option.name in policy.options)
        lines.append(f"  {option.name:<13}{option.meaning} ({option.kind.text}; for {users})")
    return lines
