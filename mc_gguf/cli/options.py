"""The options that plan and convert share, and the one call that they make of them.

Cheap to import, so the help spells names and defaults that allocate and artifacts hold (a test compares
them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mc_gguf.artifacts import Calibration, FixedTypes, ModelInfo, Plan
    from mc_gguf.plan import Budget

_OPTIONS = (
    click.option(
        "--bpw",
        type=float,
        metavar="X",
        help="Average bits per routed expert weight; 16 for a plain 16-bit file.",
    ),
    click.option("--size", metavar="SIZE", help="Largest size of the whole file: 15.5GiB, 16GB, or bytes."),
    click.option(
        "--bits-per-layer",
        type=int,
        metavar="N",
        help="Nominal bits summed over a layer's experts. Implies --strategy mc.",
    ),
    click.option(
        "--strategy",
        metavar="NAME",
        help="pmq (one program over the whole model), mc (as published, per layer), uniform (one type), "
        "layer (one type per layer and projection, for stock llama.cpp), random, inverted (controls), "
        "bsp, frequency, routing-weight, f-norm, hessian (published baselines).  [default: pmq]",
    ),
    click.option(
        "--objective",
        metavar="NAME",
        help="What pmq, layer and the controls minimise: kld (divergence of the model's output), block "
        "(error of the MoE block's output), published, or a baseline's.  [default: kld]",
    ),
    click.option("--types", metavar="T,T,...", help="Expert types to choose from.  [default: all measured]"),
    click.option("--attn-type", metavar="T", help="Type of attention q and output.  [default: Q6_K]"),
    click.option("--attn-kv-type", metavar="T", help="Type of attention k and v.  [default: Q8_0]"),
    click.option(
        "--attention",
        metavar="NAME|T,T,...",
        help="fixed (as the two options above say), or decided in the same budget as the experts (with "
        "--size): auto (among all measured types), or among these types.  [default: auto with --size, "
        "strategy pmq or layer and objective kld, unless one of the two is given; else fixed]",
    ),
    click.option("--embd-type", metavar="T", help="Type of the token embeddings.  [default: Q6_K]"),
    click.option("--output-type", metavar="T", help="Type of the output matrix.  [default: Q6_K]"),
    click.option("--seed", type=int, default=0, show_default=True, help="For what is drawn by lot."),
)


# Which field of FixedTypes an option sets.
_FIELDS = {"attn_type": "attn", "attn_kv_type": "attn_kv", "embd_type": "token_embd", "output_type": "output"}


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked of the planner."""

    budget: Budget
    strategy: str
    types: tuple[str, ...] | None
    fixed: FixedTypes
    seed: int
    objective: str | None = None
    attention: tuple[str, ...] | None = None  # types to choose from; empty: all measured; None: fixed
    attention_default: bool = False  # all measured where the program can decide them

    def check(self, model: ModelInfo) -> None:
        """Refuses what no calibration of `model` could make feasible: a plan on made-up errors is tried."""
        from mc_gguf.calibrate.request import measured_types
        from mc_gguf.plan import stand_in

        self.plan(stand_in(model, measured_types(model, self.types)))

    def plan(self, calibration: Calibration) -> Plan:
        """The plan for this calibration, with exact file sizes where the model is known."""
        from mc_gguf.plan import decides_attention, plan

        file_bytes = None
        if calibration.model is not None:
            from mc_gguf.container import file_bytes as of_file
            from mc_gguf.routing.metadata import routing_metadata_from

            file_bytes = partial(of_file, calibration.model, routing=routing_metadata_from(calibration))
        request = (self.budget, self.strategy, self.objective)
        decided = self.attention_default and decides_attention(calibration, *request)
        return plan(
            calibration,
            self.budget,
            self.strategy,
            self.types,
            self.fixed,
            self.seed,
            file_bytes,
            self.objective,
            () if decided else self.attention,
        )


def plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of planning to a click command; its function gets them as one argument `options`."""

    @wraps(function)
    def wrapped(**arguments: Any) -> Any:
        names = (
            "bpw",
            "size",
            "bits_per_layer",
            "strategy",
            "types",
            "seed",
            "objective",
            "attention",
            *_FIELDS,
        )
        return function(options=_collect(**{name: arguments.pop(name) for name in names}), **arguments)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _collect(
    bpw: float | None,
    size: str | None,
    bits_per_layer: int | None,
    strategy: str | None,
    types: str | None,
    seed: int,
    objective: str | None = None,
    attention: str | None = None,
    **fixed: str | None,
) -> PlanOptions:
    from mc_gguf.artifacts import FixedTypes
    from mc_gguf.common.units import parse_size
    from mc_gguf.plan import Budget

    budget = Budget(bpw, parse_size(size) if size is not None else None, bits_per_layer)
    implied = "mc" if bits_per_layer is not None else "pmq"
    names = _names(types) if types is not None else None
    given = {_FIELDS[option]: t.upper() for option, t in fixed.items() if t is not None}
    types_of_attention = _attention(attention, given)
    return PlanOptions(
        budget,
        strategy or implied,
        names,
        replace(FixedTypes(), **given),  # type: ignore[arg-type]  # never `attention`
        seed,
        objective,
        types_of_attention,
        attention is None and not {"attn", "attn_kv"} & given.keys(),
    )


def _names(types: str) -> tuple[str, ...]:
    return tuple(t.strip().upper() for t in types.split(",") if t.strip())


def _attention(wanted: str | None, fixed: Mapping[str, str]) -> tuple[str, ...] | None:
    """Types to choose from for the attention; empty: all measured; None: fixed."""
    from mc_gguf.common.errors import McError

    if wanted is None or wanted.lower() == "fixed":
        return None
    if {"attn", "attn_kv"} & fixed.keys():
        raise McError("--attention chooses what --attn-type and --attn-kv-type fix; give one or the other")
    names = _names(wanted)
    if not names:
        raise McError("--attention needs fixed, auto or names of types")
    return () if wanted.lower() == "auto" else names
