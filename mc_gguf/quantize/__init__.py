"""Weights to ggml types: the kernels (ggml's own), and a plan carried out into a file."""

from __future__ import annotations

from mc_gguf.quantize.kernels import dequantize_rows, init, quantize_rows

__all__ = ["dequantize_rows", "init", "quantize_rows"]
