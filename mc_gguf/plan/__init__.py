"""Calibration and budget to Plan: the type of every expert. Pure: no torch, no files, no weights.

    plan(calibration, Budget(bpw=2.5))                              # PMQ: one program for the whole model
    plan(calibration, Budget(bits_per_layer=16), strategy="mc")     # the published allocation

- planner.py     plan(): checks, strategy, Plan      - strategies.py  the strategies and their table
- objectives.py  what is minimised                   - problem.py     bytes and errors of every choice
- program.py     items within an exact limit         - solver.py      the multiple-choice knapsack
- others.py      other matrices as items             - published.py   the dynamic program of strategy mc
- summary.py     what a plan amounts to              - request.py     what a user asks of a plan
- proposals.py   sizes, where no budget was given
"""

from __future__ import annotations

from mc_gguf.plan.objectives import OBJECTIVES
from mc_gguf.plan.planner import decides_others, plan, stand_in
from mc_gguf.plan.problem import Budget, Experts, FileBytes, fixed_types
from mc_gguf.plan.request import PlanRequest
from mc_gguf.plan.strategies import STRATEGIES, Strategy

__all__ = [
    "OBJECTIVES",
    "STRATEGIES",
    "Budget",
    "Experts",
    "FileBytes",
    "PlanRequest",
    "Strategy",
    "decides_others",
    "fixed_types",
    "plan",
    "stand_in",
]
