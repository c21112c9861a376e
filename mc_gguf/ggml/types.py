"""The one table of ggml's tensor types: what mc_gguf knows of each of them. Facts only: it needs neither
ggml nor gguf-py.

Sources: ggml/include/ggml.h (ids), ggml-common.h (block layouts) and include/llama.h (llama_ftype) of the
pinned llama.cpp. A test compares the table with the pinned gguf-py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto

from mc_gguf.common.errors import McError

FILE_TYPE_GUESSED = 1024  # LLAMA_FTYPE_GUESSED: no llama_ftype is named after the type


class Use(Flag):
    """What a type is used for, and what its quantizer needs."""

    NONE = 0
    IMATRIX = auto()  # ggml's quantizer refuses to work without an importance matrix
    SLOW = auto()  # ggml's quantizer takes longer than all of error compensation
    EXPERTS = auto()  # the planner chooses from it for experts unless the user names types
    MATRICES = auto()  # the planner chooses from it for matrices that are not experts
    FALLBACK = auto()  # measured and planned where rows are not multiples of 256, which k- and i-quants need
    UNQUANTIZED = auto()  # 16 bits per weight, as models are published
    FOREIGN = auto()  # may appear in a file, but mc_gguf never writes weights in it


@dataclass(frozen=True)
class GgmlType:
    """One ggml type: `block_size` weights are stored in `block_bytes` bytes.

    `file_type` is the llama_ftype of a file that consists mostly of this type.
    """

    name: str
    id: int
    block_size: int
    block_bytes: int
    file_type: int = FILE_TYPE_GUESSED
    use: Use = Use.NONE

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_size

    @property
    def needs_imatrix(self) -> bool:
        """Whether ggml's quantizer needs an importance matrix."""
        return Use.IMATRIX in self.use

    @property
    def is_slow(self) -> bool:
        """Whether ggml's quantizer is slow enough to be worth avoiding."""
        return Use.SLOW in self.use

    def fits(self, n_per_row: int) -> bool:
        """Whether a row of `n_per_row` weights is a whole number of blocks."""
        return n_per_row % self.block_size == 0

    def row_bytes(self, n_per_row: int) -> int:
        """Bytes of one row of `n_per_row` weights. Raises McError unless the type `fits` the row."""
        if not self.fits(n_per_row):
            fitting = [t.name for t in GGML_TYPES if Use.FALLBACK in t.use and t.fits(n_per_row)]
            *most, last = *fitting, "F16", "BF16"
            raise McError(
                f"{self.name} needs rows that are a multiple of {self.block_size}, not {n_per_row}; "
                f"use {', '.join(most)} or {last} for this tensor"
            )
        return n_per_row // self.block_size * self.block_bytes


MAX_WEIGHT = 65504.0  # the largest number of F16; no trained model has a weight near it

_IMATRIX, _SLOW, _EXPERTS, _MATRICES = Use.IMATRIX, Use.SLOW, Use.EXPERTS, Use.MATRICES
_FALLBACK, _UNQUANTIZED, _FOREIGN, _NONE = Use.FALLBACK, Use.UNQUANTIZED, Use.FOREIGN, Use.NONE

