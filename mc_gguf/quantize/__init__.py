"""Weights to ggml types: the kernels (ggml's own), and a plan carried out into a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mc_gguf.quantize.kernels import dequantize_rows, init, quantize_rows

if TYPE_CHECKING:
    from mc_gguf.quantize.output import find_calibration, quantize

__all__ = ["dequantize_rows", "find_calibration", "init", "quantize", "quantize_rows"]


def __getattr__(name: str) -> Any:
    if name in ("find_calibration", "quantize"):  # output.py imports container, which the kernels do not need
        from mc_gguf.quantize import output

        return getattr(output, name)
    raise AttributeError(f"module 'mc_gguf.quantize' has no attribute {name!r}")
