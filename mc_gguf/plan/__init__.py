"""Calibration and budget to Plan: the type of every expert. Pure: no torch, no files, no weights.

plan(calibration, Budget(bpw=2.5))                              # PMQ: one program for the whole model
plan(calibration, Budget(bits_per_layer=16), strategy="mc")     # the published allocation
"""

from __future__ import annotations

from mc_gguf.plan.objectives import OBJECTIVES
from mc_gguf.plan.planner import STRATEGIES, decides_attention, plan, stand_in
from mc_gguf.plan.problem import Budget, Experts, FileBytes, fixed_types

__all__ = [
    "OBJECTIVES",
    "STRATEGIES",
    "Budget",
    "Experts",
    "FileBytes",
    "decides_attention",
    "fixed_types",
    "plan",
    "stand_in",
]
