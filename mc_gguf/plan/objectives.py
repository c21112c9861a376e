"""What a plan minimises: each objective turns a calibration into the error [L, E, P, T] of every type.

    OBJECTIVES["kld"](calibration, types)

The program minimises the sum over (layer, expert, projection), so an objective is an additive estimate of the
damage. A type that was not measured has the error nan. There are two kinds of objectives:

- errors that were measured under each type (kld, relative, block, published, f-norm, hessian);
- the importance of an expert times the rate of a type (frequency, routing-weight, bsp), which is what the
  published baselines know. The rate is the type's relative error, the median over the experts, so that all
  baselines spend the same bytes in the same program and differ only in which experts they call important.

docs/explanation/allocation.md compares them on the bundled model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mc_gguf.artifacts import Calibration, Floats
from mc_gguf.common.errors import ArtifactError
from mc_gguf.plan.published import EXPONENTS, share

Objective = Callable[[Calibration, Sequence[str]], Floats]


def block(calibration: Calibration, types: Sequence[str]) -> Floats:
    """Squared error of the MoE block's output, summed over the tokens that were routed to the expert."""
    return measured(calibration, types, "sq_error")


def relative(calibration: Calibration, types: Sequence[str]) -> Floats:
    """Like block, but relative to each token's hidden state, which is what the norms of later layers see.

    The mean over all tokens of the text.
    """
    tokens = calibration.frequency.sum(axis=1) / _n_used(calibration)
    error = measured(calibration, types, "relative_error")
    return np.asarray(error / np.maximum(tokens, 1.0)[:, None, None, None])


def kld(calibration: Calibration, types: Sequence[str]) -> Floats:
    """KL divergence of the model's output, nats per token.

    It is the relative error times its price: the divergence at the model's output that one unit of relative
    error in this layer was measured to cause (calibrate/sensitivity.py).
    """
    price = calibration.kld_per_error
    error = relative(calibration, types)
    finite = np.where(np.isinf(error), 0.0, error)  # where a type does not fit: infinite at any price
    return np.asarray(np.where(np.isinf(error), np.inf, finite * price[:, None, None, None]))


def hessian(calibration: Calibration, types: Sequence[str]) -> Floats:
    """HAWQ-V2 (arXiv 1911.03852): mean trace of the loss's Hessian times the squared change of the weights.

    The loss is that of kld. Its Gauss-Newton Hessian is known from the forward pass, so that neither a
    backward pass nor a Hutchinson estimate is needed.
    """
    tokens = calibration.frequency.sum(axis=1) / _n_used(calibration)
    price = calibration.kld_per_error / np.maximum(tokens, 1.0)
    trace = calibration.hessian_trace * price[:, None, None]
    return np.asarray(measured(calibration, types, "weight_error") * trace[..., None])


def published(calibration: Calibration, types: Sequence[str]) -> Floats:
    """phi^a * w^b * eps^g (Mixture Compressor, arXiv 2410.06270) with the exponents of the published
    allocations.

    phi is the expert's share of the tokens, w its share of the routing weight, eps the Frobenius norm of the
    change of the block's output. Unlike the paper, one program in real bytes covers the whole model.
    """
    a, b, g = EXPONENTS
    importance = share(calibration.frequency) ** a * share(calibration.routing_weight) ** b
    return np.asarray(importance[..., None, None] * f_norm(calibration, types) ** g)


def f_norm(calibration: Calibration, types: Sequence[str]) -> Floats:
    """Frobenius norm of the change of the block's output: eps alone of the Mixture Compressor's cost."""
    return np.asarray(np.sqrt(np.maximum(block(calibration, types), 0.0)))


def frequency(calibration: Calibration, types: Sequence[str]) -> Floats:
    """Share of the layer's routed tokens that go to the expert: the experts used most get the most bits.

    A baseline of arXiv 2406.08155 and 2410.06270.
    """
    return _rated(calibration, types, share(calibration.frequency))


def routing_weight(calibration: Calibration, types: Sequence[str]) -> Floats:
    """Share of the layer's routing weight that goes to the expert; a baseline of arXiv 2410.06270."""
    return _rated(calibration, types, share(calibration.routing_weight))


def bsp(calibration: Calibration, types: Sequence[str]) -> Floats:
    """Block score of QuantMoE-Bench (arXiv 2406.08155): a block is important if it changes its input much.

    The score is 1 minus the mean cosine between the hidden states before and after the feed-forward block,
    the same for all experts of a layer. The paper trains a predictor of that cosine; here it is measured.
    """
    score = calibration.block_score
    return _rated(calibration, types, np.broadcast_to(score[:, None], calibration.frequency.shape))


# What pmq minimises by default: the first objective whose array the calibration has.
DEFAULT_OBJECTIVES: tuple[tuple[str, str], ...] = (("kld", "kld_per_error"), ("block", "sq_error"))

OBJECTIVES: dict[str, Objective] = {
    "kld": kld,
    "relative": relative,
    "block": block,
    "published": published,
    "f-norm": f_norm,
    "hessian": hessian,
    "frequency": frequency,
    "routing-weight": routing_weight,
    "bsp": bsp,
}


def measured(calibration: Calibration, types: Sequence[str], name: str) -> Floats:
    """The calibration's array [L, E, P, T] for `types`, with nan for types that it did not measure.

    Raises ArtifactError when it did not measure the array at all.
    """
    values: Floats = getattr(calibration, name)
    known = {kind: i for i, kind in enumerate(calibration.types)}
    missing = np.full((*values.shape[:3], 1), np.nan)
    parts = [values[..., [known[kind]]] if kind in known else missing for kind in types]
    return np.concatenate(parts, axis=-1)


def _n_used(calibration: Calibration) -> int:
    return calibration.model.n_expert_used if calibration.model else 1


def _rated(calibration: Calibration, types: Sequence[str], importance: Floats) -> Floats:
    """[L, E, P, T]: the importance [L, E] of the expert times the rate of the type."""
    return np.asarray(importance[..., None, None] * type_rates(calibration, types))


def type_rates(calibration: Calibration, types: Sequence[str]) -> Floats:
    """[P, T]: relative squared error of each type, the median over all experts that saw text."""
    used = (calibration.frequency > 0) & (calibration.output_sq > 0)
    if not used.any():
        raise ArtifactError("no expert of this calibration saw any text; calibrate again")
    relative = block(calibration, types)[used] / calibration.output_sq[used][:, None, None]
    return np.asarray(np.median(np.maximum(relative, 0.0), axis=0))
