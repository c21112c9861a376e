"""The summary says what the plan holds."""

from __future__ import annotations

import json
from functools import partial

import pytest

from mc_gguf.artifacts import PROJECTIONS, Calibration
from mc_gguf.container import file_bytes
from mc_gguf.plan import Budget
from mc_gguf.plan import plan as make_plan
from mc_gguf.plan.summary import summarize_plan
from tests.support import ROOT
from tests.support.synthetic_calibration import K_QUANTS, MERGED, NO_GATE, calibration

DATA = ROOT / "tests" / "data" / "mixtral-8x7b"


def test_the_summary_says_what_the_plan_says() -> None:
    source = calibration()
    assert source.model is not None
    size = partial(file_bytes, source.model)
    plan = make_plan(source, Budget(size_bytes=6_000_000), file_bytes=size)
    summary = summarize_plan(plan)
    assert (summary.n_layer, summary.n_expert, summary.notes) == (6, 8, ())
    assert all(sum(summary.type_counts[p].values()) == 48 for p in PROJECTIONS)
    for p in PROJECTIONS:
        for name, n in summary.type_counts[p].items():
            assert n == sum(row.count(name) for row in plan.experts[p])
    text = dict(line.split(maxsplit=1) for line in summary.lines())
    assert text["plan"] == "pmq, objective kld, budget 6,000,000 bytes (5.72 MiB)"
    assert f"{plan.file_bytes:,} bytes" in "\n".join(summary.lines())
    assert text["bits"] == f"{plan.expert_bpw:.4f} per expert weight"
    assert text["layers"] == "6 of 8 experts"
    assert text["fixed"] == "attn_kv Q8_0, attn Q6_K, token_embd Q6_K, output Q6_K"
    assert text["predicted"] == f"KLD   {plan.predicted_kld:.4g} nats per token"
    assert "% of the experts' output energy" in "\n".join(summary.lines())
    assert text["optimality"].startswith("gap")


def test_the_counts_go_from_small_to_large_types() -> None:
    plan = make_plan(calibration(), Budget(bpw=2.5), types=("Q4_K", "IQ1_S"))
    assert list(summarize_plan(plan).type_counts["gate"]) == ["IQ1_S", "Q4_K"]


def test_the_json_form_is_json() -> None:
    summary = summarize_plan(make_plan(calibration(), Budget(bpw=2.5)))
    data = json.loads(json.dumps(summary.to_json()))
    assert data["budget"] == {"bpw": 2.5}
    assert data["fixed"]["attn"] == "Q6_K"
    assert set(data["type_counts"]) == set(PROJECTIONS)


@pytest.mark.parametrize("projections", [MERGED, NO_GATE])
def test_the_counts_are_of_the_model_s_own_matrices(projections: tuple[str, ...]) -> None:
    summary = summarize_plan(make_plan(calibration(projections=projections), Budget(bpw=2.5)))
    assert tuple(summary.type_counts) == projections
    assert (summary.n_layer, summary.n_expert) == (6, 8)
    assert all(sum(counts.values()) == 48 for counts in summary.type_counts.values())
    assert [line.split()[0] for line in summary.lines()][4:6] == list(projections)


def test_published_statistics_are_noted_to_have_no_sizes() -> None:
    source = Calibration.load(DATA / "calibration.json")
    lines = summarize_plan(make_plan(source, Budget(bits_per_layer=16), "mc")).lines()
    assert lines[0].endswith("mc, objective published, budget 16 nominal bits per layer")
    assert "no file can be made from this plan" in lines[-1]
    assert not any(line.startswith(("file size", "predicted")) for line in lines)


def test_a_fallback_is_noted() -> None:
    source = calibration(n_ff=288, types=K_QUANTS)
    notes = summarize_plan(make_plan(source, Budget(bpw=3.2))).notes
    assert len(notes) == 1
    assert notes[0].startswith("down: its rows fit none of IQ1_S, ")
    assert "all of its experts get IQ4_NL" in notes[0]
