"""Calibration + budget -> Plan: the type of every expert. One pure function; no torch, no files, no weights.

    plan(calibration, Budget(bpw=2.5))                              # PMQ: one program for the whole model
    plan(calibration, Budget(bits_per_layer=16), strategy="mc")     # the published allocation

PMQ minimises the sum of an objective (objectives.py) over all (layer, expert, projection) under one limit in
real bytes. Errors of projections are taken as additive: each was measured with everything else in full
precision. docs/allocation.md lists the strategies and what they are worth on the bundled model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mc_gguf.artifacts import NOMINAL_TYPES, PROJECTIONS, Calibration, FixedTypes, ModelInfo, Plan
from mc_gguf.common.errors import BudgetError, McError
from mc_gguf.common.units import format_size
from mc_gguf.ggml.types import ATTENTION_CANDIDATES, CANDIDATES, ggml_type
from mc_gguf.plan import attention as joint
from mc_gguf.plan import published, strategies
from mc_gguf.plan.objectives import DEFAULT_OBJECTIVES, OBJECTIVES
from mc_gguf.plan.problem import (
    Budget,
    Experts,
    FileBytes,
    Ints,
    Problem,
    build_problem,
    bytes_for_bpw,
    candidate_types,
    check_has_model,
    fixed_types,
    sixteen_bit_type,
)
from mc_gguf.plan.strategies import Limit

__all__ = ["OBJECTIVES", "STRATEGIES", "Budget", "Experts", "FileBytes", "fixed_types", "plan", "stand_in"]

# Published baselines: pmq's program, minimising what their authors measured (see the objectives).
BASELINES: tuple[str, ...] = ("bsp", "frequency", "routing-weight", "f-norm", "hessian")
STRATEGIES: tuple[str, ...] = ("pmq", "mc", "uniform", "layer", "random", "inverted", *BASELINES)


@dataclass(frozen=True, eq=False)
class _Decision:
    """What a strategy decided, with the figures of the plan that follow from it."""

    types: tuple[str, ...]
    experts: dict[str, tuple[tuple[str, ...], ...]]
    bpw: float
    n_byte: int | None
    predicted_error: float | None
    gap: float | None
    bits: tuple[tuple[int, ...], ...] | None = None
    predicted_kld: float | None = None
    layer_ratio: float | None = None
    attention: tuple[tuple[str, ...], ...] = ()


def plan(
    calibration: Calibration,
    budget: Budget,
    strategy: str = "pmq",
    types: Sequence[str] | None = None,
    fixed: FixedTypes = FixedTypes(),  # noqa: B008 - frozen
    seed: int = 0,
    file_bytes: FileBytes | None = None,
    objective: str | None = None,
    attention: Sequence[str] | None = None,
) -> Plan:
    """The type of every expert's projection under `budget`.

    `types` are the candidates (default: all that the calibration measured); strategy mc has its own.
    `objective` is what pmq, layer, random and inverted minimise (default: the best that the calibration has
    data for); mc and the baselines have their own.
    `file_bytes` gives the exact size of the file that an assignment makes with
    `fixed_types(calibration.model, budget, fixed)`; a size budget needs it, other budgets only report it.
    `attention`: types to choose from for every attention matrix, in the same bytes (empty: all that were
    measured; None: as `fixed` says).
    `seed` is for strategy random. Raises BudgetError (with the feasible range), McError for unknown
    strategies and types, ArtifactError.
    """
    _check_request(budget, strategy, types, fixed, objective)
    objective = _objective_of(strategy, objective, calibration)
    if budget.is_sixteen_bit:
        decided = _sixteen_bit(calibration)
    elif attention is not None:
        joint.check_request(budget, strategy, objective)
        decided = _with_attention(calibration, budget, strategy, types, fixed, file_bytes, attention)
    elif strategy == "mc":
        decided = _mc(calibration, budget, file_bytes)
    else:
        check_has_model(calibration)
        problem = build_problem(calibration, candidate_types(calibration, types), OBJECTIVES[objective])
        decided = _decide(problem, _limit(problem, budget, file_bytes), strategy, seed)
    has_size = file_bytes is not None and calibration.model is not None
    if decided.attention:
        fixed = replace(fixed, attention=decided.attention)
        file_bytes = partial(file_bytes, fixed=fixed) if file_bytes else None
    return Plan(
        strategy=strategy,
        budget=budget.to_json(),
        layers=calibration.layers,
        experts=decided.experts,
        fixed=fixed_types(calibration.model, budget, fixed),
        types=decided.types,
        model_fingerprint=calibration.model.fingerprint if calibration.model else "",
        calibration_fingerprint=calibration.fingerprint,
        expert_bpw=decided.bpw,
        expert_bytes=decided.n_byte,
        file_bytes=file_bytes(decided.experts) if file_bytes and has_size else None,
        predicted_error=decided.predicted_error,
        optimality_gap=decided.gap,
        seed=seed,
        bits=decided.bits,
        objective=objective,
        predicted_kld=decided.predicted_kld,
        layer_ratio=decided.layer_ratio,
    )


def decides_attention(calibration: Calibration, budget: Budget, strategy: str, objective: str | None) -> bool:
    """Whether plan() can decide the types of attention matrices, too, under this request."""
    return (
        budget.size_bytes is not None
        and strategy in joint.STRATEGIES
        and _objective_of(strategy, objective, calibration) == "kld"
        and calibration.has("attention_error")
    )


def stand_in(model: ModelInfo, types: Sequence[str] | None) -> Calibration:
    """A calibration of `model` with equal errors everywhere: what plan() refuses with it, it refuses with
    every calibration of these types."""
    wanted = [ggml_type(name).name for name in types or CANDIDATES]
    names = tuple(dict.fromkeys((*wanted, *NOMINAL_TYPES)))
    each = np.ones((len(model.expert_layers), model.n_expert))
    by_type = np.ones((*each.shape, len(PROJECTIONS), len(names)))
    attention_types, attention_error = joint.made_up(model, ATTENTION_CANDIDATES)
    statistics = {
        "frequency": each,
        "routing_weight": each,
        "output_sq": each,
        "nominal_error": np.ones((*each.shape, 3)),
        "kld_per_error": np.ones(len(each)),
        "block_score": np.ones(len(each)),
        "hessian_trace": np.ones((*each.shape, len(PROJECTIONS))),
        "sq_error": by_type,
        "relative_error": by_type,
        "weight_error": by_type,
    }
    if attention_error is not None:
        statistics["attention_error"] = attention_error
    return replace(
        Calibration.blank(model), types=names, statistics=statistics, attention_types=attention_types
    )


def _check_request(
    budget: Budget, strategy: str, types: Sequence[str] | None, fixed: FixedTypes, objective: str | None
) -> None:
    if strategy not in STRATEGIES:
        raise McError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    if objective is not None and objective not in OBJECTIVES:
        raise McError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    if objective is not None and (strategy == "mc" or strategy in BASELINES):
        raise McError(f"strategy {strategy} has its own objective; leave --objective away")
    if strategy == "mc" and types is not None:
        own = ", ".join(NOMINAL_TYPES)
        raise McError(f"strategy mc has its own types ({own}); leave --types away")
    if budget.bits_per_layer is not None and strategy != "mc":
        raise BudgetError(
            "--bits-per-layer counts nominal bits, which only strategy mc has; "
            f"give --bpw or --size for strategy {strategy}"
        )
    for name in (fixed.attn, fixed.attn_kv, fixed.token_embd, fixed.output):
        ggml_type(name)


def _objective_of(strategy: str, wanted: str | None, calibration: Calibration) -> str:
    if strategy == "mc":
        return "published"
    if strategy in BASELINES:
        return strategy
    return wanted or next((o for o, array in DEFAULT_OBJECTIVES if calibration.has(array)), "block")


def _decide(problem: Problem, limit: Limit, strategy: str, seed: int) -> _Decision:
    if strategy == "uniform":
        return _decision(problem, strategies.uniform(problem, limit), None)
    if strategy == "layer":
        return _decision(problem, *strategies.solve_program(strategies.layer_items(problem), limit))
    items = strategies.expert_items(problem)
    columns, gap = strategies.solve_program(items, limit)
    if strategy in ("random", "inverted"):
        control = (
            strategies.shuffled(columns, seed)
            if strategy == "random"
            else strategies.inverted(problem, columns)
        )
        # More groups in a layer can need larger headers than pmq's.
        return _decision(problem, items.columns(strategies.shrink(items, limit, control.reshape(-1))), None)
    ratio = strategies.ratio_to_layers(problem, limit, columns) if strategy == "pmq" else None
    return replace(_decision(problem, columns, gap), layer_ratio=ratio)


def _with_attention(
    calibration: Calibration,
    budget: Budget,
    strategy: str,
    types: Sequence[str] | None,
    fixed: FixedTypes,
    file_bytes: FileBytes | None,
    attention_types: Sequence[str],
) -> _Decision:
    """Attention matrices as further items of the program of pmq or layer."""
    check_has_model(calibration)
    problem = build_problem(calibration, candidate_types(calibration, types), OBJECTIVES["kld"])
    attention = joint.build_attention(calibration, attention_types)
    limit = _limit(problem, budget, file_bytes)
    assert file_bytes is not None  # _limit raised
    limit = joint.limit_of(limit, problem, attention, fixed, file_bytes)
    columns, choice, gap, ratio = joint.solve(problem, attention, limit, strategy)
    decided = _decision(problem, columns, gap)
    assert decided.predicted_kld is not None  # it is the objective
    kld = decided.predicted_kld + attention.predicted_kld(choice)
    return replace(decided, predicted_kld=kld, layer_ratio=ratio, attention=attention.rows(choice))


def _decision(problem: Problem, columns: Ints, gap: float | None, bits: Ints | None = None) -> _Decision:
    return _Decision(
        problem.candidates,
        problem.experts(columns),
        problem.bpw(columns),
        problem.expert_bytes(columns),
        problem.predicted_error(columns),
        gap,
        _rows(bits) if bits is not None else None,
        problem.predicted_kld(columns),
    )


def _rows(bits: Ints) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in bits.tolist())


def _mc(calibration: Calibration, budget: Budget, file_bytes: FileBytes | None) -> _Decision:
    """The published strategy; for a budget in real bytes the most nominal bits per layer that fit."""
    cost = published.published_cost(calibration)
    if calibration.model is None and budget.bits_per_layer is not None:
        return _published_decision(published.solve_layers(cost, budget.bits_per_layer))
    check_has_model(calibration)
    problem = build_problem(calibration, NOMINAL_TYPES)
    if budget.bits_per_layer is not None:
        bits = published.solve_layers(cost, budget.bits_per_layer)
        return _decision(problem, _nominal_columns(problem, bits), 0.0, bits)
    limit = _limit(problem, budget, file_bytes)
    low, high = (published.solve_layers(cost, n) for n in published.bits_range(cost.shape[1]))
    strategies.check_feasible(limit, _nominal_columns(problem, low), _nominal_columns(problem, high))
    for bits in published.solve_all(cost):
        columns = _nominal_columns(problem, bits)
        # The experts' bytes are quicker to add up than a file is to lay out.
        if problem.expert_bytes(columns) <= limit.limit and limit.room(columns) >= 0:
            break
    return _decision(problem, columns, 0.0, bits)


def _nominal_columns(problem: Problem, bits: Ints) -> Ints:
    """Columns [L, E, 3] of the types that stand for nominal bits [L, E], or of a projection's fallback."""
    columns = np.repeat(bits[..., None] - 1, len(PROJECTIONS), axis=-1)
    for p, size in enumerate(problem.size):
        if not size[0]:
            columns[..., p] = int(size.argmax())
    return columns


