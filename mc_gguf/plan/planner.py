"""plan(): the request is checked, a strategy decides, and a Plan says what was decided.

PMQ minimises the sum of an objective (objectives.py) over all (layer, expert, projection) under one limit
in real bytes. The errors of projections are taken as additive: each was measured with everything else in
full precision. docs/explanation/allocation.md lists the strategies and what they are worth on the bundled
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mc_gguf.artifacts import NOMINAL_TYPES, PROJECTIONS, Calibration, FixedTypes, ModelInfo, Plan
from mc_gguf.common.errors import BudgetError, McError
from mc_gguf.ggml.types import CANDIDATES, MATRIX_CANDIDATES, ggml_type
from mc_gguf.plan import published
from mc_gguf.plan.objectives import DEFAULT_OBJECTIVES, OBJECTIVES
from mc_gguf.plan.others import build_others, make_up_errors
from mc_gguf.plan.problem import (
    Budget,
    FileBytes,
    Ints,
    build_problem,
    candidate_types,
    check_has_model,
    fixed_types,
    limited,
    sixteen_bit_type,
)
from mc_gguf.plan.strategies import STRATEGIES, Choice, Strategy, Task


@dataclass(frozen=True, eq=False)
class _Decision:
    """The types that were decided, with the figures that follow from them, named as in Plan.

    `others` is FixedTypes.others where the strategy decided it, else empty.
    """

    types: tuple[str, ...]
    experts: dict[str, tuple[tuple[str, ...], ...]]
    expert_bpw: float
    expert_bytes: int | None
    predicted_error: float | None
    optimality_gap: float | None
    bits: tuple[tuple[int, ...], ...] | None = None
    predicted_kld: float | None = None
    layer_ratio: float | None = None
    others: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The fields that a Plan has, too."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "others"}


def plan(
    calibration: Calibration,
    budget: Budget,
    strategy: str = "pmq",
    types: Sequence[str] | None = None,
    fixed: FixedTypes = FixedTypes(),
    seed: int = 0,
    file_bytes: FileBytes | None = None,
    objective: str | None = None,
    others: Sequence[str] | None = None,
) -> Plan:
    """Decide the type of every expert's projection under `budget`.

    Args:
        calibration: what was measured; published statistics serve strategy mc with nominal bits only.
        budget: one limit: bits per weight, bytes of the file, or nominal bits per layer.
        strategy: a name in STRATEGIES.
        types: candidates (default: all that the calibration measured). Strategy mc has its own.
        fixed: types of the tensors that the plan does not decide.
        seed: random seed of strategy random.
        file_bytes: gives the exact size of a file. A size budget needs it; with others it is only reported.
        objective: a name in OBJECTIVES (default: the best one that the calibration has data for). Strategy mc
            and the published baselines have their own.
        others: types to choose from for every other matrix, within the same bytes. Empty: all that were
            measured. None: they have the types that `fixed` says.

    Raises:
        BudgetError: the budget cannot be met; the message gives the feasible range.
        McError: a strategy, an objective or a type is unknown, or they do not go together.
        ArtifactError: the calibration lacks what the strategy or the objective needs.
    """
    chosen = _check_request(budget, strategy, types, fixed, objective)
    objective = _objective_of(chosen, objective, calibration)
    fixed = fixed_types(calibration.model, budget, fixed)
    if budget.is_sixteen_bit:
        decided = _sixteen_bit(calibration)
    elif calibration.model is None and chosen.takes_nominal_bits and budget.bits_per_layer is not None:
        decided = _from_published_statistics(calibration, budget.bits_per_layer)
    else:
        decided = _solve(calibration, budget, chosen, types, fixed, seed, file_bytes, objective, others)
    return _assemble(calibration, budget, strategy, objective, fixed, seed, file_bytes, decided)


def _assemble(
    calibration: Calibration,
    budget: Budget,
    strategy: str,
    objective: str,
    fixed: FixedTypes,
    seed: int,
    file_bytes: FileBytes | None,
    decided: _Decision,
) -> Plan:
    """The Plan that says what was decided, and from what."""
    model = calibration.model
    if decided.others:
        fixed = replace(fixed, others=decided.others)
    return Plan(
        strategy=strategy,
        budget=budget.to_json(),
        layers=calibration.layers,
        fixed=fixed,
        model_fingerprint=model.fingerprint if model else "",
        calibration_fingerprint=calibration.fingerprint,
        file_bytes=file_bytes(decided.experts, fixed) if file_bytes and model else None,
        seed=seed,
        objective=objective,
        **decided.figures(),
    )


def _solve(
    calibration: Calibration,
    budget: Budget,
    strategy: Strategy,
    types: Sequence[str] | None,
    fixed: FixedTypes,
    seed: int,
    file_bytes: FileBytes | None,
    objective: str,
    others: Sequence[str] | None,
) -> _Decision:
    """What `strategy` decides for a calibration of a model."""
    if others is not None:
        _check_others(budget, strategy, objective)
    check_has_model(calibration)
    candidates = strategy.types or candidate_types(calibration, types)
    problem = build_problem(calibration, candidates, OBJECTIVES[objective])
    if strategy.mixes:
        problem = limited(problem)
    matrices = build_others(calibration, others) if others is not None else None
    task = Task(calibration, budget, problem, fixed, file_bytes, matrices, seed)
    return _decision(task, strategy.decide(task))


def decides_others(calibration: Calibration, budget: Budget, strategy: str, objective: str | None) -> bool:
    """Whether plan() can decide the types of other matrices, too, under this request."""
    chosen = STRATEGIES.get(strategy)
    return (
        budget.size_bytes is not None
        and chosen is not None
        and chosen.takes_others
        and _objective_of(chosen, objective, calibration) == "kld"
        and calibration.has("matrix_error", "matrix_price")
        and len(calibration.matrices) > 0
    )


def stand_in(model: ModelInfo, types: Sequence[str] | None) -> Calibration:
    """A calibration of `model` with equal errors everywhere.

    What plan() refuses with it, it refuses with every calibration of these types, so a request can be checked
    before the model is calibrated.
    """
    wanted = [ggml_type(name).name for name in types or CANDIDATES]
    names = tuple(dict.fromkeys((*wanted, *NOMINAL_TYPES)))
    each = np.ones((len(model.expert_layers), model.n_expert))
    n_projection = len(model.projections)
    by_type = np.ones((*each.shape, n_projection, len(names)))
    matrices, matrix_types, matrix_error = make_up_errors(model, MATRIX_CANDIDATES)
    statistics = {
        "frequency": each,
        "routing_weight": each,
        "output_sq": each,
        "nominal_error": np.ones((*each.shape, 3)),
        "kld_per_error": np.ones(len(each)),
        "block_score": np.ones(len(each)),
        "hessian_trace": np.ones((*each.shape, n_projection)),
        "sq_error": by_type,
        "relative_error": by_type,
        "weight_error": by_type,
    }
    if matrix_error.size:
        statistics |= {"matrix_error": matrix_error, "matrix_price": np.ones(len(matrices))}
    else:
        matrices = matrix_types = ()
    return replace(
        Calibration.blank(model),
        types=names,
        statistics=statistics,
        matrices=matrices,
        matrix_types=matrix_types,
    )


def _check_request(
    budget: Budget, strategy: str, types: Sequence[str] | None, fixed: FixedTypes, objective: str | None
) -> Strategy:
    """The strategy of this name, if what was asked for goes together."""
    chosen = STRATEGIES.get(strategy)
    if chosen is None:
        known = "; ".join(f"{name} ({entry.meaning})" for name, entry in STRATEGIES.items())
        raise McError(f"unknown strategy {strategy!r}; known: {known}", parameter="strategy")
    if objective is not None and objective not in OBJECTIVES:
        raise McError(
            f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}", parameter="objective"
        )
    if objective is not None and chosen.objective is not None:
        raise McError(f"strategy {strategy} has its own objective; do not give one", parameter="objective")
    if types is not None and chosen.types:
        raise McError(
            f"strategy {strategy} has its own types ({', '.join(chosen.types)}); do not give any",
            parameter="types",
        )
    if budget.bits_per_layer is not None and not chosen.takes_nominal_bits:
        raise BudgetError(
            "bits_per_layer counts nominal bits, which only strategy "
            f"{_names(lambda s: s.takes_nominal_bits)} has; give {strategy} a budget in bpw or bytes",
            parameter="bits_per_layer",
        )
    for parameter, name in _fixed_parameters(fixed).items():
        if ggml_type(name).needs_imatrix:
            raise McError(
                f"{name} needs an importance matrix, which these tensors have not; choose a larger type",
                parameter=parameter,
            )
    return chosen


def _fixed_parameters(fixed: FixedTypes) -> dict[str, str]:
    """The types of `fixed` by the parameters that set them."""
    return {
        "attn_type": fixed.attn,
        "attn_kv_type": fixed.attn_kv,
        "embd_type": fixed.token_embd,
        "output_type": fixed.output,
    }


def _check_others(budget: Budget, strategy: Strategy, objective: str) -> None:
    """Refuse a request whose program other matrices cannot be part of."""
    if budget.size_bytes is None:
        raise BudgetError(
            "the types of other matrices can only be decided within a budget for the size of the whole file",
            parameter="others",
        )
    if not strategy.takes_others or objective != "kld":
        raise McError(
            f"the types of other matrices can only be decided by strategy {_names(lambda s: s.takes_others)} "
            "with objective kld, of a calibration that measured them, not by "
            f"{strategy.name} with {objective}; leave others fixed",
            parameter="others",
        )


def _names(is_meant: Callable[[Strategy], bool]) -> str:
    return " or ".join(strategy.name for strategy in STRATEGIES.values() if is_meant(strategy))


def _objective_of(strategy: Strategy, wanted: str | None, calibration: Calibration) -> str:
    if strategy.objective is not None:
        return strategy.objective
    return wanted or next((o for o, array in DEFAULT_OBJECTIVES if calibration.has(array)), "block")


def _decision(task: Task, choice: Choice) -> _Decision:
    problem, columns = task.problem, choice.columns
    predicted_kld = problem.predicted_kld(columns)
    others: dict[str, str] = {}
    if task.others is not None and choice.others is not None:
        assert predicted_kld is not None  # it is the objective
        predicted_kld += task.others.predicted_kld(choice.others)
        others = task.others.named(choice.others)
    return _Decision(
        problem.candidates,
        problem.experts(columns),
        problem.bpw(columns),
        problem.expert_bytes(columns),
        problem.predicted_error(columns),
        choice.gap,
        _rows(choice.bits) if choice.bits is not None else None,
        predicted_kld,
        choice.layer_ratio,
        others,
    )


def _rows(bits: Ints) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in bits.tolist())


def _from_published_statistics(calibration: Calibration, bits_per_layer: int) -> _Decision:
    """Strategy mc without a model: types and rates by name only, no sizes."""
    bits = published.solve_layers(published.published_cost(calibration), bits_per_layer)
    names = np.array(NOMINAL_TYPES, dtype=object)[bits - 1].tolist()
    rows = tuple(tuple(row) for row in names)
    rates = np.array([ggml_type(name).bpw for name in NOMINAL_TYPES])
    bpw = float(rates[bits - 1].mean())
    experts = dict.fromkeys(PROJECTIONS, rows)
    return _Decision(NOMINAL_TYPES, experts, bpw, None, None, 0.0, _rows(bits))


def _sixteen_bit(calibration: Calibration) -> _Decision:
    """A plain 16-bit file: every expert in the source's own type."""
    model = check_has_model(calibration)
    name = sixteen_bit_type(model)
    table = ((name,) * calibration.n_expert,) * len(calibration.layers)
    experts = dict.fromkeys(model.projections, table)
    return _Decision((name,), experts, ggml_type(name).bpw, 2 * model.n_expert_weight, 0.0, 0.0)
