"""Which files belong together: a plan, the calibration that it was made from, and the model of both."""

from __future__ import annotations

import json
from pathlib import Path

from mc_gguf.artifacts.calibration import NO_CALIBRATION, Calibration
from mc_gguf.artifacts.model import ModelInfo
from mc_gguf.artifacts.plan import Plan
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import sha256_of


def find_calibration(plan: Plan, folder: Path, given: Path | None = None) -> Calibration | None:
    """The calibration that `plan` needs: the given file, else the one in `folder` with the plan's
    fingerprint.

    Only calibrations of the plan's own model are hashed: the folder may hold 90 GB of other safetensors.
    None when the plan needs none (16 bits) or comes from published statistics, which have no importance
    matrices. Raises ArtifactError when there is no such file, or it cannot be read.
    """
    if given is not None:
        return Calibration.load(given)
    if plan.calibration_fingerprint == NO_CALIBRATION or not plan.model_fingerprint:
        return None
    for path in possible_calibrations(folder):
        is_candidate = calibrated_model(path) == plan.model_fingerprint
        if is_candidate and sha256_of(path) == plan.calibration_fingerprint:
            return Calibration.load(path)
    raise ArtifactError(
        f"no *.safetensors in {folder} is the plan's calibration ({plan.calibration_fingerprint[:12]}...); "
        "give the file that it is in",
        parameter="calibration",
    )


def possible_calibrations(folder: Path) -> list[Path]:
    """The files in which find_calibration() looks for the calibration of a plan in `folder`."""
    return sorted(folder.glob("*.safetensors"))


def calibrated_model(path: Path) -> str | None:
    """The fingerprint of the model that a calibration file is of; None for any other file. Reads the header
    alone.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as reader:
            header = json.loads((reader.metadata() or {}).get("mc_gguf", "{}"))
        if header["format"] != "mc_gguf.calibration":
            return None
        fingerprint: str = header["model"]["fingerprint"]
        return fingerprint
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def check_inputs(model: ModelInfo, calibration: Calibration | None, plan: Plan) -> None:
    """Raises ArtifactError unless `plan` and `calibration` are of `model`, and the plan was made from this
    calibration. Published statistics are of no model in particular; a plan from them fits every model of its
    shape.
    """
    published = not plan.model_fingerprint
    if not published and plan.model_fingerprint != model.fingerprint:
        raise ArtifactError("the plan was made for another model than this source; run: mc-gguf plan")
    if plan.layers != model.expert_layers:
        raise ArtifactError(
            f"the plan covers {len(plan.layers)} layers, the model has experts in "
            f"{len(model.expert_layers)}; run: mc-gguf plan"
        )
    if not plan.fingerprint:
        raise ArtifactError("the plan has no fingerprint: save it before quantizing")
    if calibration is None:
        return
    if calibration.model is None:
        raise ArtifactError("published statistics have no importance matrices; run: mc-gguf calibrate")
    if calibration.model.fingerprint != model.fingerprint:
        raise ArtifactError(
            "the calibration was made with another model than this source; run: mc-gguf calibrate"
        )
    if not published and calibration.fingerprint != plan.calibration_fingerprint:
        raise ArtifactError(
            "the plan was made from another calibration file; give that one or run: mc-gguf plan"
        )
