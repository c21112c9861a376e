"""The optional dependencies of pyproject.toml, checked by the functions that need them.

`pip install mc-gguf` brings what running a file needs; `mc-gguf[convert]` brings what making one needs.
"""

from __future__ import annotations

import importlib.util

from mc_gguf.common.errors import MissingExtraError

# Modules that each extra brings, the one that is missed first in front.
EXTRAS = {
    "convert": ("torch", "transformers", "scipy", "sentencepiece"),
    "tasks": ("lm_eval",),
    "plot": ("matplotlib",),
}


def require_extra(extra: str, *modules: str) -> None:
    """Raises MissingExtraError unless `modules` (by default all that `extra` brings) can be imported."""
    for module in modules or EXTRAS[extra]:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                f"this needs {module}, which is not installed; run: pip install 'mc-gguf[{extra}]'"
            )
