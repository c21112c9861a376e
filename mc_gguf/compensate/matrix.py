"""Error compensation while rounding: turns one matrix into the blocks that lose least on given inputs (GPTQ,
LDLQ).

It minimises tr((W - Q) H (W - Q)'), where H is the second moment of the matrix's inputs; a plain quantizer
knows only the diagonal of H. With H = R R', R upper triangular, this is |(W - Q) R|^2: block B of 256 columns
sees

    (W_B - Q_B + A inv(R_BB)) R_BB,  A = sum over blocks j before B of (W_j - Q_j) R_jB

so it is quantized to W_B + A inv(R_BB) in the metric R_BB R_BB', and the error of the blocks before is made
up for as far as a linear map can. Inside a block the native library (ggml/compensation_library.py) goes on
column by column, or codebook entry by codebook entry. The scales to start from come from ggml's own
quantizer, run on the compensated weights (for slow types: on the weights themselves). `sweeps` then revisit
every block with all others
fixed: the target is W_B + (sum over j of (W_j - Q_j) H_jB) inv(H_BB), and the metric is H_BB.

At that minimum the error is orthogonal to Q's own outputs, so these are too small: by 2 % for IQ2_XXS, and an
expert multiplies three such matrices. This loss of gain is the same for all tokens, adds up over the layers
and does more harm than its squared error says. Therefore the scale of every row is finally set to make w H w'
= q H w' (`unbiased`).

The cost of a matrix [rows, n] is n^3 / 3 for R in float32, and rows n^2 for A, 2 rows n^2 per sweep and 2
rows n^2 for the gains in the precision of products.py; the library is linear in n. Memory holds R beside the
given H (n = 14336: 822 MB each), W, Q and the error.

Sources: Frantar et al., GPTQ (arXiv 2210.17323); Chee et al., QuIP (arXiv 2307.13304) for LDLQ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.common.errors import McError
from mc_gguf.compensate.products import exact_products, product_type
from mc_gguf.ggml.compensation_library import BLOCK, Metric, scale_rows, supports
from mc_gguf.ggml.quantizers import quantize_rows
from mc_gguf.ggml.types import ggml_type

__all__ = ["DEFAULT", "CompensationOptions", "quantize_compensated", "supports"]

MAX_GAIN = 1.5  # a row that lost more than this is noise


@dataclass(frozen=True)
class CompensationOptions:
    """How a matrix is compensated.

    Attributes:
        damping: multiple of the mean of the Hessian's diagonal that is added to the diagonal.
        passes: passes of coordinate descent inside a block of columns.
        sweeps: further sweeps over the blocks of a matrix that has more than one.
        unbiased: whether the scale of every row is set so that its outputs keep their size.
    """

    damping: float = 0.1
    passes: int = 3
    sweeps: int = 1
    unbiased: bool = True

    def for_tokens(self, n_tokens: int, n_cols: int) -> CompensationOptions:
        """More damping where the Hessian was estimated from few tokens: its error grows with columns /
        tokens.

        Measured on the bundled model with Q2_K: from 15,000 tokens per expert on, 0.01 to 0.3 are alike; with
        900 tokens 0.01 does harm (the divergence is 1.14 of that of ggml's quantizers), and 0.3 to 1 are best
        (0.64 and 0.62).
        """
        return replace(self, damping=self.damping + n_cols / max(1, n_tokens))


DEFAULT = CompensationOptions()


def quantize_compensated(
    weights: NDArray[np.float32],
    type_name: str,
    hessian: Tensor | NDArray[np.float32],
    imatrix: NDArray[np.float32] | None,
    options: CompensationOptions = DEFAULT,
    threads: int = 1,
    start: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Blocks (rows, bytes per row) of a matrix; the same for any `threads` if matrix products are.

    Args:
        weights: [rows, n] the matrix.
        type_name: the ggml type of the blocks.
        hessian: [n, n] sum or mean of x x' over the inputs x.
        imatrix: [n] importance matrix that ggml's quantizer gets for its scales.
        options: how the matrix is compensated.
        threads: number of threads.
        start: the blocks that ggml's quantizer makes of `weights`, if known; only their scales count.

    Raises McError when the type cannot be compensated, a row is not a whole number of blocks, or the weights
    are not finite.
    """
    kind = ggml_type(type_name)
    rows, n = weights.shape
    row_bytes = kind.row_bytes(n)
    if not supports(kind.name):
        message = f"{kind.name} cannot be quantized with error compensation; do without it"
        raise McError(message, parameter="compensate")
    form = Form(torch.as_tensor(hessian), options.damping)
    if form.hessian.shape != (n, n):
        raise McError(f"the Hessian is {tuple(form.hessian.shape)}, the rows have {n} weights")
    source = np.ascontiguousarray(weights, dtype=np.float32)
    blocks = quantize_rows(source, kind.name, imatrix, threads) if start is None else start.copy()
    work = _Matrix(
        source,
        kind.name,
        imatrix,
        options.passes,
        threads,
        blocks,
        np.empty((rows, n), dtype=np.float32),
        torch.zeros(rows, n, dtype=product_type(n)),
    )
    assert blocks.shape == (rows, row_bytes)
    work.first_pass(form)
    for _ in range(options.sweeps if n > BLOCK else 0):
        work.sweep(form)
    if options.unbiased:
        scale_rows(work.blocks, kind.name, n, work.gains(form))
    return work.blocks


class Form:
    """The Hessian divided by the mean of its diagonal, plus `damping` times the identity.

    The squares of inputs can underflow, when an expert has hardly any weight in all of its tokens; a Hessian
    of zeros counts as the identity.
    """

    def __init__(self, hessian: Tensor, damping: float) -> None:
        mean = float(hessian.diagonal().mean())
        if not np.isfinite(mean):
            raise McError("the Hessian is not finite; calibrate again")
        self.hessian = hessian.float() if mean > 0 else torch.eye(len(hessian))
        self.scale, self.damping = 1 / mean if mean > 0 else 1.0, damping

    def columns(self, part: slice) -> Tensor:
        """A copy of some columns: [n, columns]."""
        found = self.hessian[:, part] * self.scale
        found[part].diagonal().add_(self.damping)
        return found

    def whole(self) -> Tensor:
        return self.columns(slice(0, len(self.hessian)))


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The whole matrix of the form."""
    return Form(hessian, damping).whole()


PANEL = 512  # columns of the factor at once


def upper_factor(h: Tensor) -> Tensor:
    """R, upper triangular, with R R' = h: Cholesky from the last column on, in place. Raises McError.

    The part below the diagonal is not used and not cleared, except in the blocks on it.
    """
    with exact_products():
        for end in range(len(h), 0, -PANEL):
            start = max(0, end - PANEL)
            own = h[start:end, start:end]
            lower, failed = torch.linalg.cholesky_ex(own.flip(0, 1))
            if failed:
                message = "the Hessian is not positive definite; do without error compensation"
                raise McError(message, parameter="compensate")
            own.copy_(lower.flip(0, 1))
            panel = torch.linalg.solve_triangular(own.T, h[:start, start:end], upper=False, left=False)
            h[:start, start:end] = panel
            for first in range(0, start, 4 * PANEL):
                last = min(first + 4 * PANEL, start)
                h[:last, first:last].addmm_(panel[:last], panel[first:last].T, alpha=-1)
    return h


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix that is being quantized: its `blocks` and the `values` that they stand for."""

    weights: NDArray[np.float32]
    type_name: str
    imatrix: NDArray[np.float32] | None
    passes: int
    threads: int
    blocks: NDArray[np.uint8]
    values: NDArray[np.float32]
    error: Tensor  # weights - values, in the dtype of products; zero where nothing is chosen yet

    def columns(self) -> list[slice]:
        n = self.weights.shape[1]
        return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]

    def block_bytes(self, part: slice) -> NDArray[np.uint8]:
        kind = ggml_type(self.type_name)
        first, last = (at // kind.block_size * kind.block_bytes for at in (part.start, part.stop))
        return self.blocks[:, first:last]

    def first_pass(self, form: Form) -> None:
        """Quantize block after block, making up for the error of those before."""
        parts = self.columns()
        if len(parts) == 1:
            self._fit(parts[0], self.weights, form.whole(), greedy=True)
            return
        r = upper_factor(form.whole())
        for part in parts:
            own = r[part, part].triu()
            carried = self.error[:, : part.start] @ r[: part.start, part].to(self.error.dtype)
            carried = torch.linalg.solve_triangular(own, carried.float(), upper=True, left=False)
            target = self.weights[:, part] + carried.numpy()
            # New scales gain 1 % of squared error, but only 0.3 % for the types whose quantizers are slow.
            if not ggml_type(self.type_name).is_slow:
                importance = None if self.imatrix is None else self.imatrix[part]
                self.block_bytes(part)[:] = quantize_rows(target, self.type_name, importance, self.threads)
            with exact_products():
                metric = own @ own.T
            self._fit(part, target, metric, greedy=True)

    def sweep(self, form: Form) -> None:
        """Quantize every block again, with all others fixed."""
        for part in self.columns():
            h = form.columns(part)
            own = h[part].clone()
            h[part] = 0
            outside = (self.error @ h.to(self.error.dtype)).float()
            target = self.weights[:, part] + torch.linalg.solve(own, outside, left=False).numpy()
            self._fit(part, target, own, greedy=False)

    def gains(self, form: Form) -> NDArray[np.float32]:
        """w H w' / q H w' of every row: the factor that makes its outputs as large as they were."""
        size, kept = np.zeros(len(self.weights)), np.zeros(len(self.weights))
        weights = torch.from_numpy(self.weights).to(self.error.dtype)
        for part in self.columns():
            image = (weights @ form.columns(part).to(weights.dtype)).float().numpy()
            size += np.einsum("ij,ij->i", image, self.weights[:, part])
            kept += np.einsum("ij,ij->i", image, self.values[:, part])
        gains = np.divide(size, kept, out=np.ones_like(size), where=kept > size / MAX_GAIN)
        return gains.clip(1 / MAX_GAIN, MAX_GAIN).astype(np.float32)

    def _fit(self, part: slice, target: NDArray[np.float32], metric: Tensor, greedy: bool) -> None:
        with Metric(self.type_name, metric.numpy()) as prepared:
            prepared.quantize(
                target, self.block_bytes(part), self.values[:, part], self.passes, self.threads, greedy
            )
        self.error[:, part] = torch.from_numpy(self.weights[:, part] - self.values[:, part])
