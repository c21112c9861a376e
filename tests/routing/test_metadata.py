"""The routing keys of a GGUF: written and read back, every broken rule named, and files changed in nothing
else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mc_gguf import container
from mc_gguf.artifacts import PROJECTIONS, Calibration, FixedTypes
from mc_gguf.common.errors import ArtifactError, FormatError, McError
from mc_gguf.common.progress import progress
from mc_gguf.container.routing import routing_bytes, routing_kv
from mc_gguf.ggml.gguf_file import ARRAY, FLOAT32, FLOAT64, STRING, UINT32, Value, encode_kv, read_header
from mc_gguf.routing import RoutingMetadata, default_metadata
from mc_gguf.routing.metadata import choose_thresholds, routing_metadata_from
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.report import describe_routing, summary
from mc_gguf.routing.thresholds import quantiles_for_drop, thresholds_at
from mc_gguf.runtime.packages import load_gguf
from tests.support.gguf_models import (
    ONES,
    RandomCheckpoint,
    make_calibration,
    take_apart,
    uniform,
    write_parts,
    write_random,
)
from tests.support.routing_predictions import predicted_damage, predicted_drop
from tests.support.synthetic_calibration import synthetic_routing

pytestmark = pytest.mark.native

N_LAYER = 4
MIXED = {p: [["Q8_0", "Q4_0", "Q8_0"], *[["Q4_0"] * 3] * (N_LAYER - 1)] for p in PROJECTIONS}
FIVES, SIXES = "5" * 64, "6" * 64


def profile(
    layers: tuple[int, ...] = (0, 1, 2, 3), n_layer: int = N_LAYER, n_rank: int = 2
) -> RoutingProfile:
    arrays = synthetic_routing(len(layers), n_rank, 11)
    return RoutingProfile(
        layers, n_layer, arrays["ratio_quantiles"], arrays["routing_sensitivity"], arrays["routing_curve"]
    )


@pytest.fixture
def checkpoint() -> RandomCheckpoint:
    return RandomCheckpoint(N_LAYER, 3)


@pytest.fixture
def ours(tmp_path: Path, checkpoint: RandomCheckpoint) -> Path:
    """A mixed file with routing metadata."""
    path = tmp_path / "ours.gguf"
    write_random(path, checkpoint, MIXED, default_metadata(profile(), FIVES, SIXES))
    return path


@pytest.fixture
def plain(tmp_path: Path, checkpoint: RandomCheckpoint) -> Path:
    """A file that mc_gguf has nothing to do with, aligned to 64 bytes, with a text that is no UTF-8."""
    write_random(tmp_path / "uniform.gguf", checkpoint, uniform(checkpoint.info, "Q4_0"))
    kv, parts = take_apart(tmp_path / "uniform.gguf")
    kv = {key: value for key, value in kv.items() if not key.startswith("mc_gguf.")}
    kv["general.alignment"] = Value(UINT32, 64)
    kv["general.author"] = Value(STRING, "\udcff\udcfe")
    kv["general.tags"] = Value(ARRAY, ["a", "\udc80"], STRING)
    write_parts(tmp_path / "plain.gguf", kv, parts)
    return tmp_path / "plain.gguf"


def same(a: RoutingMetadata | None, b: RoutingMetadata) -> None:
    """Equal to the bit."""
    assert a is not None
    assert (a.active, a.protect, a.calibration, a.model) == (b.active, b.protect, b.calibration, b.model)
    np.testing.assert_array_equal(a.thresholds, b.thresholds)
    assert a.thresholds.dtype == np.float32
    assert (a.profile is None) == (b.profile is None)
    if a.profile and b.profile:
        assert (a.profile.layers, a.profile.n_layer) == (b.profile.layers, b.profile.n_layer)
        for name in ("ratio_quantiles", "sensitivity", "curve"):
            np.testing.assert_array_equal(getattr(a.profile, name), getattr(b.profile, name))


def tensors(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor's bytes."""
    header, data = read_header(path), path.read_bytes()
    return {
        t.name: hashlib.sha256(data[t.offset : t.offset + t.n_bytes]).hexdigest()
        for t in header.tensors.values()
    }


# --- what is written is read --------------------------------------------------------------------------------


def test_what_is_written_is_read(ours: Path) -> None:
    same(container.read_routing(ours), default_metadata(profile(), FIVES, SIXES))
    same(container.validate(ours).routing, default_metadata(profile(), FIVES, SIXES))


