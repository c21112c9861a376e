"""Matrix products of error compensation at the machine's speed: in bfloat16 where the CPU multiplies it in
hardware (AMX, AVX512_BF16: 3 to 6 times the speed of float32), with sums in float32.

Every factor is rounded by up to 2^-9 of its size, at random. That concerns the errors to make up for (which
are themselves a per cent or more of the weights), the inputs of a Hessian, which stays a sum of squares, and
the hidden states in the experts and the attention of the pass over the text. The router, factors, metrics and
inverses are computed in float32 (`exact_products`). The result depends on the CPU, as it does in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

WIDE = 1024  # columns from which on bfloat16 is worth it
STRIP = 2048  # columns that add_squares and mirror work on at once
SHORT = 256  # tokens whose squares are added up in one product; more where there are more columns


@cache
def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return _supports("_is_amx_tile_supported") or _supports("_is_avx512_bf16_supported")


def _supports(name: str) -> bool:
    probe = getattr(torch.cpu, name, None)  # newer than the oldest torch that we run on
    return bool(probe and probe())


def product_type(n: int) -> torch.dtype:
    """The dtype of the factors of a product over `n` columns."""
    return torch.bfloat16 if n >= WIDE and has_bfloat16() else torch.float32


@contextmanager
def fast_products(n: int) -> Iterator[None]:
    """Inside this context, float32 products over `n` columns may round their factors to bfloat16."""
    with _precision("medium" if n >= WIDE and has_bfloat16() else "highest"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside this context, float32 products do not round their factors."""
    with _precision("highest"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_squares(total: Tensor, x: Tensor) -> None:
    """Add x' x of x [tokens, n] to `total` [n, n] on and above the diagonal; `mirror` does the rest.

    MKL divides sums that are much longer than there are columns among its threads, so that the last bits
    would depend on their number; therefore it gets shorter ones.
    """
    n = x.shape[1]
    for part in torch.split(x, max(SHORT, n)):
        for start in range(0, n, STRIP):
            end = min(start + STRIP, n)
            total[:end, start:end].addmm_(part[:, :end].T, part[:, start:end])


def mirror(total: Tensor) -> None:
    """Copy what is above the diagonal of `total` [n, n] to below it, in place."""
    n = len(total)
    for start in range(0, n, STRIP):
        end = min(start + STRIP, n)
        total[end:, start:end] = total[start:end, end:].T
