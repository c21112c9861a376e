"""Matrices that are not experts in the same budget as the experts."""

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

from mc_gguf.artifacts import PROJECTIONS, Calibration, FixedTypes, Plan, TensorSpec
from mc_gguf.common.errors import ArtifactError, BudgetError, McError
from mc_gguf.container import file_bytes
from mc_gguf.plan import Budget, FileBytes, PlanRequest, decides_others, plan, stand_in
from mc_gguf.plan.others import COMPENSATED, build_others, is_decided
from mc_gguf.plan.summary import summarize_plan
from tests.support.synthetic_calibration import MERGED, NO_GATE, calibration, model_info, with_others

TYPES = ("IQ3_XXS", "IQ4_XS", "Q4_K", "Q6_K", "Q8_0")


def source() -> Calibration:
    return with_others(calibration(), TYPES)


def measure(calibrated: Calibration) -> FileBytes:
    assert calibrated.model is not None
    return partial(file_bytes, calibrated.model)


def made(calibrated: Calibration, size: int, others: Any = (), **options: Any) -> Plan:
    of_file = measure(calibrated)
    return plan(calibrated, Budget(size_bytes=size), file_bytes=of_file, others=others, **options)


def weighed(calibrated: Calibration, found: Plan) -> float:
    return divergence(calibrated, found, COMPENSATED)


def divergence(calibrated: Calibration, found: Plan, compensated: float = 1.0) -> float:
    """Predicted, added up one matrix at a time; that of other matrices divided by `compensated`."""
    assert calibrated.model is not None
    price, tokens = calibrated.kld_per_error, calibrated.frequency.sum(axis=1) / 2
    total = 0.0
    for layer in calibrated.layers:
        for p, projection in enumerate(calibrated.model.projections):
            for expert, name in enumerate(found.experts[projection][layer]):
                error = calibrated.relative_error[layer, expert, p, calibrated.types.index(name)]
                total += float(error / tokens[layer] * price[layer])
    return (
        total
        + sum(
            float(
                calibrated.matrix_error[m, calibrated.matrix_types.index(kind)] * calibrated.matrix_price[m]
            )
            for m, kind in (
                (calibrated.matrices.index(name), kind) for name, kind in found.fixed.others.items()
            )
        )
        / compensated
    )


# --- the optimum


@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
@settings(max_examples=10, deadline=None)
def test_optimal_among_all_assignments(seed: int, tightness: float) -> None:
    own = calibration(1, 1, types=("IQ2_XXS", "Q4_K"), seed=seed)
    calibrated = with_others(own, ("IQ3_XXS", "Q4_K", "Q8_0"), seed)
    every = {}
    for experts in itertools.product(calibrated.types, repeat=3):
        table = {p: ((name,),) for p, name in zip(PROJECTIONS, experts, strict=True)}
        for others in itertools.product(calibrated.matrix_types, repeat=4):
            named = dict(zip(calibrated.matrices, others, strict=True))
            size = measure(calibrated)(table, FixedTypes(others=named))
            every[experts, others] = size, error_of(calibrated, experts, others)
    smallest, largest = min(s for s, _ in every.values()), max(s for s, _ in every.values())
    limit = int(smallest + tightness * (largest - smallest))
    best = min(error for size, error in every.values() if size <= limit)
    found = made(calibrated, limit)
    experts = tuple(found.experts[p][0][0] for p in PROJECTIONS)
    chosen = tuple(found.fixed.others[name] for name in calibrated.matrices)
    assert error_of(calibrated, experts, chosen) == pytest.approx(best, rel=1e-9)
    assert found.file_bytes is not None
    assert found.file_bytes <= limit


def error_of(calibrated: Calibration, experts: tuple[str, ...], others: tuple[str, ...]) -> float:
    """Of one expert and one layer, other matrices weighed as not compensated."""
    price, tokens = calibrated.kld_per_error[0], calibrated.frequency[0].sum() / 2
    of_experts = sum(
        calibrated.relative_error[0, 0, p, calibrated.types.index(name)] for p, name in enumerate(experts)
    )
    of_others = sum(
        calibrated.matrix_error[m, calibrated.matrix_types.index(name)] * calibrated.matrix_price[m]
        for m, name in enumerate(others)
    )
    return float(price * of_experts / tokens + of_others / COMPENSATED)


