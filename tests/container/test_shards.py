"""Mixed files in shards, as gguf-split makes them: read as the whole file, changed in the first shard."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_gguf import container
from mc_gguf.artifacts import PROJECTIONS
from mc_gguf.common.errors import FormatError, McError
from mc_gguf.container import MixedGguf, describe_model, load_routing, update_routing
from mc_gguf.ggml.gguf_file import STRING, Value
from mc_gguf.ggml.shards import check_first
from mc_gguf.routing.metadata import default_metadata
from mc_gguf.routing.profile import RoutingProfile
from tests.support.command_line import fails_with, invoke
from tests.support.gguf_models import (
    ONES,
    TWOS,
    RandomCheckpoint,
    mixed,
    split,
    take_apart,
    write_parts,
    write_random,
)
from tests.support.synthetic_calibration import synthetic_routing

pytestmark = pytest.mark.native  # gguf-py is needed


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    checkpoint = RandomCheckpoint(3, 4)
    arrays = synthetic_routing(3)
    profile = RoutingProfile(
        (0, 1, 2), 3, arrays["ratio_quantiles"], arrays["routing_sensitivity"], arrays["routing_curve"]
    )
    routing = default_metadata(profile, ONES, TWOS)
    write_random(tmp_path / "whole.gguf", checkpoint, mixed(checkpoint, ("Q4_0", "Q5_0", "Q8_0")), routing)
    return tmp_path / "whole.gguf"


@pytest.fixture
def shards(whole: Path) -> list[Path]:
    """Of seven tensors, so that maps and their groups are in different ones."""
    return split(whole, whole.with_name("m.gguf"), 7)


def test_any_shard_stands_for_the_whole(whole: Path, shards: list[Path]) -> None:
    assert len(shards) > 4
    expected = MixedGguf.open(whole)
    for shard in (shards[0], shards[2], shards[-1]):
        found = container.validate(shard)
        for layer in expected.layers:
            for projection in PROJECTIONS:
                for expert in range(4):
                    place = (layer, projection, expert)
                    assert found.type_of(*place) == expected.type_of(*place)
                    assert found.data(*place).tobytes() == expected.data(*place).tobytes()
        for name in expected.header.tensors:
            assert found.tensor_data(name).tobytes() == expected.tensor_data(name).tobytes()
        shown, other = describe_model(found), describe_model(expected)
        own = {
            "path": str(shards[0]),
            "shards": len(shards),
            "file_bytes": sum(s.stat().st_size for s in shards),
        }
        assert shown == other | own
    assert f" in {len(shards)} shards" in invoke("inspect", shards[1]).stdout


def test_routing_is_changed_in_the_first_shard(whole: Path, shards: list[Path]) -> None:
    before = [shard.read_bytes() for shard in shards]
    with pytest.raises(FormatError, match=r"not the first of its shards; give m-00001-of-"):
        update_routing(shards[1], target_drop="30%", quiet=True)
    with pytest.raises(McError, match="can only be changed in place"):
        update_routing(shards[0], whole.with_name("copy.gguf"), target_drop="30%", quiet=True)
    assert [shard.read_bytes() for shard in shards] == before
    expected = update_routing(whole, target_drop="30%", quiet=True)
    update_routing(shards[0], target_drop="30%", quiet=True)
    assert [shard.read_bytes() for shard in shards[1:]] == before[1:]
    for shard in shards[:2]:
        assert load_routing(shard).thresholds.tolist() == expected.thresholds.tolist()
    container.validate(shards[0])


def test_shards_that_are_missing_or_mixed_up_are_named(whole: Path, shards: list[Path]) -> None:
    first, second, third = shards[:3]
    away = second.rename(whole.with_name("away"))
    for command in (("inspect", first), ("inspect", third), ("routing", "set", first), ("chat", first)):
        fails_with(rf"lacks 1 of {len(shards)} shards: {second.name}", *command)
    third.rename(second)
    away.rename(third)
    fails_with("is not shard 2 of", "inspect", first)
    fails_with("is not shard 2 of", "chat", first)
    first.rename(away)
    fails_with("is not the first of its shards, and m-00001", "routing", "show", shards[-1])
    fails_with("is not the first of its shards; give m-00001", "chat", shards[-1])


def test_a_tensor_in_two_shards(whole: Path, shards: list[Path]) -> None:
    kv, parts = take_apart(shards[1])
    _, others = take_apart(shards[0])
    kv = {key: value for key, value in kv.items() if key != "general.architecture"}
    write_parts(shards[1], kv, [others[0], *parts[1:]])
    with pytest.raises(FormatError, match=rf"tensor {others[0].name} is also in m-00001"):
        MixedGguf.open(shards[0])


def test_a_whole_file_may_be_named_like_a_shard(whole: Path) -> None:
    named = whole.rename(whole.with_name("m-00002-of-00003.gguf"))
    check_first(named)
    assert container.validate(named).n_shard == 1


def test_numbers_that_are_none(whole: Path, shards: list[Path]) -> None:
    kv, parts = take_apart(shards[0])
    write_parts(shards[0], kv | {"split.count": Value(STRING, "many")}, parts)
    with pytest.raises(FormatError, match=r"split.count is 'many'"):
        MixedGguf.open(shards[0])
