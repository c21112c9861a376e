"""What a user may ask of dynamic routing, as text and in Python, and what the runtime is told for it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from mc_gguf.artifacts import Calibration
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.routing import Routing, RoutingMetadata, default_metadata, describe_policies, resolve
from mc_gguf.routing.options import OPTIONS
from mc_gguf.routing.params import RUNTIME_POLICIES, RoutingParams, RoutingShape
from mc_gguf.routing.policy import POLICIES
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.thresholds import quantiles_for_drop, thresholds_at, tolerant_layers
from tests.support.routing_predictions import predicted_drop
from tests.support.synthetic_calibration import calibration as make_calibration
from tests.support.synthetic_calibration import synthetic_routing

SHAPE = RoutingShape(n_layer=6, n_rank=3, n_expert=8)
PLAIN_SHAPE = RoutingShape(n_layer=6, n_rank=2, n_expert=8)
LAYERS = (1, 2, 3, 4, 5)  # with experts


def profile(n_rank: int = 3) -> RoutingProfile:
    arrays = synthetic_routing(len(LAYERS), n_rank, 11)
    arrays["routing_sensitivity"][-1] = 1.0  # one layer that does not tolerate it
    return RoutingProfile(
        LAYERS, 6, arrays["ratio_quantiles"], arrays["routing_sensitivity"], arrays["routing_curve"]
    )


def metadata(**changes: Any) -> RoutingMetadata:
    thresholds = np.zeros((6, 3), dtype=np.float32)
    thresholds[1:, 1:] = 0.25
    return replace(RoutingMetadata(thresholds, (1, 3), 0.05, profile()), **changes)


def active(params: RoutingParams) -> list[int]:
    assert params.active is not None
    return np.flatnonzero(params.active).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", Routing("auto")),
        ("off", Routing("off")),
        ("odp", Routing()),
        (" odp:quantile=0.3, protect=5% ", Routing(quantile=0.3, protect=0.05)),
        ("odp:target_drop=15%,layers=0,2,5", Routing(target_drop=0.15, layers=[5, 0, 2])),
        ("odp:layers=auto,importance=last", Routing(layers="auto", importance="last")),
        ("odp:calibration=a,b.calib", Routing(calibration="a,b.calib")),
        ("threshold:threshold=0.5", Routing("threshold", threshold=0.5)),
        ("threshold:threshold=0.5,1,layers=all", Routing("threshold", threshold=[0.5, 1], layers="all")),
        ("keep_min:ratio=0.4,keep_min=2", Routing("keep_min", ratio=0.4, keep_min=2)),
        ("top_p:top_p=0.9", Routing("top_p", top_p=0.9)),
        ("random:rate=0.3,seed=1", Routing("random", rate=0.3, seed=1)),
    ],
)
def test_text_says_what_python_says(text: str, expected: Routing) -> None:
    assert Routing.parse(text) == expected
    assert hash(Routing.parse(text)) == hash(expected)
    assert Routing.of(text) == Routing.of(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no routing policy ''; choose from auto, off, odp, threshold"),
        ("fast", "there is no routing policy 'fast'"),
        ("off:rate=1", "routing 'off' has no option 'rate'; its options: none"),
        ("keep_min:protect=0.1", "routing 'keep_min' has no option 'protect'; its options: keep_min, ratio"),
        ("odp:0.5", "'0.5' is not option=value"),
        ("odp:protect=1%,protect=2%", "gives protect twice"),
        ("odp:quantile=1.5", "'1.5' is not a share"),
        ("odp:quantile=0.3,0.4", "'0.3,0.4' is not a share"),
        ("odp:quantile=0.3,target_drop=10%", "takes one of quantile and target_drop, not both"),
        ("odp:importance=age", "there is no routing importance 'age'; choose from attention, l1"),
        ("odp:layers=some", "'some' names no layers"),
        ("threshold:threshold=high", "threshold=high is not a number"),
        ("threshold:threshold=-1", "threshold must be a number not below 0"),
        ("threshold:threshold=nan", "threshold must be a number not below 0"),
        ("keep_min:ratio=-1", "ratio must not be negative"),
        ("keep_min:ratio=nan", "ratio must not be negative"),
        ("keep_min:ratio=1,2", "ratio=1,2 is not a number"),
        ("keep_min:keep_min=0", "keep_min must be an integer from 1"),
        ("keep_min:keep_min=1.5", "keep_min=1.5 is not an integer"),
        ("random:seed=-1", "seed must be an integer from 0"),
    ],
)
def test_wrong_text_is_explained(text: str, message: str) -> None:
    with pytest.raises(McError, match=message):
        Routing.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "top_p", "top_p": 1.5}, "top_p must be from 0 to 1, but it is 1.5"),
        ({"protect": float("nan")}, "protect must be from 0 to 1"),
        ({"policy": "random", "quantile": 0.5}, "routing 'random' has no option 'quantile'"),
        ({"policy": "random", "seed": 2**32}, "seed must be an integer"),
        ({"layers": ()}, "layers must be numbers from 0, or the word all or auto"),
        ({"layers": [-1]}, "layers must be numbers from 0"),
        ({"layers": "some"}, "layers must be numbers from 0"),
        ({"threshold": [[1.0], [1.0, 2.0]]}, "threshold must be numbers, in rows of equal length"),
        ({"threshold": [[[1.0]]]}, r"threshold must be a number not below 0, one number per layer, or rows"),
        ({"threshold": []}, "threshold must be a number not below 0"),
    ],
)
def test_wrong_arguments_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(McError, match=message):
        Routing(**options)


def test_every_policy_of_the_runtime_can_be_asked_for() -> None:
    assert set(POLICIES) == {*RUNTIME_POLICIES, "auto"}


def test_the_tables_and_the_fields_of_a_routing_agree() -> None:
    assert set(OPTIONS) == {field.name for field in fields(Routing)} - {"policy"}
    assert {name for policy in POLICIES.values() for name in policy.options} == set(OPTIONS)


def test_the_help_names_every_policy_and_option() -> None:
    text = "\n".join(describe_policies())
    for name in (*POLICIES, *OPTIONS):
        assert f"\n  {name} " in text
    assert (
        "top_p        share of the selected experts' weight that is kept (0 to 1, or a percentage; for top_p)"
        in text
    )


def test_auto_is_what_the_file_carries() -> None:
    assert resolve(Routing("auto"), None, SHAPE).policy == "off"
    assert resolve(Routing("auto"), None, RoutingShape(0, 0, 0)).policy == "off"
    found = resolve(Routing("auto"), metadata(), SHAPE)
    assert (found.policy, found.importance, found.protect) == ("odp", "attention", 0.05)
    assert found.thresholds is not None
    np.testing.assert_array_equal(found.thresholds, metadata().thresholds)
    assert active(found) == [1, 3]
    assert Routing("auto").settled(None) == Routing("off")
    assert Routing("auto").settled(metadata()) == Routing("odp")


def test_the_user_goes_before_the_file() -> None:
    found = resolve(Routing(protect=0.5, layers=[0, 2], importance="l1"), metadata(), SHAPE)
    assert (found.protect, found.importance) == (0.5, "l1")
    assert active(found) == [0, 2]
    assert resolve(Routing(layers="all"), metadata(), SHAPE).active is None
    assert (
        active(resolve(Routing(layers="auto"), metadata(), SHAPE))
        == list(tolerant_layers(profile()))
        != list(LAYERS)
    )


def test_without_a_file_the_numbers_are_enough() -> None:
    found = resolve(Routing(threshold=0.5), None, SHAPE)
    assert found.thresholds is not None
    np.testing.assert_array_equal(found.thresholds, np.tile([0, 0.5, 0.5], (6, 1)))
    assert found.thresholds.dtype == np.float32
    assert found.active is None
    assert found.protect == 0.02


def test_thresholds_by_layer_and_rank() -> None:
    by_layer = resolve(Routing(threshold=[0, 1, 2, 3, 4, 5]), None, SHAPE).thresholds
    assert by_layer is not None
    assert by_layer[:, 0].tolist() == [0] * 6
    assert by_layer[:, 1].tolist() == by_layer[:, 2].tolist() == [0, 1, 2, 3, 4, 5]
    of_experts = resolve(Routing(threshold=[1, 2, 3, 4, 5]), metadata(), SHAPE).thresholds
    np.testing.assert_array_equal(of_experts, by_layer)
    rows = np.arange(12).reshape(6, 2)
    by_rank = resolve(Routing(threshold=rows.tolist()), metadata(), SHAPE).thresholds
    assert by_rank is not None
    np.testing.assert_array_equal(by_rank[:, 1:], rows)
    for wrong, message in (
        ([1.0, 2.0], "for 2 layers; this model has 6 or 5, those with experts"),
        ([[1.0]] * 6, "rows of 1; this model uses 3 experts per token, so a row has 2"),
    ):
        with pytest.raises(McError, match=message):
            resolve(Routing(threshold=wrong), metadata(), SHAPE)
    with pytest.raises(McError, match=r"for 5 layers; this model has 6$"):
        resolve(Routing(threshold=[1, 2, 3, 4, 5]), None, SHAPE)


def test_thresholds_at_a_quantile() -> None:
    found = resolve(Routing("threshold", quantile=0.3), metadata(), SHAPE)
    np.testing.assert_array_equal(found.thresholds, thresholds_at(profile(), np.full(5, 0.3)))
    assert active(found) == [1, 3]


def test_thresholds_for_a_wanted_saving_choose_among_all_layers() -> None:
    found = resolve(Routing(target_drop=0.2), metadata(), SHAPE)
    quantiles = quantiles_for_drop(profile(), 0.2, None)
    assert predicted_drop(profile(), quantiles) == pytest.approx(0.2)
    np.testing.assert_array_equal(found.thresholds, thresholds_at(profile(), quantiles))
    assert active(found) == [n for n, q in zip(LAYERS, quantiles, strict=True) if q > 0]
    some = resolve(Routing(target_drop=0.2, layers=[2, 3]), metadata(), SHAPE)
    np.testing.assert_array_equal(
        some.thresholds, thresholds_at(profile(), quantiles_for_drop(profile(), 0.2, [2, 3]))
    )
    with pytest.raises(McError, match="cannot be dropped"):
        resolve(Routing(target_drop=0.9), metadata(), SHAPE)


def test_a_calibration_stands_in_for_the_file() -> None:
    measured, routing = make_calibration(), Routing(calibration="a.calib")
    known = RoutingProfile.of(measured)
    found = resolve(routing, None, PLAIN_SHAPE, measured)
    np.testing.assert_array_equal(found.thresholds, default_metadata(known).thresholds)
    assert active(found) == list(default_metadata(known).active)
    found = resolve(replace(routing, quantile=0.2), None, PLAIN_SHAPE, measured)
    np.testing.assert_array_equal(found.thresholds, thresholds_at(known, np.full(6, 0.2)))
    of_other = metadata(model="0" * 64)
    for file, shape, message in (
        (None, RoutingShape(5, 2, 8), "a model with 6 layers of 8 experts, but this one has 5 layers of 8"),
        (None, RoutingShape(6, 2, 4), "this one has 6 layers of 4"),
        (of_other, PLAIN_SHAPE, "is of another model than this file"),
    ):
        with pytest.raises(ArtifactError, match=message):
            resolve(routing, file, shape, measured)
    assert measured.model is not None
    unmeasured = Calibration.blank(measured.model)
    with pytest.raises(ArtifactError, match=r"a\.calib measured nothing about routing"):
        resolve(routing, None, PLAIN_SHAPE, unmeasured)
    with pytest.raises(McError, match=r"resolve\(\) needs the calibration that a\.calib holds"):
        resolve(routing, None, PLAIN_SHAPE)


@pytest.mark.parametrize(
    ("routing", "carried", "message"),
    [
        (
            Routing(),
            None,
            "carries no thresholds for routing 'odp'; give threshold=NUMBER or calibration=FILE",
        ),
        (Routing("threshold"), None, "carries no thresholds for routing 'threshold'"),
        (Routing(quantile=0.5), None, "routing quantile needs what a calibration measured"),
        (Routing(target_drop=0.1), metadata(profile=None), "routing target_drop needs"),
        (Routing(layers="auto", threshold=1), metadata(profile=None), "layers='auto' needs"),
        (Routing("random", rate=0.1, layers=[6]), None, "no layer 6; this model has the layers 0 to 5"),
    ],
)
def test_what_is_missing_is_explained(
    routing: Routing, carried: RoutingMetadata | None, message: str
) -> None:
    with pytest.raises(McError, match=message):
        resolve(routing, carried, SHAPE)


def test_thresholds_of_more_layers_and_ranks_than_run_are_cut() -> None:
    small = RoutingShape(5, 2, 8)
    found = resolve(Routing(), metadata(), small).thresholds
    np.testing.assert_array_equal(found, metadata().thresholds[:5, :2])
    for shape in (RoutingShape(6, 4, 8), RoutingShape(7, 3, 8)):
        with pytest.raises(
            McError, match="thresholds for 6 layers and 3 experts per token, but the model runs"
        ):
            resolve(Routing(), metadata(), shape)
        assert resolve(Routing("keep_min", ratio=0.5), metadata(), shape).policy == "keep_min"


def test_a_model_without_experts_takes_only_off() -> None:
    assert resolve(Routing("off"), None, RoutingShape(0, 0, 0)).policy == "off"
    with pytest.raises(McError, match="no experts to drop, so routing 'random' is impossible"):
        resolve(Routing("random", rate=0.1), None, RoutingShape(0, 0, 0))


def test_the_other_policies_get_their_numbers() -> None:
    found = resolve(Routing("keep_min", keep_min=2, ratio=0.4), None, SHAPE)
    assert (found.policy, found.keep_min, found.ratio, found.thresholds) == ("keep_min", 2, 0.4, None)
    assert resolve(Routing("top_p", top_p=0.9), None, SHAPE).top_p == 0.9
    found = resolve(Routing("random", rate=0.3, seed=7), metadata(), SHAPE)
    assert (found.rate, found.seed) == (0.3, 7)
    assert active(found) == [1, 3]


@pytest.mark.parametrize("routing", [5, None, ["odp"], b"odp"])
def test_what_is_no_routing_is_refused(routing: Any) -> None:
    with pytest.raises(McError, match="give a policy as text"):
        Routing.of(routing)