def _published_decision(bits: Ints) -> _Decision:
    """From published statistics: no model, so types and rates by name only."""
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
    n_weight = sum(rows * cols for rows, cols in map(model.expert_shape, PROJECTIONS))
    n_byte = 2 * n_weight * calibration.n_expert * len(calibration.layers)
    return _Decision((name,), dict.fromkeys(PROJECTIONS, table), ggml_type(name).bpw, n_byte, 0.0, 0.0)


def _limit(problem: Problem, budget: Budget, file_bytes: FileBytes | None) -> Limit:
    if budget.bpw is not None:

        def in_bpw(size: int) -> str:
            return f"{8 * size / problem.n_weight:.4f} bpw"

        return Limit(bytes_for_bpw(problem, budget.bpw), problem.expert_bytes, 0, "bpw budget", in_bpw)
    if file_bytes is None or budget.size_bytes is None:
        raise BudgetError("a size budget needs file_bytes, the function that gives the size of the file")
    of_file = file_bytes

    def in_bytes(size: int) -> str:
        return f"{size} bytes ({format_size(size)})"

    # A group more or less: its header and padding; at most the map of the layer's experts comes or goes too.
    wobble = 1024 + 8 * problem.n_expert

    def of_columns(columns: Ints) -> int:
        return of_file(problem.experts(columns))

    return Limit(budget.size_bytes, of_columns, wobble, "file size", in_bytes)
