"""The error of one expert under every type: ggml's quantizer, the expert's own importance matrix and tokens.

With y = g W_down h, h = f(W_gate x, W_up x) with the model's own f (capture/function.py), and the final
routing weight g, the error of one projection in type t is the sum over the routed tokens of |y_t - y|^2 with
that projection alone replaced. It is exact when every row of the matrix and every routed token is used.
Otherwise rows are sampled, because quantization works row by row, and so are tokens, with probabilities near
their squared output, because a few of them can make most of an expert's error.

Sampling rows. A row of W_down makes one output, so the total is a plain sum over rows. A row i of W_gate or
W_up makes one dh_i, and |W_down dh|^2 = sum_ij dh_i dh_j <w_i, w_j> has cross terms. Where gate and up are
one matrix, the two rows of a hidden unit are drawn and changed together. Quantizers shrink weights (the error
of a least-squares fit is not orthogonal to the weight: -25 % for IQ1_S), so the dh_i move together, and
scaling up the sampled rows alone would be biased. The common part is known for all rows: dh = a b + r, where
b = dh/da is the effect of shrinking the projection. Hence total = a^2 |W b|^2 + 2 a <W b, W r> + |W r|^2; the
first term is exact, and the second and the diagonal of the third are sums over rows. Rows are drawn with
probabilities near their expected share of the error (Horvitz-Thompson), systematically, and the same rows for
every type, so that types are compared on equal terms.

Beside the plain sum over tokens there is a sum of relative errors, |y_t - y|^2 / |hidden state|^2. RMS norms
follow, so the effect of an error depends on its size relative to the hidden state, and the few tokens with
massive activations do not decide alone.

Cost. On one AVX-512 core a million weights take 2.7 s for the 11 default types together (Q3_K 26 million
weights per second, IQ2_XS 1.5, the others 2 to 9). Mixtral-8x7B has 45 billion expert weights: 33 core-hours
for all rows. With MAX_ROWS = 256 there are 5.8 million weights per expert and 1.5 billion in all: one
core-hour. The matrix products (MAX_TOKENS = 1024 tokens) are 0.1 PFLOP, a few percent of the forward passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import NOMINAL_TYPES, Floats
from mc_gguf.calibrate.finite import check_finite
from mc_gguf.capture.expert import Expert
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import TYPES

MAX_ROWS = 256
MAX_TOKENS = 1024
# Share of the sample that is drawn uniformly, so that the weight of a row that looks unimportant is bounded.
UNIFORM_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Sample:
    """Some tokens of one expert.

    Errors are proportional to g^2, so the g of a token that stands for w tokens is multiplied by sqrt(w).

    Attributes:
        x: [T, n_embd] normalised inputs.
        g: [T] final routing weights.
        scale: [T] 1 / norm of the hidden state, which relative errors are multiplied by; None means ones.
    """

    x: Tensor
    g: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ExpertErrors:
    """Errors of one expert, summed over all of its tokens; infinite where a row is not a whole number of
    blocks. P counts the expert's matrices, T the types.

    Attributes:
        block: [P, T] squared error of the output.
        relative: [P, T] squared error of the output relative to the hidden states.
        weight: [P, T] squared change of the weights.
        trace: [P] trace of half the relative error's Hessian with respect to the matrix, per weight.
    """

    block: Floats
    relative: Floats
    weight: Floats
    trace: Floats

    @classmethod
    def unknown(cls, n_projection: int, n_type: int) -> ExpertErrors:
        """Infinite errors, to be filled in."""
        block, relative, weight = (np.full((n_projection, n_type), np.inf) for _ in range(3))
        return cls(block, relative, weight, np.zeros(n_projection))


@dataclass(frozen=True, eq=False)
class Drawn:
    """A random sample of rows or tokens with their weights 1/probability, or all of them with weight 1."""

    index: Tensor
    weight: Tensor
    complete: bool


def expert_errors(
    expert: Expert,
    sample: Sample,
    imatrix_in: NDArray[np.float32],
    imatrix_mid: NDArray[np.float32],
    types: Sequence[str],
    max_rows: int = MAX_ROWS,
    seed: Sequence[int] = (0,),
    threads: int = 1,
) -> ExpertErrors:
    """Errors of every matrix of an expert, in the order of `expert.matrices`, in every type.

    Args:
        expert: the exact matrices.
        sample: tokens of the expert.
        imatrix_in: [n_embd] importance matrix of the inner matrices.
        imatrix_mid: [n_ff] importance matrix of down.
        types: names of the ggml types.
        max_rows: rows of a matrix that are quantized; the errors are scaled up to all rows.
        seed: decides which rows are drawn.
        threads: number of threads of the quantizers.
    """
    rng = np.random.default_rng(list(seed))
    found = ExpertErrors.unknown(len(expert.matrices), len(types))
    tables = (found.block, found.relative, found.weight)
    scale = torch.ones_like(sample.g) if sample.scale is None else sample.scale
    tokens = _ExpertInputs.of(expert, sample.x, sample.g * expert.output_scale, scale)
    with torch.no_grad():
        for p, (projection, matrix) in enumerate(expert.matrices.items()):
            is_down = projection == "down"
            change = _Down(expert, tokens) if is_down else _Inner(expert, tokens, projection)
            imatrix = imatrix_mid if is_down else imatrix_in
            limit = max_rows if is_down else max(1, max_rows * expert.n_ff // len(matrix))
            units = draw(change.unit_importance(torch.from_numpy(imatrix)), limit, rng)
            rows = units.index if is_down else expert.rows_of(projection, units.index)
            weights = matrix[rows].contiguous()
            weight = units.weight.repeat(len(rows) // max(1, len(units.index)))
            found.trace[p] = change.trace() / matrix.numel()
            for t, name in enumerate(types):
                if TYPES[name].fits(weights.shape[1]):
                    delta = quantization_error(weights, name, imatrix, threads)
                    errors = (*change.squared_errors(units, delta), _weighted_sum_sq(delta, weight))
                    for values, error in zip(tables, errors, strict=True):
                        values[p, t] = error
    return found


def imatrix_errors(
    matrices: Mapping[str, Tensor],
    output_sq: float,
    relative_sq: float,
    imatrix_in: NDArray[np.float32],
    imatrix_mid: NDArray[np.float32],
    types: Sequence[str],
    max_rows: int = MAX_ROWS,
    seed: Sequence[int] = (0,),
    threads: int = 1,
) -> ExpertErrors:
    """Errors of an expert whose function is not known, from its importance matrices alone.

    The error of the products with a matrix, relative to the products, is taken for that of the output, whose
    squared norm is `output_sq` and, relative to the hidden states, `relative_sq`, summed over the tokens.
    Inputs are taken as independent: sum_c imatrix_c (dW_c)^2.
    """
    rng = np.random.default_rng(list(seed))
    found = ExpertErrors.unknown(len(matrices), len(types))
    for p, (projection, matrix) in enumerate(matrices.items()):
        imatrix = imatrix_mid if projection == "down" else imatrix_in
        importance = torch.from_numpy(imatrix if imatrix.any() else np.ones_like(imatrix))
        own = torch.cat([part.square() @ importance for part in torch.split(matrix, 1024)]).double().numpy()
        rows = draw(own, max_rows, rng)
        weights, total = matrix[rows.index].contiguous(), max(float(own.sum()), 1e-30)
        for t, name in enumerate(types):
            if TYPES[name].fits(weights.shape[1]):
                delta = quantization_error(weights, name, imatrix, threads)
                share = float(((delta.square() @ importance) * rows.weight).sum()) / total
                found.block[p, t], found.relative[p, t] = share * output_sq, share * relative_sq
                found.weight[p, t] = _weighted_sum_sq(delta, rows.weight)
    return found


def quantization_error(weights: Tensor, type_name: str, imatrix: NDArray[np.float32], threads: int) -> Tensor:
    """Dequantized minus original weights [rows, cols]."""
    rows, cols = weights.shape
    data = quantize_rows(weights.numpy(), type_name, imatrix, threads)
    return torch.from_numpy(dequantize_rows(data, type_name, cols, rows)).sub_(weights)


def draw(importance: Floats, count: int, rng: np.random.Generator) -> Drawn:
    """At most `count` of len(importance) rows or tokens, drawn systematically with probabilities near their
    share of the importance. Raises McError for an importance that is not finite.
    """
    n = len(importance)
    check_finite(importance, "squared effects of the rows")
    if n <= count:
        return Drawn(torch.arange(n), torch.ones(n), True)
    total = importance.sum()
    share = importance / total if total > 0 else np.full(n, 1 / n)
    probability = _inclusion(UNIFORM_SHARE / n + (1 - UNIFORM_SHARE) * share, count)
    order = np.argsort(-importance, kind="stable")
    ends = np.cumsum(probability[order])
    picked = order[
        np.searchsorted(ends, rng.random() + np.arange(int(ends[-1] + 1e-6)), side="left").clip(max=n - 1)
    ]
    picked = np.unique(picked)
    return Drawn(torch.from_numpy(picked), torch.from_numpy(1 / probability[picked]).float(), False)


def _inclusion(share: Floats, count: int) -> Floats:
    """Inclusion probabilities that sum to `count`; proportional to `share`, but at most 1."""
    probability = np.zeros_like(share)
    certain = np.zeros(len(share), dtype=bool)
    while True:
        rest = ~certain
        probability[rest] = (count - certain.sum()) * share[rest] / share[rest].sum()
        if not (over := rest & (probability > 1)).any():
            return probability
        certain |= over
        probability[over] = 1.0


@dataclass(frozen=True, eq=False)
class _ExpertInputs:
    """What some tokens make of an expert.

    Attributes:
        x: [T, n_embd].
        g: [T, 1] routing weights.
        products: by inner projection, [T, rows].
        slopes: by inner projection, [T, rows]: derivatives of g h with respect to the products.
        hidden: [T, n_ff] g h.
        scale: [T, 1] of relative errors.
    """

    x: Tensor
    g: Tensor
    products: dict[str, Tensor]
    slopes: dict[str, Tensor]
    hidden: Tensor
    scale: Tensor

    @classmethod
    def of(cls, expert: Expert, x: Tensor, g: Tensor, scale: Tensor) -> _ExpertInputs:
        """The inputs x [T, n_embd] with weights g and scales [T]."""
        with torch.no_grad():
            products = expert.products(x)
        # Hidden unit i depends on the products of its own rows alone, so the gradient of the sum is each's
        # own.
        leaves = {p: z.clone().requires_grad_() for p, z in products.items()}
        with torch.enable_grad():
            hidden = expert.hidden_of(leaves)
            gradients = torch.autograd.grad(hidden.sum(), list(leaves.values()))
        slopes = {p: d * g[:, None] for p, d in zip(leaves, gradients, strict=True)}
        return cls(x, g[:, None], products, slopes, hidden.detach() * g[:, None], scale[:, None])


class _Change(ABC):
    """One projection of one expert, and what a change of some of its rows does to the output.

    Rows are counted in units: of down an output, of the other matrices a hidden unit, which has one row, or
    two where gate and up are merged.
    """

    @abstractmethod
    def unit_importance(self, imatrix: Tensor) -> Floats:
        """Expected share of each unit in the error: its effect times the weighted size of its rows."""

    @abstractmethod
    def squared_errors(self, units: Drawn, delta: Tensor) -> tuple[float, float]:
        """|change of the output|^2, summed over the tokens, when the rows of `units` change by `delta`,
        scaled up to all rows; and the same relative to the hidden states.
        """

    @abstractmethod
    def trace(self) -> float:
        """Trace of half the Hessian of the relative squared error with respect to the matrix."""


def _row_sizes(matrix: Tensor, imatrix: Tensor) -> Tensor:
    """[rows] squared size of each row, weighted by the importance matrix."""
    importance = imatrix if imatrix.any() else torch.ones_like(imatrix)
    return torch.cat([part.square() @ importance for part in torch.split(matrix, 1024)])


class _Inner(_Change):
    """Gate, up, or both in one: errors go through W_down."""

    def __init__(self, expert: Expert, tokens: _ExpertInputs, projection: str) -> None:
        self.expert, self.tokens, self.projection = expert, tokens, projection
        self.matrix, self.down = expert.matrices[projection], expert.down
        self.column_sq = self.down.square().sum(0)
        self.slopes = tokens.slopes[projection]
        self.n_part = len(self.matrix) // expert.n_ff

    def _by_unit(self, rows: Tensor) -> Tensor:
        """[..., units]: the sum over the rows of each unit."""
        return rows.view(*rows.shape[:-1], self.n_part, -1).sum(-2) if self.n_part > 1 else rows

    @cached_property
    def image(self) -> tuple[Tensor, Tensor]:
        """The derivative of g h with respect to scaling the whole matrix [T, n_ff], and what it does to the
        output [T, n_embd].
        """
        basis = self._by_unit(self.slopes * self.tokens.products[self.projection])
        return basis, basis @ self.down.T

    def unit_importance(self, imatrix: Tensor) -> Floats:
        sizes = _row_sizes(self.matrix, imatrix) * self.slopes.square().sum(0)
        return np.asarray((self._by_unit(sizes) * self.column_sq).double().numpy())

    def trace(self) -> float:
        inputs = (self.tokens.x * self.tokens.scale).square().sum(1)
        effect = self._by_unit(self.slopes.square()) @ self.column_sq
        return float((effect * inputs).sum(dtype=torch.float64))

    def _change(self, units: Tensor, product: Tensor) -> Tensor:
        """g dh [T, units] when the products of the units' rows change by `product`."""
        parts = {p: z[:, self.expert.rows_of(p, units)] for p, z in self.tokens.products.items()}
        before = self.expert.hidden_of(parts, units)
        parts[self.projection] = parts[self.projection] + product
        return (self.expert.hidden_of(parts, units) - before) * self.tokens.g

    def squared_errors(self, units: Drawn, delta: Tensor) -> tuple[float, float]:
        dh = self._change(units.index, self.tokens.x @ delta.T)
        columns, scale = self.down[:, units.index], self.tokens.scale
        if units.complete:
            each = (dh @ columns.T).square().sum(1, keepdim=True, dtype=torch.float64)
            return float(each.sum()), float((each * scale.square()).sum())
        basis, image = self.image[0][:, units.index], self.image[1]
        one = torch.ones_like(scale)
        plain, relative = (
            self._scaled_up(units, dh * s, columns, basis * s, image * s) for s in (one, scale)
        )
        return plain, relative

    def _scaled_up(self, units: Drawn, dh: Tensor, columns: Tensor, basis: Tensor, image: Tensor) -> float:
        size = self.column_sq[units.index] * units.weight
        common = float((dh * basis * size).sum() / (basis.square() * size).sum().clamp(min=1e-30))
        rest = dh - common * basis
        cross = float(((rest * units.weight @ columns.T) * image).sum(dtype=torch.float64))
        diagonal = float((rest.square() * size).sum(dtype=torch.float64))
        # The cross term is a difference of large sums: without this bound noise could make the total
        # negative.
        return max(common**2 * _sum_sq(image) + 2 * common * cross, 0.0) + diagonal