def test_thresholds_alone_are_enough(plain: Path) -> None:
    thresholds = np.zeros((N_LAYER, 2), dtype=np.float32)
    thresholds[:, 1] = 0.1, 0.2, 0.3, 0.4
    metadata = RoutingMetadata(thresholds, (1, 3), 0.125)
    container.write_routing(plain, plain, metadata)
    same(container.read_routing(plain), metadata)
    found = describe_routing(metadata)
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, 3]
    assert found["predicted_drop"] is None
    assert summary(found) == "2 of 4 layers may drop experts, 12.5 % of a prompt's tokens are protected"


def test_a_file_without_the_keys_carries_none(plain: Path) -> None:
    assert container.read_routing(plain) is None


def test_gguf_py_reads_the_same(ours: Path) -> None:
    reader = load_gguf().GGUFReader(ours)
    for key, value in routing_kv(default_metadata(profile(), FIVES, SIXES)).items():
        assert reader.get_field(key).contents() == value.value


def test_layers_without_experts_and_more_ranks(tmp_path: Path) -> None:
    """Layers 0 and 2 of 4 have experts, a token uses three; the last index of an array varies fastest."""
    some = profile((0, 2), 4, 3)
    kv = routing_kv(choose_thresholds(default_metadata(some), quantile=0.5))
    q = some.ratio_quantiles
    assert kv["mc_gguf.routing.ratio_quantiles"].value == [
        q[i, r, k] for i in (0, 1) for r in (0, 1) for k in range(11)
    ]
    assert kv["mc_gguf.routing.layers"].value == [0, 2]
    thresholds = np.array(kv["mc_gguf.routing.thresholds"].value).reshape(4, 3)
    np.testing.assert_array_equal(thresholds[[1, 3]], 0)
    np.testing.assert_array_equal(thresholds[:, 0], 0)
    np.testing.assert_allclose(thresholds[[0, 2], 1:], q[:, :, 5], rtol=1e-7)


def test_sizes_are_exact(checkpoint: RandomCheckpoint, tmp_path: Path) -> None:
    for routing in (None, default_metadata(profile()), default_metadata(profile(), FIVES, SIXES)):
        write_random(tmp_path / "m.gguf", checkpoint, MIXED, routing)
        predicted = container.file_bytes(checkpoint.info, MIXED, FixedTypes(), routing)
        assert (tmp_path / "m.gguf").stat().st_size == predicted
        container.validate(tmp_path / "m.gguf")
    assert routing_bytes(None) == 0


def test_golden_bytes() -> None:
    """The example of docs/reference/format.md, to the byte: a change here is a change of the format."""
    layers = np.array([[[0, 0.25, 1]]])
    small = RoutingProfile((0,), 1, layers, np.array([0.5]), np.array([[0, 1.0, 4]]))
    kv = routing_kv(choose_thresholds(default_metadata(small), quantile=0.5, protect=0.5))
    data = b"".join(encode_kv(key, value) for key, value in kv.items())
    assert len(data) == 447
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    thresholds = encode_kv("mc_gguf.routing.thresholds", kv["mc_gguf.routing.thresholds"])
    assert thresholds[34:] == bytes.fromhex("09000000 06000000 0200000000000000 00000000 0000803e")


GOLDEN_SHA256 = "a4ab37b68908f0a868a317b45564ca604938fb4f042d1594299bcdd5bd6ebbb7"


# --- broken rules -------------------------------------------------------------------------------------------

P = "mc_gguf.routing."
KV = dict[str, Value]


def _set(name: str, value: Value | None, prefix: str = P) -> Callable[[KV], None]:
    def change(kv: KV) -> None:
        del kv[prefix + name]
        kv.update({} if value is None else {prefix + name: value})

    return change


def _item(name: str, index: int, number: float) -> Callable[[KV], None]:
    return lambda kv: kv[P + name].value.__setitem__(index, number)


def _short(name: str) -> Callable[[KV], None]:
    return lambda kv: kv[P + name].value.pop()


