"""Super experts: which experts are found by their extreme activations."""

from __future__ import annotations

import numpy as np

from mc_gguf.artifacts import Calibration
from mc_gguf.calibrate.super_experts import super_experts
from tests.support import ROOT
from tests.support.synthetic_calibration import calibration

PUBLISHED = ROOT / "tests" / "data" / "mixtral-8x7b" / "calibration.json"


def test_mixtral_has_the_one_that_is_known() -> None:
    (found,) = super_experts(Calibration.load(PUBLISHED))
    assert (found.layer, found.expert, found.massive) == (1, 3, False)
    assert 120 < found.error_ratio < 125
    assert str(found) == "layer 1 expert 3 (error 122 times its layer's median)"


def test_an_outlier_counts_only_where_hidden_states_are_massive() -> None:
    source = calibration()
    down = np.ones((6, 8))
    down[2, 5] = 300.0
    source = source.with_statistics(down_max=down)
    assert super_experts(source) == ()
    largest = np.full(6, 10.0)
    largest[3] = 2000.0
    assert super_experts(source.with_statistics(hidden_max=largest)) == ()
    largest[2] = 2000.0
    (found,) = super_experts(source.with_statistics(hidden_max=largest))
    assert (found.layer, found.expert, found.down_max, found.massive) == (2, 5, 300.0, True)
    assert str(found).startswith("layer 2 expert 5 (massive activations, down output up to 300; error")


def test_layers_at_rest_have_none() -> None:
    source = calibration()
    assert super_experts(source.with_statistics(nominal_error=np.zeros((6, 8, 3)))) == ()
