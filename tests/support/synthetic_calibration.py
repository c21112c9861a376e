"""Calibrations made up for the tests of planning: errors that look like measured ones, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mc_gguf.artifacts import ATTENTION, PROJECTIONS, Calibration, ModelInfo, TensorSpec, expert_tensor_name
from mc_gguf.ggml.types import CANDIDATES
from tools.common import RELATIVE_ERROR


def model_info(
    n_layer: int = 6, n_expert: int = 8, n_embd: int = 256, n_ff: int = 256, type_name: str = "BF16"
) -> ModelInfo:
    """A Mixtral-like model: embeddings, output, attention, router and expert stacks."""
    tensors = [TensorSpec("token_embd.weight", (n_embd, 4096), type_name)]
    for layer in range(n_layer):
        block = f"blk.{layer}"
        tensors += [
            TensorSpec(f"{block}.attn_{x}.weight", (n_embd, n_embd), type_name) for x in ("q", "output")
        ]
        tensors += [TensorSpec(f"{block}.attn_{x}.weight", (n_embd, n_embd // 2), type_name) for x in "kv"]
        tensors += [TensorSpec(f"{block}.ffn_gate_inp.weight", (n_embd, n_expert), "F32")]
        tensors += [TensorSpec(f"{block}.{x}_norm.weight", (n_embd,), "F32") for x in ("attn", "ffn")]
        for p in PROJECTIONS:
            shape = (n_ff, n_embd, n_expert) if p == "down" else (n_embd, n_ff, n_expert)
            tensors.append(TensorSpec(expert_tensor_name(layer, p), shape, type_name))
    tensors += [
        TensorSpec("output_norm.weight", (n_embd,), "F32"),
        TensorSpec("output.weight", (n_embd, 4096), type_name),
    ]
    kv_bytes, n_kv = 50_000, 30
    return ModelInfo("llama", n_layer, n_expert, 2, n_embd, n_ff, "5" * 64, kv_bytes, n_kv, tuple(tensors))


def synthetic_routing(n_layer: int, n_rank: int = 2, n_quantile: int = 101) -> dict[str, Any]:
    """The routing arrays of a Calibration, shaped like measured ones: the last layers are sensitive."""
    q = np.linspace(0, 1, n_quantile)
    power, rank = np.linspace(1, 2, n_layer)[:, None, None], np.arange(1, n_rank)[:, None]
    return {
        "ratio_quantiles": q**power / rank,
        "routing_sensitivity": 1e-3 * np.linspace(1, 2, n_layer) ** 3,
        "routing_curve": (2 * q) ** np.linspace(2, 3, n_layer)[:, None],
    }


def calibration(
    n_layer: int = 6,
    n_expert: int = 8,
    n_embd: int = 256,
    n_ff: int = 256,
    types: Sequence[str] = CANDIDATES,
    seed: int = 0,
    type_name: str = "BF16",
) -> Calibration:
    """Errors that fall with a type's rate and differ between layers, experts and projections."""
    rng = np.random.default_rng(seed)
    model = model_info(n_layer, n_expert, n_embd, n_ff, type_name)
    shape = (n_layer, n_expert)
    output_sq = rng.lognormal(10, 1, shape)
    spread = rng.lognormal(0, 0.7, (n_layer, 1, 1, 1)) * rng.lognormal(0, 0.3, (*shape, 3, 1))
    relative = np.array([RELATIVE_ERROR[t] for t in types])
    error = output_sq[..., None, None] * spread * relative * rng.lognormal(0, 0.05, (*shape, 3, len(types)))
    for p, projection in enumerate(PROJECTIONS):
        if model.expert_shape(projection)[1] % 256:
            error[:, :, p] = np.inf
    statistics = {
        "frequency": rng.integers(1, 1000, shape).astype(np.float64),
        "routing_weight": rng.uniform(1, 500, shape),
        "sq_error": error,
        "output_sq": output_sq,
        "imatrix_in": np.ones((*shape, n_embd), dtype=np.float32),
        "imatrix_mid": np.ones((*shape, n_ff), dtype=np.float32),
        **synthetic_routing(n_layer),
        "nominal_error": np.sqrt(output_sq)[..., None]
        * np.array([0.5, 0.35, 0.2])
        * rng.uniform(0.9, 1.1, (*shape, 3)),
        "relative_error": error * 1e-3,
        "weight_error": error * 1e-4,
        "hessian_trace": np.ones((*shape, 3)),
        "kld_per_error": np.full(n_layer, 0.3),
        "block_score": np.linspace(0.5, 0.1, n_layer),
        "hidden_max": np.full(n_layer, 10.0),
        "hidden_median": np.ones(n_layer),
        "down_max": np.ones(shape),
    }
    return Calibration(
        model, tuple(range(n_layer)), tuple(types), {"sha256": "0" * 64}, statistics, fingerprint="c" * 64
    )


def with_attention(source: Calibration, types: Sequence[str], seed: int = 0) -> Calibration:
    """`source` with made-up errors of its attention matrices."""
    assert source.model is not None
    rng, shape = np.random.default_rng(seed), (len(source.layers), len(ATTENTION))
    spread = rng.lognormal(-2, 1, (*shape, 1)) * rng.lognormal(0, 0.05, (*shape, len(types)))
    attention = {
        "attention_error": spread * np.array([RELATIVE_ERROR[t] for t in types]),
        "attention_in": np.ones((shape[0], source.model.n_embd), dtype=np.float32),
        "attention_mid": np.ones((shape[0], source.model.n_embd), dtype=np.float32),
    }
    return replace(source, attention_types=tuple(types), statistics={**source.statistics, **attention})
