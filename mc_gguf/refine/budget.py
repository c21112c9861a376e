"""A plan's budget as a limit on what refinement may choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from mc_gguf.artifacts import PROJECTIONS, Calibration, Plan
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.container import file_bytes
from mc_gguf.plan.problem import Budget, Ints, Problem, build_problem, bytes_for_bpw, candidate_types, limited
from mc_gguf.routing.metadata import routing_metadata_from


@dataclass(frozen=True, eq=False)
class Scope:
    """What may be chosen: columns [L, E, 3] of `problem` of at most `limit` bytes, as `measure` counts
    them.
    """

    problem: Problem
    limit: int
    measure: Callable[[Ints], int]
    file_bytes: Callable[[Ints], int]

    def fits(self, columns: Ints) -> bool:
        return self.measure(columns) <= self.limit

    def capacity(self, columns: Ints) -> int:
        """Bytes that are left for the experts' matrices when headers take what they take with `columns`."""
        return self.limit - (self.measure(columns) - self.problem.expert_bytes(columns))


def scope_of(plan: Plan, calibration: Calibration) -> tuple[Scope, Ints]:
    """The scope of `plan`, and its own columns [L, E, 3].

    Raises ArtifactError when plan and calibration do not belong together, McError for a plan in which there
    is nothing to choose.
    """
    if calibration.model is None or plan.calibration_fingerprint != calibration.fingerprint:
        raise ArtifactError("the plan was made from another calibration; give the one that it was made from")
    budget = Budget(**plan.budget)  # type: ignore[arg-type]
    if budget.is_sixteen_bit:
        raise McError("a 16-bit plan has nothing to refine; make a plan with fewer bits")
    problem = build_problem(calibration, candidate_types(calibration, plan.types))
    columns = _columns(plan, problem)
    problem = limited(problem, columns)
    routing = routing_metadata_from(calibration)
    of_experts = partial(file_bytes, calibration.model, fixed=plan.fixed, routing=routing)

    def of_file(columns: Ints) -> int:
        return of_experts(problem.experts(columns))

    if budget.size_bytes is not None:
        scope = Scope(problem, budget.size_bytes, of_file, of_file)
    elif budget.bpw is not None:
        scope = Scope(problem, bytes_for_bpw(problem, budget.bpw), problem.expert_bytes, of_file)
    else:  # nominal bits: the real bytes that the plan takes
        scope = Scope(problem, problem.expert_bytes(columns), problem.expert_bytes, of_file)
    if not scope.fits(columns):
        raise ArtifactError("the plan is larger than its own budget; make it again with: mc-gguf plan")
    return scope, columns


def _columns(plan: Plan, problem: Problem) -> Ints:
    known = {name: i for i, name in enumerate(problem.types)}
    names = [plan.experts[p] for p in PROJECTIONS]
    if missing := sorted({n for table in names for row in table for n in row} - known.keys()):
        raise ArtifactError(f"the plan uses {', '.join(missing)}, which its calibration did not measure")
    columns = [[[known[n] for n in row] for row in table] for table in names]
    return np.array(columns, dtype=np.int64).transpose(1, 2, 0)
