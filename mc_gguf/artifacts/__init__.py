"""The files that pass between the steps, and what they say of the model: ModelInfo, Calibration, Plan.

    calibrate -> Calibration (safetensors) -> plan -> Plan (JSON) -> quantize

Both files carry a format version and the fingerprints of what they were made from. They are written under a
temporary name and then renamed.
"""

from __future__ import annotations

from mc_gguf.artifacts.calibration import NO_CALIBRATION, Calibration
from mc_gguf.artifacts.model import (
    ALL_PROJECTIONS,
    ATTENTION,
    EXPERT_STACK,
    PROJECTIONS,
    Floats,
    ModelInfo,
    TensorSpec,
    expert_tensor_name,
    whole_set,
)
from mc_gguf.artifacts.plan import FixedTypes, Plan
from mc_gguf.artifacts.published import NOMINAL_BITS, NOMINAL_TYPES
from mc_gguf.artifacts.statistics import Statistic, Statistics

__all__ = [
    "ALL_PROJECTIONS",
    "ATTENTION",
    "EXPERT_STACK",
    "NOMINAL_BITS",
    "NOMINAL_TYPES",
    "NO_CALIBRATION",
    "PROJECTIONS",
    "Calibration",
    "FixedTypes",
    "Floats",
    "ModelInfo",
    "Plan",
    "Statistic",
    "Statistics",
    "TensorSpec",
    "expert_tensor_name",
    "whole_set",
]