# Sorted by size. All names below are derived from this table and keep its order. Types below Q3_K are no
# candidates for other matrices because they hardly pay there (docs/explanation/allocation.md).
# fmt: off
GGML_TYPES: tuple[GgmlType, ...] = (
    #        name      id  block  bytes ftype use
    GgmlType("IQ1_S",   19, 256,   50,  24, _IMATRIX | _SLOW | _EXPERTS),
    GgmlType("IQ1_M",   29, 256,   56,  31, _IMATRIX | _SLOW | _EXPERTS),
    GgmlType("IQ2_XXS", 16, 256,   66,  19, _IMATRIX | _SLOW | _EXPERTS),
    GgmlType("IQ2_XS",  17, 256,   74,  20, _IMATRIX | _SLOW | _EXPERTS),
    GgmlType("IQ2_S",   22, 256,   82,  28, _IMATRIX | _SLOW | _EXPERTS),
    GgmlType("Q2_K",    10, 256,   84,  10, _EXPERTS),
    GgmlType("IQ3_XXS", 18, 256,   98,  23, _IMATRIX | _SLOW | _EXPERTS),
    GgmlType("IQ3_S",   21, 256,  110,  26, _SLOW | _EXPERTS),
    GgmlType("Q3_K",    11, 256,  110,  12, _EXPERTS | _MATRICES),
    GgmlType("IQ4_XS",  23, 256,  136,  30, _EXPERTS | _MATRICES),
    GgmlType("IQ4_NL",  20,  32,   18,  25, _MATRICES | _FALLBACK),
    GgmlType("Q4_0",     2,  32,   18,   2, _NONE),
    GgmlType("Q4_K",    12, 256,  144,  15, _EXPERTS | _MATRICES),
    GgmlType("Q5_0",     6,  32,   22,   8, _FALLBACK),
    GgmlType("Q5_K",    13, 256,  176,  17, _EXPERTS | _MATRICES),
    GgmlType("Q6_K",    14, 256,  210,  18, _EXPERTS | _MATRICES),
    GgmlType("Q8_0",     8,  32,   34,   7, _EXPERTS | _MATRICES | _FALLBACK),
    GgmlType("F16",      1,   1,    2,   1, _UNQUANTIZED),
    GgmlType("BF16",    30,   1,    2,  32, _UNQUANTIZED),
    GgmlType("F32",      0,   1,    4,   0, _NONE),
    GgmlType("Q1_0",    41, 128,   18, use=_FOREIGN),
    GgmlType("TQ1_0",   34, 256,   54, use=_FOREIGN),
    GgmlType("TQ2_0",   35, 256,   66, use=_FOREIGN),
    GgmlType("Q2_0",    42,  64,   18, use=_FOREIGN),
    GgmlType("MXFP4",   39,  32,   17, use=_FOREIGN),
    GgmlType("NVFP4",   40,  64,   36, use=_FOREIGN),
    GgmlType("Q4_1",     3,  32,   20, use=_FOREIGN),
    GgmlType("Q5_1",     7,  32,   24, use=_FOREIGN),
    GgmlType("Q8_1",     9,  32,   36, use=_FOREIGN),
    GgmlType("Q8_K",    15, 256,  292, use=_FOREIGN),
    GgmlType("I8",      24,   1,    1, use=_FOREIGN),
    GgmlType("I16",     25,   1,    2, use=_FOREIGN),
    GgmlType("I32",     26,   1,    4, use=_FOREIGN),  # expert maps
    GgmlType("I64",     27,   1,    8, use=_FOREIGN),
    GgmlType("F64",     28,   1,    8, use=_FOREIGN),
)
# fmt: on


def _names(use: Use) -> tuple[str, ...]:
    return tuple(t.name for t in GGML_TYPES if use in t.use)


# Every type that a file may hold, by its id.
TYPES_BY_ID: dict[int, GgmlType] = {t.id: t for t in GGML_TYPES}
TYPES_BY_NAME: dict[str, GgmlType] = {t.name: t for t in GGML_TYPES}
# The quantized types that a source may have.
READABLE = frozenset(t.name for t in GGML_TYPES if t.block_size > 1 and t.name not in ("Q8_1", "Q8_K"))
# The types that mc_gguf writes weights in, by name.
TYPES: dict[str, GgmlType] = {t.name: t for t in GGML_TYPES if Use.FOREIGN not in t.use}
CANDIDATES = _names(Use.EXPERTS)
MATRIX_CANDIDATES = _names(Use.MATRICES)
FALLBACKS = _names(Use.FALLBACK)
SIXTEEN_BIT = _names(Use.UNQUANTIZED)
# The type of the tensors that map experts to their places.
MAP_TYPE = TYPES_BY_ID[26]

# Groups that one projection of one layer can have in a file: GGML_MC_MAX_GROUPS of the patched llama.cpp.
MAX_GROUPS = 13


def ggml_type(name: str) -> GgmlType:
    """The type called `name` (in any case) that weights can be written in.

    Raises McError, with the known names, for any other name.
    """
    try:
        return TYPES[name.upper()]
    except KeyError:
        raise McError(f"unknown ggml type {name!r}; known: {', '.join(TYPES)}") from None
