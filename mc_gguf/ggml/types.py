"""The ggml tensor types that mc_gguf writes: block sizes, rates, and what each needs. Facts only, no ggml,
no gguf.

Source: ggml/include/ggml.h (ids) and ggml-common.h (block layouts) of the pinned llama.cpp; a test compares
the table with the pinned gguf-py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mc_gguf.common.errors import McError


@dataclass(frozen=True)
class GgmlType:
    """One ggml type: `block_size` weights are stored in `block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int
    needs_imatrix: bool = False

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, n_per_row: int) -> int:
        """Bytes of one row of `n_per_row` weights. Raises McError unless that is a whole number of blocks."""
        if n_per_row % self.block_size:
            raise McError(
                f"{self.name} needs rows that are a multiple of {self.block_size}, not {n_per_row}; "
                "use F16 or BF16 for this tensor"
            )
        return n_per_row // self.block_size * self.block_bytes


TYPES: dict[str, GgmlType] = {
    t.name: t
    for t in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("BF16", 30, 1, 2),
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("IQ1_S", 19, 256, 50, needs_imatrix=True),
        GgmlType("IQ1_M", 29, 256, 56, needs_imatrix=True),
        GgmlType("IQ2_XXS", 16, 256, 66, needs_imatrix=True),
        GgmlType("IQ2_XS", 17, 256, 74, needs_imatrix=True),
        GgmlType("IQ2_S", 22, 256, 82, needs_imatrix=True),
        GgmlType("IQ3_XXS", 18, 256, 98, needs_imatrix=True),
        GgmlType("IQ3_S", 21, 256, 110),
        GgmlType("IQ4_XS", 23, 256, 136),
    )
}

# What the planner chooses from unless the user names types, in order of size.
CANDIDATES: tuple[str, ...] = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K",
    "IQ4_XS",
    "Q4_K",
)

# What the planner chooses from for attention matrices, in order of size; smaller ones hardly pay
# (docs/allocation.md).
ATTENTION_CANDIDATES: tuple[str, ...] = ("Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0")

SIXTEEN_BIT = ("F16", "BF16")

# Measured and planned where rows are no multiple of 256, which k- and i-quants need.
FALLBACKS = ("IQ4_NL", "Q5_0", "Q8_0")

# Groups that one layer's projection can have in a file: GGML_MC_MAX_GROUPS of the patched llama.cpp.
MAX_GROUPS = 13


def ggml_type(name: str) -> GgmlType:
    """The type called `name` (any case). Raises McError with the known names."""
    try:
        return TYPES[name.upper()]
    except KeyError:
        raise McError(f"unknown ggml type {name!r}; known: {', '.join(TYPES)}") from None
