"""The files that pass between the steps, and what they say of the model: ModelInfo, Calibration, Plan.

    calibrate -> Calibration (safetensors) -> plan -> Plan (JSON) -> quantize

Both carry a format version and the fingerprints of what they were made from. They are written to a temporary
name and renamed.
"""

from __future__ import annotations

from mc_gguf.artifacts.calibration import NO_CALIBRATION, Calibration
from mc_gguf.artifacts.model import ATTENTION, PROJECTIONS, Floats, ModelInfo, TensorSpec, expert_tensor_name
from mc_gguf.artifacts.plan import FixedTypes, Plan

__all__ = [
    "ATTENTION",
    "NO_CALIBRATION",
    "PROJECTIONS",
    "Calibration",
    "FixedTypes",
    "Floats",
    "ModelInfo",
    "Plan",
    "TensorSpec",
    "expert_tensor_name",
]
