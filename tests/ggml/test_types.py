"""The table of ggml types against llama.cpp's documentation and gguf-py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mc_gguf.common.errors import McError
from mc_gguf.ggml.types import (
    CANDIDATES,
    FALLBACKS,
    FILE_TYPE_GUESSED,
    GGML_TYPES,
    MATRIX_CANDIDATES,
    READABLE,
    SIXTEEN_BIT,
    TYPES,
    TYPES_BY_ID,
    TYPES_BY_NAME,
    ggml_type,
)
from mc_gguf.runtime import packages

# Bits per weight as llama.cpp's documentation states them: a second source for block sizes and bytes.
RATES = {
    "IQ1_S": 1.5625,
    "IQ1_M": 1.75,
    "IQ2_XXS": 2.0625,
    "IQ2_XS": 2.3125,
    "IQ2_S": 2.5625,
    "Q2_K": 2.625,
    "IQ3_XXS": 3.0625,
    "IQ3_S": 3.4375,
    "Q3_K": 3.4375,
    "IQ4_XS": 4.25,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "Q4_0": 4.5,
    "IQ4_NL": 4.5,
    "Q5_0": 5.5,
    "Q8_0": 8.5,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
}


def test_every_type_has_its_published_rate() -> None:
    assert {name: t.bpw for name, t in TYPES.items()} == RATES


def test_ids_are_unique_and_names_match() -> None:
    assert len({t.id for t in TYPES.values()}) == len(TYPES)
    assert all(name == t.name for name, t in TYPES.items())


def test_candidates_are_known_in_order_of_size() -> None:
    rates = [TYPES[name].bpw for name in CANDIDATES]
    assert rates == sorted(rates)
    assert not set(CANDIDATES) & set(SIXTEEN_BIT)


def test_what_needs_an_importance_matrix() -> None:
    needing = {name for name, t in TYPES.items() if t.needs_imatrix}
    assert needing == {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}


def test_fallbacks_fit_rows_that_other_candidates_do_not() -> None:
    assert all(TYPES[name].fits(288) for name in FALLBACKS)
    assert not any(TYPES[name].fits(288) for name in {*CANDIDATES, *MATRIX_CANDIDATES} - {*FALLBACKS})


def test_candidates_reach_from_the_smallest_type_to_eight_bits() -> None:
    """So that every budget up to 8.5 bits per weight can be met without naming types."""
    assert (CANDIDATES[0], CANDIDATES[-1]) == (min(RATES, key=lambda n: RATES[n]), "Q8_0")
    gaps = [TYPES[b].bpw - TYPES[a].bpw for a, b in itertools.pairwise(CANDIDATES)]
    assert max(gaps) < 2
    assert MATRIX_CANDIDATES[-1] == "Q8_0"
    assert not any(TYPES[name].needs_imatrix for name in MATRIX_CANDIDATES)


def test_what_a_source_may_have() -> None:
    """All quantized types but those that ggml uses for activations alone."""
    quantized = {t.name for t in GGML_TYPES if t.block_size > 1}
    assert quantized - READABLE == {"Q8_1", "Q8_K"}
    assert READABLE < quantized
    assert {"MXFP4", "NVFP4", "Q4_1"} < READABLE
    assert all(TYPES_BY_NAME[t.name] is t is TYPES_BY_ID[t.id] for t in GGML_TYPES)


def test_the_table_is_sorted_by_size() -> None:
    """Everything that is derived from the table relies on its order."""
    rates = [t.bpw for t in TYPES.values()]
    assert rates == sorted(rates)


def test_every_type_that_is_written_has_its_own_file_type() -> None:
    found = [t.file_type for t in TYPES.values()]
    assert len(set(found)) == len(found)
    assert FILE_TYPE_GUESSED not in found


def test_row_bytes_count_whole_blocks() -> None:
    assert TYPES["Q4_K"].row_bytes(512) == 288
    assert TYPES["Q8_0"].row_bytes(64) == 68
    assert TYPES["F32"].row_bytes(3) == 12


def test_row_bytes_refuse_a_broken_block() -> None:
    with pytest.raises(McError, match="multiple of 256, not 300"):
        TYPES["IQ1_S"].row_bytes(300)


def test_a_type_is_found_in_any_case() -> None:
    assert ggml_type("iq2_xxs") is TYPES["IQ2_XXS"]


def test_an_unknown_type_is_answered_with_the_known_ones() -> None:
    with pytest.raises(McError, match=r"unknown ggml type 'IQ9_Z'; known: IQ1_S, IQ1_M, .*F32$"):
        ggml_type("IQ9_Z")


@pytest.fixture(scope="module")
def gguf() -> Any:
    """The second implementation, in the pinned source."""
    return packages.load_gguf()


@pytest.mark.native
def test_the_pinned_gguf_has_the_same_types(gguf: Any) -> None:
    sizes = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {i: (t.name, t.block_size, t.block_bytes) for i, t in TYPES_BY_ID.items()} == sizes


@pytest.mark.native
@pytest.mark.parametrize("name", TYPES)
def test_the_pinned_gguf_has_the_same_file_types(gguf: Any, name: str) -> None:
    """llama_ftype names mixtures of k-quants (Q4_K_M, Q3_K_S) as well as types."""
    found = gguf.LlamaFileType(TYPES[name].file_type).name
    assert found in ("ALL_F32", f"MOSTLY_{name}", f"MOSTLY_{name}_M")


@pytest.mark.parametrize(
    ("cols", "advice"),
    [(96, "use IQ4_NL, Q5_0, Q8_0, F16 or BF16 for this tensor"), (100, "use F16 or BF16 for this tensor")],
)
def test_the_advice_for_rows_that_do_not_fit_names_types_that_do(cols: int, advice: str) -> None:
    with pytest.raises(McError, match=f"multiple of 256, not {cols}; {advice}"):
        ggml_type("Q4_K").row_bytes(cols)
