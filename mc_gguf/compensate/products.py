"""Matrix products of error compensation at the machine's speed: in bfloat16 where the CPU multiplies it (AMX,
AVX512_BF16: 3 to 6 times the speed of float32), sums in float32.

What is lost is 2^-9 of a factor, at random, and once more of what a product of errors gives: of the errors to
make up for (their own size is a per cent or more of the weights), of the inputs of a Hessian, which stays a
sum of squares, and of the hidden states that experts and attention of the pass over the text work on. The
router, factors, metrics and inverses are exact (`exact_products`). The result depends on the CPU, as it does
in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

WIDE = 1024  # columns from which on a product is worth it
STRIP = 2048


@cache
def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return _supports("_is_amx_tile_supported") or _supports("_is_avx512_bf16_supported")


def _supports(name: str) -> bool:
    probe = getattr(torch.cpu, name, None)  # newer than the oldest torch that we run on
    return bool(probe and probe())


def product_type(n: int) -> torch.dtype:
    """Of the factors of a product over n columns."""
    return torch.bfloat16 if n >= WIDE and has_bfloat16() else torch.float32


@contextmanager
def fast_products(n: int) -> Iterator[None]:
    """float32 products may round their factors to bfloat16 meanwhile, if they are over n columns."""
    with _precision("medium" if n >= WIDE and has_bfloat16() else "highest"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products are just that meanwhile."""
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
    """total [n, n] += x' x on and above the diagonal, x [tokens, n]; `mirror` does the rest."""
    n = x.shape[1]
    for start in range(0, n, STRIP):
        end = min(start + STRIP, n)
        total[:end, start:end].addmm_(x[:, :end].T, x[:, start:end])


def mirror(total: Tensor) -> None:
    """What is above the diagonal to below it, in place."""
    n = len(total)
    for start in range(0, n, STRIP):
        end = min(start + STRIP, n)
        total[end:, start:end] = total[start:end, end:].T