def test_the_predicted_divergence_is_that_of_the_assignment() -> None:
    calibrated = source()
    found = made(calibrated, 6_000_000)
    assert len(found.fixed.others) == 24
    assert len(set(found.fixed.others.values())) > 1
    assert found.predicted_kld == pytest.approx(divergence(calibrated, found))
    assert found.optimality_gap is not None
    assert found.optimality_gap < 0.01


def test_at_least_as_good_as_any_fixed_types_in_the_same_bytes() -> None:
    calibrated = source()
    free = made(calibrated, 6_000_000)
    for name in TYPES:
        forced = made(calibrated, 6_000_000, (name,))
        assert weighed(calibrated, free) <= weighed(calibrated, forced) * (1 + 1e-3)


def test_what_rounding_costs_decides() -> None:
    """Two matrices with the same errors: the bits go to the one whose errors have the higher price."""
    calibrated = source()
    dear, cheap = (calibrated.matrices.index(f"blk.{layer}.attn_q.weight") for layer in (1, 4))
    calibrated.matrix_error[cheap] = calibrated.matrix_error[dear]
    calibrated.matrix_price[dear], calibrated.matrix_price[cheap] = 1.0, 1e-9
    found = made(calibrated, 6_000_000).fixed.others
    assert found["blk.1.attn_q.weight"] == "Q8_0"
    assert found["blk.4.attn_q.weight"] == "IQ3_XXS"


def test_an_error_estimated_below_zero_counts_as_none() -> None:
    calibrated = source()
    calibrated.matrix_error[0] = -1.0
    found = made(calibrated, 6_000_000)
    assert found.fixed.others[calibrated.matrices[0]] == "IQ3_XXS"
    assert found.predicted_kld is not None
    assert found.predicted_kld > 0


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


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
@pytest.mark.parametrize("strategy", ["pmq", "layer"])
def test_beside_experts_with_other_matrices(strategy: str, projections: tuple[str, ...]) -> None:
    calibrated = with_others(calibration(3, n_ff=(256, 768, 512), projections=projections), TYPES)
    smallest = measure(calibrated)({p: [["IQ1_S"] * 8] * 3 for p in projections}, FixedTypes())
    limit = smallest + 1_234_567
    found = made(calibrated, limit, strategy=strategy)
    assert found.file_bytes == measure(calibrated)(found.experts, found.fixed)
    assert limit - 100_000 < found.file_bytes <= limit
    assert found.predicted_kld == pytest.approx(divergence(calibrated, found))


@pytest.mark.parametrize("name", ["Q8_0", "IQ4_XS"])
def test_one_candidate_is_the_plan_with_fixed_types(name: str) -> None:
    calibrated, fixed = source(), FixedTypes(attn=name, attn_kv=name)
    forced = made(calibrated, 6_000_000, (name,))
    same = made(calibrated, 6_000_000, None, fixed=fixed)
    assert forced.experts == same.experts
    assert forced.file_bytes == same.file_bytes
    assert set(forced.fixed.others.values()) == {name}
    assert same.fixed == fixed


def test_more_types_than_a_stack_can_have() -> None:
    calibrated = source()
    assert len(calibrated.types) == 14
    found = made(calibrated, 11_000_000)
    assert max(len(set(row)) for table in found.experts.values() for row in table) <= 13
    assert "Q8_0" in {name for table in found.experts.values() for row in table for name in row}


def test_an_infeasible_size_says_the_range() -> None:
    with pytest.raises(BudgetError, match=r"not feasible: .* reach from"):
        made(source(), 1_000_000)


