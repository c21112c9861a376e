"""Dynamic routing through Llama: what a file carries, switching, statistics, models without experts."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf import Llama, Routing
from mc_gguf.artifacts import PROJECTIONS, Calibration
from mc_gguf.common.errors import FormatError, McError
from mc_gguf.container import expert_bytes, write_routing
from mc_gguf.ggml.gguf_file import read_header
from mc_gguf.quantize.writer import write_model
from mc_gguf.routing import RoutingMetadata, default_metadata
from mc_gguf.routing.metadata import choose_thresholds
from mc_gguf.routing.profile import RoutingProfile
from mc_gguf.routing.thresholds import thresholds_at
from mc_gguf.runtime.packages import load_gguf
from mc_gguf.source import open_checkpoint
from tests.support.gguf_models import make_calibration, make_plan
from tests.support.mixed_files import first_layers
from tests.support.random_models import N_EMBD, N_EXPERT, N_FF, N_LAYER, write_random_model
from tests.support.synthetic_calibration import calibration

import llama_cpp  # isort: skip  after mc_gguf, which chooses its libraries

pytestmark = pytest.mark.native
PROMPT = "He was born in the north of the country , and"


@pytest.fixture(scope="module")
def made_up() -> Calibration:
    """Of the bundled model's shape; what it says of the layers is made up."""
    return calibration(n_layer=6)


@pytest.fixture(scope="module")
def carried(made_up: Calibration) -> RoutingMetadata:
    known = default_metadata(RoutingProfile.of(made_up))
    return choose_thresholds(known, quantile=0.5, layers=(0, 1, 3, 4), protect=0.1)