class _Down(_Change):
    """Down: rows are outputs, and errors add up over rows."""

    def __init__(self, expert: Expert, tokens: _ExpertInputs) -> None:
        self.matrix, self.hidden = expert.down, tokens.hidden
        self.scale_sq = tokens.scale[:, 0].square()

    def unit_importance(self, imatrix: Tensor) -> Floats:
        return np.asarray(_row_sizes(self.matrix, imatrix).double().numpy())

    def squared_errors(self, units: Drawn, delta: Tensor) -> tuple[float, float]:
        each = (self.hidden @ delta.T).square() @ units.weight
        return float(each.sum(dtype=torch.float64)), float((each * self.scale_sq).sum(dtype=torch.float64))

    def trace(self) -> float:
        each = self.hidden.square().sum(1) * self.scale_sq
        return len(self.matrix) * float(each.sum(dtype=torch.float64))


def _weighted_sum_sq(rows: Tensor, weight: Tensor) -> float:
    return float((rows.square().sum(1, dtype=torch.float64) * weight).sum())


def _sum_sq(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def nominal_errors(sq_error: Floats, types: Sequence[str]) -> Floats:
    """Frobenius norm [L, E, 3] of the output's change when a whole expert has nominal 1, 2 or 3 bits.

    Computed from sq_error [L, E, P, T] as if the errors of the projections were independent, so that their
    squares add up. Where a type of NOMINAL_TYPES was not measured, or does not fit a projection, the next
    larger measured type stands for it, and the largest where there is none.
    """
    by_size = sorted(range(len(types)), key=lambda t: TYPES[types[t]].bpw)
    total = np.zeros((*sq_error.shape[:2], len(NOMINAL_TYPES)))
    for p in range(sq_error.shape[2]):
        usable = [t for t in by_size if np.isfinite(sq_error[:, :, p, t]).all()]
        for n, name in enumerate(NOMINAL_TYPES):
            enough = [t for t in usable if TYPES[types[t]].bpw >= TYPES[name].bpw]
            total[:, :, n] += sq_error[:, :, p, (enough or usable[-1:])[0]]
    return np.asarray(np.sqrt(total))
