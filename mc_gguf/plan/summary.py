"""What a plan amounts to, for people and for programs. plan and convert print it before they write."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from mc_gguf.artifacts import FixedTypes, Plan
from mc_gguf.common.units import format_size
from mc_gguf.ggml.types import ggml_type

# Going per expert hardly pays above this share of the error of a plan per layer and projection.
PAYS = 0.95


@dataclass(frozen=True)
class PlanSummary:
    """Figures of a plan.

    `type_counts[projection][type]` counts experts, the smallest type first; `other_counts[type]`
    counts other matrices and is empty unless the plan decided them. `predicted_kld` is in nats per token.
    """

    strategy: str
    budget: dict[str, float]
    n_layer: int
    n_expert: int
    file_bytes: int | None
    expert_bytes: int | None
    expert_bpw: float
    type_counts: dict[str, dict[str, int]]
    fixed: FixedTypes
    objective: str
    predicted_error: float | None
    predicted_kld: float | None
    layer_ratio: float | None
    optimality_gap: float | None
    notes: tuple[str, ...]
    other_counts: dict[str, int]
    refinement: dict[str, float | str] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary as text, one fact per line."""
        rows = [("plan", f"{self.strategy}, objective {self.objective}, budget {_budget(self.budget)}")]
        if self.file_bytes is not None:
            rows.append(("file size", f"{self.file_bytes:,} bytes ({format_size(self.file_bytes)})"))
        if self.expert_bytes is not None:
            rows.append(("experts", f"{self.expert_bytes:,} bytes ({format_size(self.expert_bytes)})"))
        rows.append(("bits", f"{self.expert_bpw:.4f} per expert weight"))
        rows.append(("layers", f"{self.n_layer} of {self.n_expert} experts"))
        for projection, counts in self.type_counts.items():
            rows.append((projection, _listed(counts)))
        if self.other_counts:
            rows.append(("other matrices", _listed(self.other_counts)))
        fixed = {name: kind for name, kind in asdict(self.fixed).items() if name != "others"}
        rows.append(("fixed", ", ".join(f"{name} {kind}" for name, kind in fixed.items())))
        if self.predicted_error is not None:
            error = f"{100 * self.predicted_error:.4g} % of the experts' output energy"
            rows.append(("predicted error", error))
        if self.predicted_kld is not None:
            rows.append(("predicted KLD", f"{self.predicted_kld:.4g} nats per token"))
        if self.layer_ratio is not None:
            rows.append(("per expert", _worth(self.layer_ratio)))
        if self.optimality_gap is not None:
            rows.append(("optimality gap", f"at most {100 * self.optimality_gap:.2g} %"))
        if self.refinement is not None:
            rows.append(("refined", _refined(self.refinement)))
        rows += [("note", note) for note in self.notes]
        return [f"{name:<16}{text}" for name, text in rows]


def summarize_plan(plan: Plan) -> PlanSummary:
    """The figures of `plan`. All of them are in the plan; nothing is estimated anew."""
    counts = {p: _counts(plan, p) for p in plan.experts}
    return PlanSummary(
        plan.strategy,
        plan.budget,
        len(plan.layers),
        len(plan.experts["down"][0]),
        plan.file_bytes,
        plan.expert_bytes,
        plan.expert_bpw,
        counts,
        plan.fixed,
        plan.objective,
        plan.predicted_error,
        plan.predicted_kld,
        plan.layer_ratio,
        plan.optimality_gap,
        _notes(plan, counts),
        _by_size(Counter(plan.fixed.others.values())),
        plan.refinement,
    )


def _counts(plan: Plan, projection: str) -> dict[str, int]:
    return _by_size(Counter(name for row in plan.experts[projection] for name in row))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def _by_size(found: Counter[str]) -> dict[str, int]:
    return {name: found[name] for name in sorted(found, key=lambda name: (ggml_type(name).bpw, name))}


def _notes(plan: Plan, counts: dict[str, dict[str, int]]) -> tuple[str, ...]:
    notes = [
        f"{p}: its rows fit none of {', '.join(plan.types)}, so all of its experts get {', '.join(found)}; "
        "the prediction does not include that error"
        for p, found in counts.items()
        if not set(found) & set(plan.types)
    ]
    if not plan.model_fingerprint:
        notes.append("published statistics belong to no model file, so no file can be made from this plan")
    return tuple(notes)


def _worth(ratio: float) -> str:
    """Says whether going per expert pays on this model at this size."""
    text = f"{ratio:.2f} of the error of one type per layer and projection"
    return f"{text}: strategy layer, which stock llama.cpp runs, is nearly as good" if ratio > PAYS else text


def _refined(refinement: dict[str, float | str]) -> str:
    """What refinement won."""
    start, end = refinement["held_out_start"], refinement["held_out_kld"]
    return f"KL divergence on held-out text {start:.4f} -> {end:.4f} nats per token"


def _budget(budget: dict[str, float]) -> str:
    ((name, value),) = budget.items()
    if name == "size_bytes":
        return f"{int(value):,} bytes ({format_size(int(value))})"
    return f"{value:g} {'bpw' if name == 'bpw' else 'nominal bits per layer'}"