@pytest.fixture(scope="module")
def with_thresholds(
    tiny_gguf: Path, carried: RoutingMetadata, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("routing") / "carries.gguf"
    write_routing(tiny_gguf, path, carried)
    return path


@pytest.fixture(scope="module")
def llm(with_thresholds: Path) -> Iterator[Llama]:
    llama = Llama(with_thresholds, n_ctx=512, logits_all=True, n_threads=1)
    yield llama
    llama.close()


def answer(llm: Llama, n_token: int = 12) -> str:
    done: Any = llm(PROMPT, max_tokens=n_token, temperature=0)
    return str(done["choices"][0]["text"])


def test_auto_does_what_the_file_says(
    with_thresholds: Path, carried: RoutingMetadata, tiny_gguf: Path
) -> None:
    auto = Llama(with_thresholds, n_ctx=256, n_threads=1, routing="auto")
    assert auto.routing == Routing("odp")
    text, stats = answer(auto), auto.routing_stats()
    assert stats.dropped_share > 0.05
    assert not stats.dropped[[2, 5]].any()
    assert stats.dropped[[0, 1, 3, 4], 1].all()
    assert stats.protected.any()
    auto.close()
    given = Llama(
        tiny_gguf,
        n_ctx=256,
        n_threads=1,
        routing=Routing(threshold=carried.thresholds[:, 1].tolist(), layers=carried.active, protect=0.1),
    )
    assert answer(given) == text
    assert given.routing_stats().to_json() == stats.to_json()
    given.close()


def test_auto_is_off_for_a_file_that_says_nothing(tiny_gguf: Path) -> None:
    plain = Llama(tiny_gguf, n_ctx=256, n_threads=1, routing="auto")
    assert plain.routing == Routing("off")
    answer(plain)
    assert plain.routing_stats().n_slots == 0
    with pytest.raises(McError, match="carries no thresholds"):
        plain.routing = "odp"
    with pytest.raises(McError, match="no routing policy"):
        plain.routing = "fast"
    assert plain.routing == Routing("off")
    plain.close()


def test_off_is_the_default_and_off(with_thresholds: Path, tiny_gguf: Path) -> None:
    off, plain = Llama(with_thresholds, n_ctx=256), Llama(tiny_gguf, n_ctx=256)
    assert off.routing == Routing("off")
    assert answer(off) == answer(plain)
    assert off.routing_stats().n_slots == 0
    off.routing = "auto"
    assert off.routing == Routing("odp")
    off.close()
    plain.close()


def test_switching_in_a_conversation(llm: Llama) -> None:
    tokens = llm.tokenize(PROMPT.encode())

    def step(routing: Routing | str) -> np.ndarray[Any, Any]:
        """Logits of one more token after the prompt."""
        llm.load_state(state)
        llm.routing = routing
        llm.reset_routing_stats()
        llm.eval([100])
        return np.array(llm.scores[llm.n_tokens - 1])

    llm.routing = "off"
    llm.reset()
    llm.eval(tokens)
    state = llm.save_state()
    off = step("off")
    assert llm.routing_stats().n_slots == 0
    one = step("threshold:threshold=1.5,layers=all")
    assert not np.array_equal(one, off)
    assert llm.routing_stats().dropped.tolist() == [[0, 1]] * 6
    np.testing.assert_array_equal(step(Routing("threshold", threshold=0)), off)
    np.testing.assert_array_equal(step(Routing("keep_min", ratio=2, layers="all")), one)
    np.testing.assert_array_equal(step("off"), off)


def test_thresholds_from_the_file_at_other_quantiles(llm: Llama, made_up: Calibration) -> None:
    shares = []
    for quantile in (0.2, 0.5, 0.8):
        llm.routing = Routing("threshold", quantile=quantile, layers="all")
        llm.reset_routing_stats()
        answer(llm)
        shares.append(llm.routing_stats().dropped_share)
    assert shares[0] < shares[1] < shares[2]
    same = thresholds_at(RoutingProfile.of(made_up), np.full(6, 0.8))[:, 1].tolist()
    llm.routing = Routing("threshold", threshold=same, layers="all")
    llm.reset_routing_stats()
    answer(llm)
    assert llm.routing_stats().dropped_share == shares[2]
    llm.routing = Routing("threshold", target_drop=0.1)
    assert llm.routing.target_drop == 0.1


def test_a_plain_file_with_a_calibration(
    tiny_gguf: Path, with_thresholds: Path, made_up: Calibration, tmp_path: Path
) -> None:
    made_up.save(tmp_path / "a.calib")
    routing = Routing(calibration=tmp_path / "a.calib")
    plain, carrying = Llama(tiny_gguf, n_ctx=256, routing=routing), Llama(with_thresholds, n_ctx=256)
    carrying.routing = Routing(target_drop=0.15, protect=0.02)
    assert answer(plain) == answer(carrying)
    assert plain.routing_stats().to_json() == carrying.routing_stats().to_json()
    plain.close()
    carrying.close()


def test_the_prompt_cache_keeps_its_worth(llm: Llama) -> None:
    llm.reset()
    llm.routing = "threshold:threshold=0.6,layers=all"  # of each token alone, however the prompt is cut
    llm.reset_routing_stats()
    text, counted = answer(llm), llm.routing_stats().n_slots
    llm.reset()
    llm.set_cache(llama_cpp.llama_cache.LlamaRAMCache())
    assert answer(llm) == text
    llm.reset()
    llm.reset_routing_stats()
    assert answer(llm) == text
    llm.set_cache(None)
    assert 0 < llm.routing_stats().n_slots < counted


def test_the_share_of_bytes_is_that_of_the_file(llm: Llama, tiny_gguf: Path) -> None:
    llm.routing = "off"
    llm.reset()
    llm.eval(llm.tokenize(PROMPT.encode()))
    llm.routing = "threshold:threshold=1.5,layers=all"
    llm.reset_routing_stats()
    llm.eval([100])
    stats = llm.routing_stats()
    assert stats.expert_bytes_not_read == stats.dropped_share == 0.5
    experts = [t for t in read_header(tiny_gguf).tensors.values() if "_exps" in t.name]
    assert stats.expert_bytes.sum() == sum(t.n_bytes for t in experts)


def test_the_bytes_of_a_mixed_file(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(first_layers(tiny_model, 2, tmp_path / "model"))
    info = checkpoint.info
    types = [["Q8_0"] * 4 + ["Q4_0"] * 4, ["Q8_0"] * 8]
    measured = make_calibration(info, tmp_path / "a.calib")
    plan = make_plan(info, dict.fromkeys(PROJECTIONS, types), tmp_path / "plan.json", measured.fingerprint)
    write_model(checkpoint, measured, plan, tmp_path / "mixed.gguf", threads=1)
    found = expert_bytes(tmp_path / "mixed.gguf", 2, 8)
    blocks = 3 * 256 * 256 // 32
    assert found.tolist() == [[34 * blocks] * 4 + [18 * blocks] * 4, [34 * blocks] * 8]
    mixed = Llama(tmp_path / "mixed.gguf", n_ctx=256, routing="random:rate=1,layers=all")
    mixed.eval([100])
    stats = mixed.routing_stats()
    wanted, read = ((counts * found).sum() for counts in (stats.expert_wanted, stats.expert_read))
    assert stats.expert_bytes_not_read == pytest.approx(1 - read / wanted)
    mixed.close()


def test_shards_and_fused_stacks_count(tmp_path: Path) -> None:
    write_random_model(tmp_path / "whole.gguf", "qwen3moe")
    write_random_model(tmp_path / "split[1].gguf", "qwen3moe", shard_tensors=7)
    first = next(tmp_path.glob("split*-00001-of-*.gguf"))
    whole = expert_bytes(tmp_path / "whole.gguf", N_LAYER, N_EXPERT)
    assert whole.tolist() == [[3 * 4 * N_FF * N_EMBD] * N_EXPERT] * N_LAYER
    sharded = Llama(first, n_ctx=256, routing="random:rate=0.5")
    sharded.eval([5])
    np.testing.assert_array_equal(sharded.routing_stats().expert_bytes, whole)
    sharded.close()
    writer = load_gguf().GGUFWriter(tmp_path / "fused.gguf", "qwen3next")
    writer.add_expert_count(N_EXPERT)
    for name, shape_ in (("gate_up", (N_EXPERT, 2 * N_FF, N_EMBD)), ("down", (N_EXPERT, N_EMBD, N_FF))):
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", np.zeros(shape_, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(expert_bytes(tmp_path / "fused.gguf", 1, N_EXPERT), whole[:1])


def test_a_file_that_only_llama_cpp_reads_has_no_bytes(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "old.gguf", "olmoe")
    data = bytearray(path.read_bytes())
    data[4] = 2  # GGUF version 2, which lacks nothing that is used here
    path.write_bytes(data)
    old = Llama(path, n_ctx=256, routing="random:rate=1")
    old.eval([5])
    assert old.routing_stats().dropped_share == 0.75
    assert old.routing_stats().expert_bytes_not_read is None
    old.close()


def test_a_model_without_experts(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "dense.gguf", "llama")
    dense = Llama(path, n_ctx=256)
    assert dense.routing == Routing("off")
    dense.eval([5, 6])
    assert dense.routing_stats().n_slots == 0
    assert dense.routing_stats().kept.shape == (0, 0)
    dense.reset_routing_stats()
    dense.routing = "off"
    with pytest.raises(McError, match="no experts to drop, so routing 'random' is impossible; use 'off'"):
        dense.routing = "random:rate=0.5"
    dense.close()
    with pytest.raises(McError, match="no experts to drop"):
        Llama(path, n_ctx=256, routing=Routing("threshold", threshold=0.5))


def test_a_vocabulary_has_nothing_to_route(with_thresholds: Path) -> None:
    vocabulary = Llama(with_thresholds, vocab_only=True)
    assert vocabulary.routing == Routing("off")
    assert vocabulary.tokenize(PROMPT.encode())
    vocabulary.close()


def test_wrong_routing_is_said_before_the_model_is_loaded(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp.Llama, "__init__", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(McError, match="there is no routing policy 'fast'"):
        Llama(tiny_gguf, routing="fast")


def test_damaged_thresholds_are_a_format_error(with_thresholds: Path, tmp_path: Path) -> None:
    data = with_thresholds.read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data.replace(b"mc_gguf.routing.protect", b"mc_gguf.routing.protekt", 1))
    with pytest.raises(FormatError, match=r"mc_gguf\.routing\.prote"):
        Llama(path, n_ctx=256, routing="auto")
    Llama(path, n_ctx=256, routing="off").close()  # which asks the file nothing


def test_routing_is_pickled(llm: Llama) -> None:
    llm.routing = Routing("threshold", threshold=0.5, layers=[1, 2])
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.routing == llm.routing
    copy.close()
