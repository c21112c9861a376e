"""mc_gguf: mixed-expert GGUF files for Mixture-of-Experts models, made and run.

    from mc_gguf import Llama          # a llama_cpp.Llama on the patched runtime
    from mc_gguf import Routing        # what it may do without: dynamic expert routing

Importing the package is cheap: torch, llama_cpp and gguf are loaded by what needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Llama", "Routing", "__version__"]

if TYPE_CHECKING:
    from mc_gguf.routing import Routing
    from mc_gguf.run.llama import Llama


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from mc_gguf.run.llama import Llama

        return Llama
    if name == "Routing":
        from mc_gguf.routing import Routing

        return Routing
    raise AttributeError(f"module 'mc_gguf' has no attribute {name!r}")