BROKEN: dict[str, tuple[Callable[[KV], None], str]] = {
    "version missing": (_set("version", None), r"mc_gguf\.routing\.version: is missing"),
    "version unknown": (_set("version", Value(UINT32, 2)), r"version: version 2 is not known; .* reads 1"),
    "version of another type": (_set("version", Value(STRING, "1")), r"version: has value type 8, not"),
    "thresholds missing": (_set("thresholds", None), r"thresholds: is missing"),
    "thresholds too few": (_short("thresholds"), r"thresholds: has 7 numbers, .* shape \[4, 2\]"),
    "thresholds not an array": (
        _set("thresholds", Value(FLOAT32, 0.5)),
        r"thresholds: has value type 6, not array of type 6",
    ),
    "thresholds of another type": (
        _set("thresholds", Value(ARRAY, [0.5] * 8, FLOAT64)),
        r"thresholds: has value array of type 12, not array of type 6",
    ),
    "threshold negative": (_item("thresholds", 1, -0.5), r"thresholds: has a number that is negative"),
    "threshold not a number": (_item("thresholds", 3, np.nan), r"thresholds: .* not finite"),
    "threshold infinite": (_item("thresholds", 3, np.inf), r"thresholds: .* not finite"),
    "threshold of rank 0": (_item("thresholds", 2, 0.5), r"thresholds: rank 0"),
    "active missing": (_set("active", None), r"active: is missing"),
    "active of another type": (
        _set("active", Value(ARRAY, [0.0], FLOAT32)),
        r"active: has value array of type 6, not array of type 4",
    ),
    "active twice": (_set("active", Value(ARRAY, [1, 1], UINT32)), r"active: must be ascending .* below 4"),
    "active descending": (_set("active", Value(ARRAY, [2, 0], UINT32)), r"active: must be ascending"),
    "active out of range": (_set("active", Value(ARRAY, [0, 4], UINT32)), r"active: must be ascending .*4"),
    "protect missing": (_set("protect", None), r"protect: is missing"),
    "protect too much": (_set("protect", Value(FLOAT64, 1.5)), r"protect: is 1\.5, not a share"),
    "protect negative": (_set("protect", Value(FLOAT64, -0.1)), r"protect: is -0\.1"),
    "protect not a number": (_set("protect", Value(FLOAT64, np.nan)), r"protect: is nan"),
    "protect of another type": (_set("protect", Value(FLOAT32, 0.5)), r"protect: has value type 6, not"),
    "layers missing": (_set("layers", None), r"layers: is missing"),
    "layers out of range": (_set("layers", Value(ARRAY, [0, 1, 2, 9], UINT32)), r"layers: must be ascending"),
    "layers too few": (
        _set("layers", Value(ARRAY, [1, 2, 3], UINT32)),
        r"sensitivity: has 4 numbers, which do not fit the shape \[3\]",
    ),
    "sensitivity missing": (_set("sensitivity", None), r"sensitivity: is missing"),
    "sensitivity too few": (_short("sensitivity"), r"sensitivity: has 3 numbers"),
    "sensitivity negative": (_item("sensitivity", 0, -1e-9), r"sensitivity: .* negative"),
    "curve missing": (_set("curve", None), r"curve: is missing"),
    "curve too few": (_short("curve"), r"curve: has 43 numbers"),
    "curve even": (
        _set("curve", Value(ARRAY, [0.0, 1.0] * 4, FLOAT64)),
        r"curve: 2 quantiles; an odd number",
    ),
    "curve descends": (_item("curve", 5, 0.0), r"curve: descends"),
    "curve infinite": (_item("curve", 10, np.inf), r"curve: .* not finite"),
    "ratios missing": (_set("ratio_quantiles", None), r"ratio_quantiles: is missing"),
    "ratios too few": (_short("ratio_quantiles"), r"ratio_quantiles: has 43 numbers, .* \[4, 1, 11\]"),
    "ratios descend": (_item("ratio_quantiles", 5, 0.0), r"ratio_quantiles: descends"),
    "calibration no hash": (_set("calibration", Value(STRING, "x")), r"calibration: 'x' is not a SHA-256"),
    "model no hash": (_set("model", Value(STRING, FIVES[1:])), r"model: '5+' is not a SHA-256"),
    "no experts": (_set("llama.expert_count", None, ""), r"llama\.expert_count: is missing"),
    "one expert per token": (
        _set("llama.expert_used_count", Value(UINT32, 1), ""),
        r"llama\.expert_used_count: every token uses one expert",
    ),
    "no layers": (_set("llama.block_count", Value(UINT32, 0), ""), r"llama\.block_count: is 0"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rule_is_named(ours: Path, tmp_path: Path, rule: str) -> None:
    change, message = BROKEN[rule]
    kv, parts = take_apart(ours)
    write_parts(tmp_path / "same.gguf", kv, parts)
    assert container.read_routing(tmp_path / "same.gguf")  # what is refused below is so for the change alone
    change(kv)
    write_parts(tmp_path / "broken.gguf", kv, parts)
    with pytest.raises(FormatError, match=rf"broken\.gguf: key \S*{message}"):
        container.read_routing(tmp_path / "broken.gguf")
    with pytest.raises(FormatError, match=r"broken\.gguf: "):
        container.validate(tmp_path / "broken.gguf")


def test_an_active_layer_without_experts_is_named(plain: Path) -> None:
    metadata = replace(default_metadata(profile((0, 2))), active=(0, 1))
    before = plain.read_bytes()
    with pytest.raises(FormatError, match=r"key mc_gguf\.routing\.active: layer 1 is not among the layers"):
        container.write_routing(plain, plain, metadata)
    assert plain.read_bytes() == before


def test_unknown_routing_keys_are_ignored_and_go_when_routing_is_set(ours: Path) -> None:
    kv, parts = take_apart(ours)
    kv[f"{P}of_tomorrow"] = Value(UINT32, 7)
    write_parts(ours, kv, parts)
    metadata = container.read_routing(ours)
    assert metadata is not None
    container.write_routing(ours, ours, metadata)
    assert f"{P}of_tomorrow" not in read_header(ours).kv


@given(st.data())
@settings(
    deadline=None,
    max_examples=300,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_flipped_bytes_never_crash(ours: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole, header = bytearray(ours.read_bytes()), read_header(ours)
    spans = [span for key, span in header.kv_spans.items() if key.startswith(P)]
    start, end = min(s for s, _ in spans), max(e for _, e in spans)
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(start, end - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "flipped.gguf").write_bytes(whole)
    with suppress(FormatError):
        if metadata := container.read_routing(tmp_path / "flipped.gguf"):
            summary(describe_routing(metadata))


# --- a file changed in nothing else -------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["ours", "plain"])
def test_only_the_routing_keys_change(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path: Path = request.getfixturevalue(which)
    before, data, hashes = read_header(path), path.read_bytes(), tensors(path)
    metadata = choose_thresholds(default_metadata(profile()), 0.3, layers="all", protect=0.25)
    container.write_routing(path, tmp_path / "copy.gguf", metadata)
    assert path.read_bytes() == data
    container.write_routing(path, path, metadata)
    assert path.read_bytes() == (tmp_path / "copy.gguf").read_bytes()
    after = read_header(path)
    assert tensors(path) == hashes
    assert list(after.tensors) == list(before.tensors)
    assert after.alignment == before.alignment
    assert after.data_offset % after.alignment == 0
    assert path.read_bytes()[after.data_offset :] == data[before.data_offset :]
    kept = [key for key in before.kv if not key.startswith(P)]
    assert [key for key in after.kv if not key.startswith(P)] == kept
    for key in kept:  # byte for byte
        (a, b), (c, d) = before.kv_spans[key], after.kv_spans[key]
        assert path.read_bytes()[c:d] == data[a:b]
    same(container.read_routing(path), metadata)
    once = path.read_bytes()
    container.write_routing(path, path, metadata)
    assert path.read_bytes() == once
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_copy_leaves_the_old_file(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ours.read_bytes()
    metadata = choose_thresholds(default_metadata(profile()), 0.3)
    monkeypatch.setattr("mc_gguf.container.rewrite._COPY_BYTES", 1000)

    class Bar:
        calls = 0

        def update(self, done: float, total: float) -> None:
            Bar.calls += 1
            if Bar.calls == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        container.write_routing(ours, ours, metadata, Bar())  # type: ignore[arg-type]
    assert Bar.calls == 3
    assert ours.read_bytes() == before
    assert [p.name for p in ours.parent.iterdir()] == ["ours.gguf"]


def test_a_file_that_shrinks_meanwhile_is_an_error(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc_gguf.container.rewrite._COPY_BYTES", 1000)

    class Bar:
        def update(self, done: float, total: float) -> None:
            os.truncate(ours, 9000)

    with pytest.raises(McError, match="became shorter while it was copied"):
        container.write_routing(ours, ours, default_metadata(profile()), Bar())  # type: ignore[arg-type]
    assert not list(ours.parent.glob(".*"))


def test_a_full_disk_is_said_before_anything_is_written(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 100))
    before = ours.read_bytes()
    with pytest.raises(McError, match=r"has 100 B free, but the work on ours.gguf takes .*; make room"):
        container.write_routing(ours, ours, default_metadata(profile()))
    assert ours.read_bytes() == before


def test_links_and_modes_stay(ours: Path) -> None:
    ours.chmod(0o640)
    link = ours.with_name("link.gguf")
    link.symlink_to(ours.name)
    metadata = choose_thresholds(default_metadata(profile()), 0.25)
    container.write_routing(link, link, metadata)
    assert link.is_symlink()
    assert ours.stat().st_mode & 0o777 == 0o640
    same(container.read_routing(ours), metadata)


def test_progress_is_shown(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("copy", unit="MB") as bar:
        container.write_routing(ours, ours, default_metadata(profile()), bar)
    assert "copy: 100 %" in capsys.readouterr().err


def test_of_a_split_file_the_first_shard_is_changed_in_place(plain: Path, tmp_path: Path) -> None:
    kv, parts = take_apart(plain)
    shards = [tmp_path / f"s-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for number, (shard, own) in enumerate(zip(shards, (parts[:5], parts[5:]), strict=True)):
        split = {"split.no": Value(2, number), "split.count": Value(2, 2)}
        write_parts(shard, {**(kv if number == 0 else {}), **split}, own)
    metadata = default_metadata(profile())
    container.write_routing(shards[0], shards[0], metadata)
    same(container.read_routing(shards[0]), metadata)
    same(container.read_routing(shards[1]), metadata)
    with pytest.raises(McError, match="one of 2 shards and can only be changed in place"):
        container.write_routing(shards[0], tmp_path / "copy.gguf", metadata)
    with pytest.raises(McError, match="is not the first of 2 shards"):
        container.write_routing(shards[1], shards[1], metadata)


# --- where thresholds come from -----------------------------------------------------------------------------


def test_a_file_s_own_profile_gives_what_its_calibration_gives(
    checkpoint: RandomCheckpoint, tmp_path: Path
) -> None:
    calibration = make_calibration(checkpoint.info, tmp_path / "c.safetensors")
    routing = routing_metadata_from(calibration)
    assert routing is not None
    write_random(tmp_path / "m.gguf", checkpoint, MIXED, routing)
    header = read_header(tmp_path / "m.gguf")
    for options in ({"quantile": 0.123}, {"target_drop": 0.2, "layers": "all"}, {"layers": (1, 2)}):
        own = choose_thresholds(container.base_metadata(header, None), **options)
        same(own, choose_thresholds(container.base_metadata(header, calibration), **options))


def calibrations(checkpoint: RandomCheckpoint, folder: Path) -> dict[str, Calibration]:
    mine = make_calibration(checkpoint.info, folder / "mine.safetensors")
    return {
        "mine": mine,
        "same shape": replace(mine, model=replace(checkpoint.info, fingerprint=ONES)),
        "wider": make_calibration(RandomCheckpoint(N_LAYER, 3, n_embd=64).info, folder / "w.safetensors"),
        "deeper": make_calibration(RandomCheckpoint(N_LAYER + 1, 3).info, folder / "d.safetensors"),
        "more experts": make_calibration(RandomCheckpoint(N_LAYER, 4).info, folder / "e.safetensors"),
        "without routing": mine.with_statistics(routing_curve=None),
    }


def test_calibrations_of_other_models_are_refused(
    ours: Path, plain: Path, checkpoint: RandomCheckpoint, tmp_path: Path
) -> None:
    """A file of ours knows its model; of a plain one the sizes must agree."""
    routing = routing_metadata_from(make_calibration(checkpoint.info, tmp_path / "mine.safetensors"))
    write_random(ours, checkpoint, MIXED, routing)
    given_ = calibrations(checkpoint, tmp_path)
    own, foreign = read_header(ours), read_header(plain)
    assert container.base_metadata(own, given_["mine"]).model == checkpoint.info.fingerprint
    assert container.base_metadata(foreign, given_["mine"]).model == ""
    assert container.base_metadata(foreign, given_["same shape"]).profile is not None
    for name in ("same shape", "wider", "deeper", "more experts"):
        with pytest.raises(ArtifactError, match=r"the calibration was made with another model .*ours\.gguf"):
            container.base_metadata(own, given_[name])
    for name, sizes in (("wider", "64 wide"), ("deeper", "5 layers"), ("more experts", "2 of 4 experts")):
        with pytest.raises(
            ArtifactError, match=rf"another model \(.*{sizes}.*\) than .*plain\.gguf \(4 layers"
        ):
            container.base_metadata(foreign, given_[name])
    with pytest.raises(ArtifactError, match="has no routing statistics"):
        container.base_metadata(own, given_["without routing"])
    with pytest.raises(ArtifactError, match=r"plain\.gguf carries no routing profile .*give a calibration"):
        container.base_metadata(foreign, None)


def test_no_routing_where_none_was_measured_or_none_is_possible(
    checkpoint: RandomCheckpoint, tmp_path: Path
) -> None:
    mine = make_calibration(checkpoint.info, tmp_path / "c.safetensors")
    assert routing_metadata_from(mine) is not None
    assert routing_metadata_from(replace(mine, model=None)) is None
    assert routing_metadata_from(Calibration.blank(checkpoint.info)) is None
    single = replace(checkpoint.info, n_expert_used=1)
    without_ranks = {**mine.statistics, "ratio_quantiles": np.zeros((N_LAYER, 0, 101))}
    assert routing_metadata_from(replace(mine, model=single, statistics=without_ranks)) is None


def test_choose_thresholds(tmp_path: Path) -> None:
    base = default_metadata(profile(), FIVES, SIXES)
    same(choose_thresholds(base), base)  # the defaults are what quantize writes
    assert base.active == (0, 1, 2, 3)
    at = choose_thresholds(base, 0.3, layers=(2, 0, 2), protect=0.5)
    assert (at.active, at.protect, at.calibration, at.model) == ((0, 2), 0.5, FIVES, SIXES)
    np.testing.assert_array_equal(at.thresholds, thresholds_at(profile(), np.full(4, 0.3)))  # others too
    target = choose_thresholds(base, target_drop=0.15, layers=(0, 2))
    quantiles = quantiles_for_drop(profile(), 0.15, (0, 2))
    np.testing.assert_array_equal(target.thresholds, thresholds_at(profile(), quantiles))
    assert not target.thresholds[[1, 3]].any()
    for options, message in (
        ({"layers": (1, 4)}, "layer 4 has no experts; layers with experts are 0 to 3"),
        ({"layers": ()}, "no layer is active"),
        ({"layers": "some"}, "layers must be auto, all or numbers, not 'some'"),
        ({"quantile": 1.5}, r"the quantile must be a share from 0 to 1 .* not 1\.5"),
        ({"protect": -1.0}, "the protected share must be a share"),
        ({"target_drop": float("nan")}, "the target drop must be a share"),
        ({"target_drop": 0.3, "layers": (0, 2)}, r"30 % .* cannot be dropped; with 2 of 4 layers .* 25\.0 %"),
    ):
        with pytest.raises(McError, match=message):
            choose_thresholds(base, **options)
    with pytest.raises(McError, match="without a routing profile"):
        choose_thresholds(replace(base, profile=None))


@pytest.mark.parametrize("n_rank", [2, 4])
@pytest.mark.parametrize("quantile", [0.0, 0.07, 0.5, 0.931, 1.0])
def test_the_description_finds_the_quantiles_again(n_rank: int, quantile: float) -> None:
    """From thresholds alone, so that whatever is in a file is described, not what was asked for."""
    some = profile(n_rank=n_rank)
    found = describe_routing(choose_thresholds(default_metadata(some), quantile, layers=(0, 3)))
    quantiles = np.array([quantile, 0, 0, quantile])
    assert found["predicted_drop"] == pytest.approx(predicted_drop(some, quantiles), abs=1e-5)
    assert found["predicted_damage"] == pytest.approx(predicted_damage(some, quantiles), rel=1e-4, abs=1e-12)
    assert [row["dropped"] for row in found["layers"]] == pytest.approx(
        quantiles * (n_rank - 1) / n_rank, abs=1e-5
    )
    assert sum(row["damage"] for row in found["layers"]) == pytest.approx(found["predicted_damage"])


def test_ratios_that_are_all_the_same(tmp_path: Path) -> None:
    """A threshold at them drops nothing (w_r < threshold * w_0 is strict), one above drops everything."""
    flat = replace(profile(), ratio_quantiles=np.full((4, 1, 11), 0.25))
    found: dict[str, Any] = describe_routing(choose_thresholds(default_metadata(flat), 0.5))
    assert found["predicted_drop"] == 0
    above = replace(default_metadata(flat), thresholds=np.tile(np.array([0, 0.3], dtype=np.float32), (4, 1)))
    assert describe_routing(above)["predicted_drop"] == 0.5
