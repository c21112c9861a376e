"""mc_gguf: mixed-expert GGUF files for Mixture-of-Experts models, made and run.

    from mc_gguf import convert        # a model and a size in, a mixed-expert GGUF out
    from mc_gguf import Llama          # a llama_cpp.Llama on the patched runtime
    from mc_gguf import Routing        # which experts a token may do without while the model runs

Importing the package is instant: each name loads its module on first use, and only the modules that need
torch, llama_cpp or numpy import them. The steps of convert() are functions of their own: calibrate, refine
and quantize, each in the package of its name, and make_plan. evaluate, in its package, measures the result.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Llama",
    "MixedGguf",
    "Plan",
    "PlanRequest",
    "Routing",
    "__version__",
    "convert",
    "make_plan",
]

if TYPE_CHECKING:
    from mc_gguf.artifacts import Calibration, Plan
    from mc_gguf.container import MixedGguf
    from mc_gguf.pipeline import convert, make_plan
    from mc_gguf.plan import PlanRequest
    from mc_gguf.routing import Routing
    from mc_gguf.run.llama import Llama

_MODULES = {
    "Calibration": "mc_gguf.artifacts",
    "Llama": "mc_gguf.run.llama",
    "MixedGguf": "mc_gguf.container",
    "Plan": "mc_gguf.artifacts",
    "PlanRequest": "mc_gguf.plan",
    "Routing": "mc_gguf.routing",
    "convert": "mc_gguf.pipeline",
    "make_plan": "mc_gguf.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mc_gguf' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
