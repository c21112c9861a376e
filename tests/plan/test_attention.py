"""Attention matrices in the same budget as the experts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mc_gguf.plan.attention import COMPENSATED

from mc_gguf.artifacts import ATTENTION, PROJECTIONS, Calibration, FixedTypes, Plan
from mc_gguf.common.errors import ArtifactError, BudgetError, McError
from mc_gguf.container import file_bytes
from mc_gguf.plan import Budget, FileBytes, plan, stand_in
from mc_gguf.plan.summary import summarize_plan
from tests.support.synthetic_calibration import calibration, with_attention

TYPES = ("IQ3_XXS", "IQ4_XS", "Q4_K", "Q6_K", "Q8_0")


def source() -> Calibration:
    return with_attention(calibration(), TYPES)


def measure(calibrated: Calibration) -> FileBytes:
    assert calibrated.model is not None
    return partial(file_bytes, calibrated.model)


def made(calibrated: Calibration, size: int, attention: Any = (), **options: Any) -> Plan:
    of_file = measure(calibrated)
    return plan(calibrated, Budget(size_bytes=size), file_bytes=of_file, attention=attention, **options)


def weighed(calibrated: Calibration, found: Plan) -> float:
    return divergence(calibrated, found, COMPENSATED)


def divergence(calibrated: Calibration, found: Plan, compensated: float = 1.0) -> float:
    """Predicted, added up one matrix at a time; attention's divided by `compensated`."""
    assert calibrated.model is not None
    price, tokens = calibrated.kld_per_error, calibrated.frequency.sum(axis=1) / 2
    total = 0.0
    for layer in calibrated.layers:
        for p, projection in enumerate(PROJECTIONS):
            for expert, name in enumerate(found.experts[projection][layer]):
                error = calibrated.relative_error[layer, expert, p, calibrated.types.index(name)]
                total += float(error / tokens[layer] * price[layer])
        for part, name in enumerate(found.fixed.attention[layer]):
            t = calibrated.attention_types.index(name)
            total += float(calibrated.attention_error[layer, part, t] * price[layer]) / compensated
    return total


# --- the optimum


@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
@settings(max_examples=10, deadline=None)
def test_optimal_among_all_assignments(seed: int, tightness: float) -> None:
    own = calibration(1, 1, types=("IQ2_XXS", "Q4_K"), seed=seed)
    calibrated = with_attention(own, ("IQ3_XXS", "Q4_K", "Q8_0"), seed)
    every = {}
    for experts in itertools.product(calibrated.types, repeat=3):
        table = {p: ((name,),) for p, name in zip(PROJECTIONS, experts, strict=True)}
        for attention in itertools.product(calibrated.attention_types, repeat=4):
            size = measure(calibrated)(table, FixedTypes(attention=(attention,)))
            every[experts, attention] = size, error_of(calibrated, experts, attention)
    smallest, largest = min(s for s, _ in every.values()), max(s for s, _ in every.values())
    limit = int(smallest + tightness * (largest - smallest))
    best = min(error for size, error in every.values() if size <= limit)
    found = made(calibrated, limit)
    experts = tuple(found.experts[p][0][0] for p in PROJECTIONS)
    assert error_of(calibrated, experts, found.fixed.attention[0]) == pytest.approx(best, rel=1e-9)
    assert found.file_bytes is not None
    assert found.file_bytes <= limit


def error_of(calibrated: Calibration, experts: tuple[str, ...], attention: tuple[str, ...]) -> float:
    """Of one expert and one layer, attention weighed as not compensated."""
    price, tokens = calibrated.kld_per_error[0], calibrated.frequency[0].sum() / 2
    of_experts = sum(
        calibrated.relative_error[0, 0, p, calibrated.types.index(name)] for p, name in enumerate(experts)
    )
    of_attention = sum(
        calibrated.attention_error[0, p, calibrated.attention_types.index(name)]
        for p, name in enumerate(attention)
    )
    return float(price * (of_experts / tokens + of_attention / COMPENSATED))


def test_the_predicted_divergence_is_that_of_the_assignment() -> None:
    calibrated = source()
    found = made(calibrated, 6_000_000)
    assert found.predicted_kld == pytest.approx(divergence(calibrated, found))
    assert found.optimality_gap is not None
    assert found.optimality_gap < 0.01


def test_at_least_as_good_as_any_fixed_types_in_the_same_bytes() -> None:
    calibrated = source()
    free = made(calibrated, 6_000_000)
    for name in TYPES:
        forced = made(calibrated, 6_000_000, (name,))
        assert weighed(calibrated, free) <= weighed(calibrated, forced) * (1 + 1e-3)


# --- the budget


