"""Calibrations made up for the tests of planning: errors that look like measured ones, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mc_gguf.artifacts import PROJECTIONS, Calibration, ModelInfo, TensorSpec, expert_tensor_name
from mc_gguf.ggml.types import CANDIDATES, TYPES
from tools.common import RELATIVE_ERROR

K_QUANTS = tuple(name for name in CANDIDATES if TYPES[name].block_size == 256)
MERGED, NO_GATE = ("gate_up", "down"), ("up", "down")  # what experts may have instead of PROJECTIONS


def model_info(
    n_layer: int = 6,
    n_expert: int = 8,
    n_embd: int = 256,
    n_ff: int | Sequence[int] = 256,
    type_name: str = "BF16",
    projections: Sequence[str] = PROJECTIONS,
) -> ModelInfo:
    """A Mixtral-like model: embeddings, output, attention, router and expert stacks. `n_ff` may be a width
    for each layer.
    """
    widths = [n_ff] * n_layer if isinstance(n_ff, int) else list(n_ff)
    tensors = [TensorSpec("token_embd.weight", (n_embd, 4096), type_name)]
    for layer, width in enumerate(widths):
        block = f"blk.{layer}"
        tensors += [
            TensorSpec(f"{block}.attn_{x}.weight", (n_embd, n_embd), type_name) for x in ("q", "output")
        ]
        tensors += [TensorSpec(f"{block}.attn_{x}.weight", (n_embd, n_embd // 2), type_name) for x in "kv"]
        tensors += [TensorSpec(f"{block}.ffn_gate_inp.weight", (n_embd, n_expert), "F32")]
        tensors += [TensorSpec(f"{block}.{x}_norm.weight", (n_embd,), "F32") for x in ("attn", "ffn")]
        for p in projections:
            shape = {"down": (width, n_embd), "gate_up": (n_embd, 2 * width)}.get(p, (n_embd, width))
            tensors.append(TensorSpec(expert_tensor_name(layer, p), (*shape, n_expert), type_name))
    tensors += [
        TensorSpec("output_norm.weight", (n_embd,), "F32"),
        TensorSpec("output.weight", (n_embd, 4096), type_name),
    ]
    kv_bytes, n_kv = 50_000, 30
    return ModelInfo(
        "llama", n_layer, n_expert, 2, n_embd, max(widths), "5" * 64, kv_bytes, n_kv, tuple(tensors)
    )


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
    n_ff: int | Sequence[int] = 256,
    types: Sequence[str] = CANDIDATES,
    seed: int = 0,
    type_name: str = "BF16",
    projections: Sequence[str] = PROJECTIONS,
) -> Calibration:
    """Errors that fall with a type's rate and differ between layers, experts and projections; infinite where
    a type does not fit.
    """
    rng = np.random.default_rng(seed)
    model = model_info(n_layer, n_expert, n_embd, n_ff, type_name, projections)
    shape, n_projection = (n_layer, n_expert), len(projections)
    by_projection, by_type = (*shape, n_projection), (*shape, n_projection, len(types))
    output_sq = rng.lognormal(10, 1, shape)
    spread = rng.lognormal(0, 0.7, (n_layer, 1, 1, 1)) * rng.lognormal(0, 0.3, (*by_projection, 1))
    relative = np.array([RELATIVE_ERROR[t] for t in types])
    error = output_sq[..., None, None] * spread * relative * rng.lognormal(0, 0.05, by_type)
    for (layer, projection), stack in model.stacks.items():
        fits = [TYPES[name].fits(stack.shape[0]) for name in types]
        error[layer, :, model.projections.index(projection), ~np.array(fits)] = np.inf
    statistics = {
        "frequency": rng.integers(1, 1000, shape).astype(np.float64),
        "routing_weight": rng.uniform(1, 500, shape),
        "sq_error": error,
        "output_sq": output_sq,
        "imatrix_in": np.ones((*shape, n_embd), dtype=np.float32),
        "imatrix_mid": np.ones((*shape, model.n_ff), dtype=np.float32),
        **synthetic_routing(n_layer),
        "nominal_error": np.sqrt(output_sq)[..., None]
        * np.array([0.5, 0.35, 0.2])
        * rng.uniform(0.9, 1.1, (*shape, 3)),
        "relative_error": error * 1e-3,
        "weight_error": error * 1e-4,
        "hessian_trace": np.ones(by_projection),
        "kld_per_error": np.full(n_layer, 0.3),
        "block_score": np.linspace(0.5, 0.1, n_layer),
        "hidden_max": np.full(n_layer, 10.0),
        "hidden_median": np.ones(n_layer),
        "down_max": np.ones(shape),
    }
    return Calibration(
        model, tuple(range(n_layer)), tuple(types), {"sha256": "0" * 64}, statistics, fingerprint="c" * 64
    )


def with_others(source: Calibration, types: Sequence[str], seed: int = 0) -> Calibration:
    """`source` with made-up errors of all matrices in its layers that are not experts: attention's."""
    assert source.model is not None
    rng = np.random.default_rng(seed)
    specs = [t for t in source.model.tensors if ".attn_" in t.name and t.is_matrix]
    spread = rng.lognormal(3, 1, (len(specs), 1)) * rng.lognormal(0, 0.05, (len(specs), len(types)))
    error = spread * np.array([RELATIVE_ERROR[t] for t in types])
    error[~np.array([[TYPES[name].fits(t.shape[0]) for name in types] for t in specs])] = np.inf
    measured = {
        "matrix_error": error,
        "matrix_price": rng.lognormal(-6, 0.5, len(specs)),
        "matrix_in": np.ones(sum(t.shape[0] for t in specs), dtype=np.float32),
    }
    return replace(
        source,
        matrices=tuple(t.name for t in specs),
        matrix_types=tuple(types),
        statistics={**source.statistics, **measured},
    )
