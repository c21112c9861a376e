"""Plan: the type of every expert and projection. Its file is JSON with one line per row of experts, sorted
and stable, so that it can be read and diffed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mc_gguf import __version__
from mc_gguf.artifacts.header import check_header, check_kind, why
from mc_gguf.artifacts.model import ALL_PROJECTIONS, whole_set
from mc_gguf.common.arguments import PathLike
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.common.files import atomic_write, sha256_of

PLAN_VERSION = 2
_EXPERTS = "experts_"  # before a projection: the key of its table


@dataclass(frozen=True)
class FixedTypes:
    """Types of the tensors that are not experts; the router and everything one-dimensional stay F32.

    K and V are small and every token depends on them, so they have more bits than Q, the attention's output
    matrix and the embeddings, which cost little at 6.6 bits.

    Attributes:
        attn_kv: type of K and V.
        attn: type of Q, the attention's output matrix and all other matrices.
        token_embd: type of the token embeddings.
        output: type of the output matrix.
        others: types by tensor, which override all of the above.
    """

    attn_kv: str = "Q8_0"
    attn: str = "Q6_K"
    token_embd: str = "Q6_K"
    output: str = "Q6_K"
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The type of every expert and projection, with what it was decided from and what it will cost.

    Attributes:
        strategy: how it was decided.
        budget: the limit, by name.
        layers: numbers of the layers with experts, ascending.
        experts: `experts[projection][i][expert]` is the name of a ggml type; i counts `layers`.
        fixed: types of all other tensors.
        types: the candidates.
        model_fingerprint: of the model; empty for published statistics.
        calibration_fingerprint: SHA-256 of the calibration file.
        expert_bpw: average bits per weight of the experts.
        expert_bytes: bytes of all experts.
        file_bytes: exact size of the file that the plan makes; None when the calibration does not know the
            model.
        predicted_error: squared output errors divided by squared outputs, each summed over the experts; None
            for published statistics.
        optimality_gap: relative gap that the solver proved; None where nothing was solved.
        seed: random seed of strategy random.
        bits: nominal bits of each expert (strategy mc only).
        objective: what was minimised.
        predicted_kld: in nats per token; None when the calibration did not measure it.
        layer_ratio: the objective relative to the best plan with one type per layer and projection in the
            same bytes (strategy pmq only).
        refinement: set by refine: mean KL divergences (nats per token) before and after, and the search's
            settings.
        tool: what made the plan, with its version.
        fingerprint: SHA-256 of the file.
    """

    strategy: str
    budget: dict[str, float]
    layers: tuple[int, ...]
    experts: dict[str, tuple[tuple[str, ...], ...]]
    fixed: FixedTypes
    types: tuple[str, ...]
    model_fingerprint: str
    calibration_fingerprint: str
    expert_bpw: float
    expert_bytes: int | None
    file_bytes: int | None
    predicted_error: float | None
    optimality_gap: float | None
    seed: int = 0
    bits: tuple[tuple[int, ...], ...] | None = None
    objective: str = "block"
    predicted_kld: float | None = None
    layer_ratio: float | None = None
    refinement: dict[str, float | str] | None = None
    tool: str = field(default=f"mc_gguf {__version__}")
    fingerprint: str = ""

    def type_of(self, layer: int, expert: int, projection: str) -> str:
        """The type of one expert's matrix; `layer` is the number of the layer in the model.

        Raises McError for an expert that the plan does not have.
        """
        rows = self.experts.get(projection, ())
        types = rows[self.layers.index(layer)] if rows and layer in self.layers else ()
        if not 0 <= expert < len(types):
            raise McError(f"the plan has no expert {expert} of {projection} in layer {layer}")
        return types[expert]

    def to_text(self) -> str:
        """The text of the file: sorted keys, one line per row of experts."""
        body = {k: v for k, v in asdict(self).items() if k not in ("fingerprint", "experts", "bits")}
        others = body["fixed"].pop("others")
        body |= {"format": "mc_gguf.plan", "version": PLAN_VERSION}
        rows: dict[str, Sequence[Sequence[object]]] = {
            f"{_EXPERTS}{p}": row for p, row in self.experts.items()
        }
        if self.bits is not None:
            rows["bits"] = self.bits
        if others:
            rows["others"] = [list(item) for item in others.items()]
        lines = [f'  "{key}": {json.dumps(body[key], sort_keys=True)}' for key in sorted(body)]
        for key in sorted(rows):
            table = ",\n".join(f"    {json.dumps(row)}" for row in rows[key])
            lines.append(f'  "{key}": [\n{table}\n  ]')
        return "{\n" + ",\n".join(sorted(lines)) + "\n}\n"

    def save(self, path: PathLike) -> Plan:
        """Write the file; returns this plan with `fingerprint` set to the file's SHA-256."""
        data = self.to_text().encode()
        with atomic_write(Path(path)) as file:
            file.write(data)
        return replace(self, fingerprint=hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        """Read a plan. Raises ArtifactError when it is damaged, of another version, or incomplete."""
        path = Path(path)
        check_kind(path, ("JSON",), "a plan", "plan")
        fingerprint = sha256_of(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            check_header(path, data, "mc_gguf.plan", PLAN_VERSION)
            data.pop("format")
            data.pop("version")
            names = [p for p in ALL_PROJECTIONS if f"{_EXPERTS}{p}" in data]
            experts = {p: tuple(tuple(row) for row in data.pop(f"{_EXPERTS}{p}")) for p in names}
            bits = data.pop("bits", None)
            others = {name: kind for name, kind in data.pop("others", ())}
            plan = cls(
                **{
                    **data,
                    "layers": tuple(data["layers"]),
                    "types": tuple(data["types"]),
                    "experts": experts,
                    "fixed": FixedTypes(**data["fixed"], others=others),
                    "fingerprint": fingerprint,
                    "bits": tuple(tuple(row) for row in bits) if bits is not None else None,
                }
            )
            _check_values(plan)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{path} is not a valid plan ({why(error)}); make one with: mc-gguf plan"
            ) from error
        _check_rows(path, plan)
        return plan


_KINDS: dict[str, Any] = {  # of the values of a plan
    **dict.fromkeys(("strategy", "model_fingerprint", "calibration_fingerprint", "objective", "tool"), str),
    **dict.fromkeys(("expert_bytes", "file_bytes"), int | None),
    **dict.fromkeys(
        ("predicted_error", "optimality_gap", "predicted_kld", "layer_ratio"), int | float | None
    ),
    **{"expert_bpw": int | float, "seed": int, "budget": dict, "refinement": dict | None},
}


def _check_values(plan: Plan) -> None:
    """Raises ValueError for a value that is of another kind than the table of Plan says."""
    for name, kind in _KINDS.items():
        if not isinstance(value := getattr(plan, name), kind):
            raise ValueError(f"{name} is {value!r}")
    fixed = asdict(plan.fixed)
    others = fixed.pop("others")
    for name, found in (
        ("types", plan.types),
        ("fixed", fixed.values()),
        ("others", [*others, *others.values()]),
    ):
        if not all(isinstance(kind, str) for kind in found):
            raise ValueError(f"{name} has a value that is no name of a type")
    if not all(isinstance(layer, int) and layer >= 0 for layer in plan.layers):
        raise ValueError("layers has a value that is no number of a layer")
    if not all(isinstance(number, int | float) for number in plan.budget.values()):
        raise ValueError(f"budget is {plan.budget!r}")


def _check_rows(path: Path, plan: Plan) -> None:
    """Raises ArtifactError unless every matrix of an expert has a table, and all tables are complete."""
    again = "make it again with: mc-gguf plan"
    wanted = whole_set(plan.experts)
    if missing := [f"{_EXPERTS}{p}" for p in wanted if p not in plan.experts]:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}; {again}")
    if not wanted:
        raise ArtifactError(f"{path}: no expert has {', '.join(plan.experts)} together; {again}")
    tables, n_layer = plan.experts.values(), len(plan.layers)
    rows = [row for table in tables for row in table]
    if any(len(table) != n_layer for table in tables) or not rows:
        raise ArtifactError(f"{path} needs one row of experts for each of its {n_layer} layers; {again}")
    if any(len(row) != len(rows[0]) or not all(isinstance(name, str) for name in row) for row in rows):
        raise ArtifactError(f"{path}: every row of experts needs {len(rows[0])} type names; {again}")
