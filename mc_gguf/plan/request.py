"""PlanRequest: everything that a plan is asked for, as a user writes it, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mc_gguf.artifacts import Calibration, FixedTypes, Plan
from mc_gguf.common.arguments import MAX_INT, Names, number, to_bytes, to_types, whole
from mc_gguf.common.errors import McError, about
from mc_gguf.ggml.types import ggml_type
from mc_gguf.plan.planner import decides_others, plan
from mc_gguf.plan.problem import Budget, FileBytes

_FIELDS = {"attn_type": "attn", "attn_kv_type": "attn_kv", "embd_type": "token_embd", "output_type": "output"}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A budget, and what may be chosen within it.

    Args:
        size: largest size of the whole file, "15.5GiB" or bytes.
        bpw: average bits per routed expert weight; 16 makes a plain 16-bit file.
        bits_per_layer: nominal bits summed over a layer's experts, for strategy mc. Give exactly one budget.
        strategy: a name in mc_gguf.plan.STRATEGIES; by default mc with `bits_per_layer`, else pmq.
        objective: what the strategy minimises, a name in mc_gguf.plan.OBJECTIVES; by default the best one
            that the calibration has data for.
        types: ggml types to choose from for experts; by default all that were measured.
        others: "fixed", or "auto" (all measured types) or types to choose from for every matrix that is no
            expert: attention, shared experts, dense layers; within `size`. By default they are chosen where
            they can be, unless `attn_type` or `attn_kv_type` is given.
        attn_type: type of attention q and output and of all that has no other option, by default Q6_K.
        attn_kv_type: type of attention k and v, by default Q8_0.
        embd_type: type of the token embeddings, by default Q6_K.
        output_type: type of the output matrix, by default Q6_K.
        seed: random seed of strategy random.
    """

    size: str | int | None = None
    bpw: float | None = None
    bits_per_layer: int | None = None
    strategy: str | None = None
    objective: str | None = None
    types: Names | None = None
    others: Names | None = None
    attn_type: str | None = None
    attn_kv_type: str | None = None
    embd_type: str | None = None
    output_type: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        (seed,), bpw = whole(0, seed=self.seed), number("bpw", self.bpw)
        (bits_per_layer,) = whole(0, MAX_INT, or_none=True, bits_per_layer=self.bits_per_layer)
        for name, value in (("seed", seed), ("bpw", bpw), ("bits_per_layer", bits_per_layer)):
            object.__setattr__(self, name, value)
        for name, names in (("types", self.types), ("others", self.others)):
            with about(name):
                to_types(names or ())
        for name in _FIELDS:
            if not isinstance(kind := getattr(self, name), str | None):
                raise McError(f"{name} must be the name of a type, not {kind!r}", parameter=name)

    @property
    def has_budget(self) -> bool:
        return any(limit is not None for limit in (self.size, self.bpw, self.bits_per_layer))

    @property
    def budget(self) -> Budget:
        """Raises BudgetError unless there is exactly one."""
        size_bytes = to_bytes(self.size, "size") if self.size is not None else None
        names = ("size", "bpw", "bits_per_layer")
        given = [name for name in names if getattr(self, name) is not None]
        with about(*(given or names)):
            return Budget(self.bpw, size_bytes, self.bits_per_layer)

    @property
    def strategy_name(self) -> str:
        """Only strategy mc knows nominal bits, so that they imply it."""
        return self.strategy or ("pmq" if self.bits_per_layer is None else "mc")

    @property
    def expert_types(self) -> tuple[str, ...] | None:
        return None if self.types is None else to_types(self.types)

    @property
    def fixed(self) -> FixedTypes:
        return replace(FixedTypes(), **self._given())  # type: ignore[arg-type]  # never `others`

    def _given(self) -> Mapping[str, str]:
        """The types that were given, by field of FixedTypes. Raises McError for an unknown one."""
        given = {}
        for parameter, field in _FIELDS.items():
            if (name := getattr(self, parameter)) is not None:
                with about(parameter):
                    given[field] = ggml_type(name).name
        return given

    def other_types(self, calibration: Calibration) -> tuple[str, ...] | None:
        """Types to choose from for other matrices. Empty: all that were measured. None: as `fixed` says.

        Raises McError when `others` contradicts `attn_type` or `attn_kv_type`, or names nothing.
        """
        fixes_some = not {"attn", "attn_kv"}.isdisjoint(self._given())
        if self.others is None:
            request = (self.budget, self.strategy_name, self.objective)
            return () if not fixes_some and decides_others(calibration, *request) else None
        names = to_types(self.others)
        if names == ("FIXED",):
            return None
        if fixes_some:
            raise McError(
                "others chooses the types that attn_type and attn_kv_type fix; give one or the other",
                parameter="others",
            )
        if not names:
            raise McError("give fixed, auto or names of types", parameter="others")
        return () if names == ("AUTO",) else names

    def plan(self, calibration: Calibration, file_bytes: FileBytes | None) -> Plan:
        """The plan for `calibration`; `file_bytes` gives the exact size of a file. Raises as plan() does."""
        return plan(
            calibration,
            self.budget,
            self.strategy_name,
            self.expert_types,
            self.fixed,
            self.seed,
            file_bytes,
            self.objective,
            self.other_types(calibration),
        )