def test_rows_of_odd_length_get_only_what_fits() -> None:
    calibrated = with_others(calibration(2, 4, n_embd=288, types=("Q8_0",)), ("Q4_K", "Q8_0"))
    found = made(calibrated, 4_982_368)
    assert len(found.fixed.others) == len(calibrated.matrices)
    assert set(found.fixed.others.values()) == {"Q8_0"}
    with pytest.raises(McError, match="no matrix but the experts can have any of the types Q4_K"):
        made(calibrated, 4_982_368, ("Q4_K",))


def test_matrices_that_no_type_fits_keep_the_fixed_ones() -> None:
    calibrated = source()
    calibrated.matrix_error[3] = np.inf
    others = build_others(calibrated, ())
    assert len(others.names) == 23
    assert np.isfinite(others.kld).all()
    found = made(calibrated, 6_000_000)
    assert calibrated.matrices[3] not in found.fixed.others
    assert len(found.fixed.others) == 23
    assert found.file_bytes == measure(calibrated)(found.experts, found.fixed)


def test_a_type_without_an_error_is_never_chosen() -> None:
    calibrated = source()
    calibrated.matrix_error[:, [0, 1]] = np.inf
    found = made(calibrated, 6_000_000)
    assert len(found.fixed.others) == 24
    assert set(found.fixed.others.values()) <= {"Q4_K", "Q6_K", "Q8_0"}


# --- refusals


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (Budget(bpw=2.5), {}, "size of the whole file"),
        (Budget(size_bytes=6_000_000), {"strategy": "frequency"}, "strategy pmq or layer"),
        (Budget(size_bytes=6_000_000), {"objective": "block"}, "not by pmq with block"),
        (
            Budget(size_bytes=6_000_000),
            {"others": ("IQ1_S",)},
            "no errors of matrices other than experts were measured for IQ1_S, only for IQ3_XXS, IQ4_XS,",
        ),
        (Budget(size_bytes=6_000_000), {"others": ("Q77",)}, "unknown ggml type"),
    ],
)
def test_what_cannot_be_is_refused(budget: Budget, options: dict[str, Any], message: str) -> None:
    calibrated = source()
    with pytest.raises(McError, match=message):
        plan(calibrated, budget, file_bytes=measure(calibrated), **{"others": (), **options})


def test_a_calibration_without_other_matrices_says_what_to_do() -> None:
    with pytest.raises(ArtifactError, match="calibrate again, or leave others fixed"):
        made(calibration(), 6_000_000)


@pytest.mark.parametrize(
    ("budget", "strategy", "objective", "expected"),
    [
        (Budget(size_bytes=1), "pmq", None, True),
        (Budget(size_bytes=1), "layer", "kld", True),
        (Budget(size_bytes=1), "pmq", "block", False),
        (Budget(size_bytes=1), "uniform", None, False),
        (Budget(size_bytes=1), "best", None, False),
        (Budget(bpw=2.5), "pmq", None, False),
    ],
)
def test_when_they_are_decided(budget: Budget, strategy: str, objective: str | None, expected: bool) -> None:
    assert decides_others(source(), budget, strategy, objective) == expected
    assert not decides_others(calibration(), budget, strategy, objective)


def test_what_a_request_means() -> None:
    calibrated, size = source(), 6_000_000
    assert PlanRequest(size=size).other_types(calibrated) == ()
    assert PlanRequest(bpw=2.5).other_types(calibrated) is None
    assert PlanRequest(size=size).other_types(calibration()) is None
    assert PlanRequest(size=size, attn_type="Q8_0").other_types(calibrated) is None
    assert PlanRequest(size=size, embd_type="Q8_0").other_types(calibrated) == ()
    assert PlanRequest(size=size, others="fixed").other_types(calibrated) is None
    assert PlanRequest(size=size, others="auto").other_types(calibrated) == ()
    assert PlanRequest(size=size, others="q4_k, Q8_0").other_types(calibrated) == ("Q4_K", "Q8_0")
    with pytest.raises(McError, match="others chooses the types that attn_type and attn_kv_type fix"):
        PlanRequest(size=size, others="auto", attn_kv_type="Q8_0").other_types(calibrated)


# --- before a calibration