@pytest.mark.parametrize("strategy", ["pmq", "layer"])
@pytest.mark.parametrize("size", [5_000_000, 5_500_123, 6_543_210])
def test_a_file_size_is_never_exceeded(strategy: str, size: int) -> None:
    calibrated = source()
    found = made(calibrated, size, strategy=strategy)
    assert calibrated.model is not None
    assert found.file_bytes == file_bytes(calibrated.model, found.experts, found.fixed)
    assert size - 40_000 < found.file_bytes <= size
    if strategy == "layer":
        assert all(len(set(row)) == 1 for table in found.experts.values() for row in table)


@pytest.mark.parametrize("name", ["Q8_0", "IQ4_XS"])
def test_one_candidate_is_the_plan_with_fixed_types(name: str) -> None:
    calibrated, fixed = source(), FixedTypes(attn=name, attn_kv=name)
    forced = made(calibrated, 6_000_000, (name,))
    same = made(calibrated, 6_000_000, None, fixed=fixed)
    assert forced.experts == same.experts
    assert forced.file_bytes == same.file_bytes
    assert set(itertools.chain(*forced.fixed.attention)) == {name}
    assert same.fixed == fixed


def test_an_infeasible_size_says_the_range() -> None:
    with pytest.raises(BudgetError, match=r"not feasible: .* reach from"):
        made(source(), 1_000_000)


def test_rows_of_odd_length_get_only_what_fits() -> None:
    own = calibration(2, 4, n_embd=288, types=("Q8_0",))
    calibrated = with_attention(own, ("Q4_K", "Q8_0"))
    calibrated.sq_error[...] = calibrated.relative_error[...] = 1.0
    found = made(calibrated, 4_982_368)
    assert set(itertools.chain(*found.fixed.attention)) == {"Q8_0"}
    with pytest.raises(McError, match="can have none of the types Q4_K"):
        made(calibrated, 4_982_368, ("Q4_K",))


# --- refusals


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (Budget(bpw=2.5), {}, "size of the whole file"),
        (Budget(size_bytes=6_000_000), {"strategy": "frequency"}, "strategy pmq or layer"),
        (Budget(size_bytes=6_000_000), {"objective": "block"}, "not by pmq with block"),
        (
            Budget(size_bytes=6_000_000),
            {"attention": ("IQ1_S",)},
            "no errors of attention were measured for IQ1_S",
        ),
        (Budget(size_bytes=6_000_000), {"attention": ("Q77",)}, "unknown ggml type"),
    ],
)
def test_what_cannot_be_is_refused(budget: Budget, options: dict[str, Any], message: str) -> None:
    calibrated = source()
    with pytest.raises(McError, match=message):
        plan(calibrated, budget, file_bytes=measure(calibrated), **{"attention": (), **options})


def test_a_calibration_without_attention_says_what_to_do() -> None:
    with pytest.raises(ArtifactError, match="calibrate again, or leave attention fixed"):
        made(calibration(), 6_000_000)


def test_the_stand_in_plans_it_too() -> None:
    model = calibration().model
    assert model is not None
    assert made(stand_in(model, None), 6_000_000).fixed.attention


# --- files and summary


def test_the_plan_survives_its_file(tmp_path: Path) -> None:
    found = made(source(), 6_000_000)
    saved = found.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == saved
    assert saved.fixed.attention_type(1, "v") == saved.fixed.attention[1][ATTENTION.index("v")]
    text = (tmp_path / "p.json").read_text()
    assert text.count("\n    [") == 4 * 6  # a line a layer: three projections and attention
    (tmp_path / "q.json").write_text(text.replace('"attention": [\n', '"attention": [\n    ["Q4_K"],\n', 1))
    with pytest.raises(ArtifactError, match="attention needs one row of 4 types for each layer"):
        Plan.load(tmp_path / "q.json")


def test_a_calibration_made_before_attention_was_measured_is_read(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    source().save(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="numpy") as file:
        header = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("attention")}
    header["mc_gguf"] = header["mc_gguf"].replace('"attention_types"', '"unknown"')
    save_file(arrays, tmp_path / "old", metadata=header)
    old = Calibration.load(tmp_path / "old")
    assert old.attention_types == ()
    assert old.attention_imatrix(0, "q") is None
    assert not any(old.has(name) for name in ("attention_error", "attention_in", "attention_mid"))


def test_the_summary_counts_layers() -> None:
    found = made(source(), 6_000_000)
    counts = summarize_plan(found).attention_counts
    assert list(counts) == list(ATTENTION)
    assert all(sum(types.values()) == 6 for types in counts.values())
    text = "\n".join(summarize_plan(found).lines())
    assert "attn output" in text
    assert "attn_kv" not in text
    fixed = replace(found, fixed=FixedTypes())
    assert summarize_plan(fixed).attention_counts == {}
    assert "attn_kv Q8_0" in "\n".join(summarize_plan(fixed).lines())


def test_candidates_that_cost_nothing_more_are_best() -> None:
    calibrated = source()
    calibrated.attention_error[...] = 0.0
    found = made(calibrated, 6_000_000)
    assert set(itertools.chain(*found.fixed.attention)) == {"IQ3_XXS"}
    assert np.isfinite(found.predicted_kld or np.nan)