def test_the_stand_in_plans_them_too() -> None:
    model = calibration().model
    assert model is not None
    found = made(stand_in(model, None), 6_000_000)
    assert {name.split(".")[2] for name in found.fixed.others} == {
        f"attn_{x}" for x in ("q", "k", "v", "output")
    }
    assert len(found.fixed.others) == 24


def test_the_stand_in_of_a_model_without_such_matrices() -> None:
    model = model_info(2)
    bare = replace(model, tensors=tuple(t for t in model.tensors if ".attn_" not in t.name))
    calibrated = stand_in(bare, None)
    assert calibrated.matrices == calibrated.matrix_types == ()
    assert not calibrated.has("matrix_error")
    assert not decides_others(calibrated, Budget(size_bytes=6_000_000), "pmq", None)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (256, 256), True),
        ("blk.0.attn_kv_b.weight", (256, 256), True),
        ("blk.0.ffn_gate_shexp.weight", (256, 256), True),
        ("blk.0.ffn_up.weight", (256, 256), True),
        ("blk.0.ssm_out.weight", (256, 256), True),
        ("blk.0.ffn_up_exps.weight", (256, 256, 8), False),
        ("blk.0.ffn_gate_inp.weight", (256, 8), False),
        ("blk.0.ffn_gate_inp_shexp.weight", (256, 1), False),
        ("blk.0.attn_norm.weight", (256,), False),
        ("token_embd.weight", (256, 256), False),
        ("output.weight", (256, 256), False),
    ],
)
def test_which_matrices_are_likely_to_be_measured(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_decided(TensorSpec(name, shape, "BF16")) == expected


# --- files and summary


def test_the_plan_survives_its_file(tmp_path: Path) -> None:
    found = made(source(), 6_000_000)
    saved = found.save(tmp_path / "p.json")
    loaded = Plan.load(tmp_path / "p.json")
    assert loaded == saved
    assert list(loaded.fixed.others.items()) == list(found.fixed.others.items())
    text = (tmp_path / "p.json").read_text()
    assert text.count("\n    [") == 3 * 6 + 24  # a line a layer and projection, and one a matrix
    assert f'\n    ["blk.1.attn_v.weight", "{found.fixed.others["blk.1.attn_v.weight"]}"]' in text
    (tmp_path / "q.json").write_text(text.replace('"others": [\n', '"others": [\n    ["Q4_K"],\n', 1))
    with pytest.raises(ArtifactError, match=r"q\.json is not a valid plan"):
        Plan.load(tmp_path / "q.json")


def test_a_calibration_without_other_matrices_is_read(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    source().save(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="numpy") as file:
        header = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("matrix")}
    save_file(arrays, tmp_path / "old", metadata=header)
    old = Calibration.load(tmp_path / "old")
    assert old.matrix_imatrix("blk.0.attn_q.weight") is None
    assert not any(old.has(name) for name in ("matrix_error", "matrix_price", "matrix_in"))
    assert not decides_others(old, Budget(size_bytes=6_000_000), "pmq", None)


def test_the_summary_counts_matrices() -> None:
    found = made(source(), 6_000_000)
    counts = summarize_plan(found).other_counts
    assert sum(counts.values()) == 24
    assert list(counts) == [name for name in TYPES if name in counts]
    for name, n in counts.items():
        assert n == list(found.fixed.others.values()).count(name)
    text = "\n".join(summarize_plan(found).lines())
    assert f"other matrices  {', '.join(f'{n} {name}' for name, n in counts.items())}" in text
    assert "attn_kv Q8_0" in text  # of what was not measured
    assert "blk." not in text
    fixed = replace(found, fixed=FixedTypes())
    assert summarize_plan(fixed).other_counts == {}
    assert "other matrices" not in "\n".join(summarize_plan(fixed).lines())


def test_candidates_that_cost_nothing_more_are_best() -> None:
    calibrated = source()
    calibrated.matrix_error[...] = 0.0
    found = made(calibrated, 6_000_000)
    assert set(found.fixed.others.values()) == {"IQ3_XXS"}
    assert np.isfinite(found.predicted_kld or np.nan)
