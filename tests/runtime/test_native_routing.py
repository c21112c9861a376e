"""Dynamic routing in the patched llama.cpp: known answers, and everything that it has to get along with.

Known answers are bit-identical. The decisions themselves are compared with a second implementation in
tests/routing/test_reference.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mc_gguf.artifacts import PROJECTIONS, expert_tensor_name
from mc_gguf.common.errors import McError
from mc_gguf.ggml.gguf_file import read_header
from mc_gguf.routing.params import RoutingParams
from mc_gguf.run.llama import Llama
from mc_gguf.run.routing_api import set_routing
from mc_gguf.runtime import Runtime
from mc_gguf.source import open_checkpoint
from tests.support import WIKITEXT
from tests.support.mixed_files import ModelWriter, first_layers
from tests.support.random_models import write_random_model
from tests.support.routing_session import Logits, Session, write_lora

import llama_cpp  # isort: skip  after mc_gguf.run.llama, which chooses its libraries
from llama_cpp._logger import set_verbose  # isort: skip

pytestmark = pytest.mark.native
N_LAYER, N_EXPERT, N_EMBD, N_FF = 2, 8, 256, 256  # of the bundled model's first layers
ALL = tuple(range(N_EXPERT))
MIXED: dict[int, list[tuple[str, tuple[int, ...]]]] = {
    0: [("Q2_K", (0, 3, 5)), ("Q4_K", (1, 2, 4, 6, 7))],
    1: [("Q3_K", (1, 2)), ("IQ2_XXS", (0, 4, 6)), ("Q4_K", (3, 5, 7))],
}
# Q4_K and Q4_0 are repacked by the CPU backend; the groups of mixed files are not.
FILES = ("BF16", "F32", "Q4_K", "Q4_0", "mixed")
LIKE_OFF = (
    "threshold:threshold=0",
    "odp:threshold=0",
    "odp:threshold=0.9,protect=1",
    "keep_min:ratio=0",
    "keep_min:ratio=2,keep_min=2",
    "top_p:top_p=1",
    "random:rate=0",
)
LIKE_ONE_EXPERT = (
    "threshold:threshold=1.5",
    "odp:threshold=1.5,protect=0",
    "keep_min:ratio=2",
    "top_p:top_p=0",
    "random:rate=1",
)
ODP = "odp:threshold=0.6,protect=0.1"

Models = Callable[..., Llama]


@pytest.fixture(scope="module")
def writer(tiny_model: Path, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> ModelWriter:
    folder = tmp_path_factory.mktemp("routing")
    return ModelWriter(open_checkpoint(first_layers(tiny_model, N_LAYER, folder / "model")), folder)


@pytest.fixture(scope="module")
def models(writer: ModelWriter) -> Iterator[Models]:
    """The bundled model's first layers in a format of FILES, loaded, with `n_used` experts per token."""
    loaded: dict[tuple[str, int], Llama] = {}

    def model(name: str, n_used: int = 2) -> Llama:
        if (name, n_used) not in loaded:
            path = writer.folder / f"{name}.gguf"
            if not path.exists():
                writer.write(name, MIXED if name == "mixed" else [(name, ALL)])
            overrides = {"llama.expert_used_count": n_used}
            loaded[name, n_used] = Llama(path, n_ctx=256, kv_overrides=overrides)
        return loaded[name, n_used]

    yield model
    for llm in loaded.values():
        llm.close()


@pytest.fixture(scope="module")
def tokens(models: Models) -> list[int]:
    return models("F32").tokenize(WIKITEXT.read_bytes()[:6000])[:512]


def far(a: Logits, b: Logits) -> float:
    """Share of tokens whose logits [n, n_vocab] differ by more than rounding can explain.

    Where two weights or importances are nearly tied rounding can change a decision, so a few tokens may.
    """
    distance = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return float((distance > 1e-2).mean())


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_known_answers(models: Models, tokens: list[int], name: str, flash: bool) -> None:
    """A prompt of three ubatches, then decode."""
    tokens = tokens[:160]
    options: dict[str, Any] = {"flash": flash, "threads": 1, "n_ubatch": 64}
    with Session(models(name), **options) as session, Session(models(name, 1), **options) as one:
        off, one_expert = session.run(tokens), one.run(tokens)
        assert far(off, one_expert) > 0.9
        for routing in (*LIKE_OFF, *LIKE_ONE_EXPERT):
            session.forget()
            session.reset_stats()
            session.route(routing)
            expected = off if routing in LIKE_OFF else one_expert
            np.testing.assert_array_equal(session.run(tokens), expected, err_msg=routing)
            stats = session.stats()
            n_slot = N_LAYER * len(tokens)
            assert (stats.kept + stats.dropped).sum(axis=0).tolist() == [n_slot, n_slot]
            assert stats.dropped.sum(axis=0).tolist() == [0, 0 if routing in LIKE_OFF else n_slot], routing
        session.forget()
        session.route(ODP)
        assert far(session.run(tokens), off) > 0.3
        session.forget()
        session.route("off")
        np.testing.assert_array_equal(session.run(tokens), off)


def test_the_quantized_stacks_are_repacked(
    models: Models, writer: ModelWriter, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("Q4_K", "Q4_0"):
        models(name)
        Llama(writer.folder / f"{name}.gguf", n_ctx=256, verbose=True).close()
        set_verbose(False)  # llama_cpp keeps it for all
        assert "REPACK model buffer size" in capfd.readouterr().err, name


@pytest.mark.parametrize("name", ["F32", "Q4_K", "mixed"])
def test_threads_change_nothing(models: Models, tokens: list[int], name: str) -> None:
    tokens = tokens[:40]
    for flash in (False, True):
        results = []
        for threads in (1, 2):
            with Session(models(name), flash, threads) as session:
                off = session.run(tokens)
                session.forget()
                session.route("threshold:threshold=0")
                np.testing.assert_array_equal(session.run(tokens), off)
                session.forget()
                session.reset_stats()
                session.route(ODP)
                results.append((session.run(tokens), session.stats().to_json()))
        np.testing.assert_array_equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
        assert results[0][1]["protected"][0][1] > 0


def places(path: Path, layer: int, expert: int) -> Iterator[tuple[int, int]]:
    """Where in a file of FILES the three matrices of an expert are: begin and end in bytes."""
    tensors = read_header(path).tensors
    for projection in PROJECTIONS:
        entry, experts = tensors.get(expert_tensor_name(layer, projection)), ALL
        for group, (_, members) in enumerate(MIXED[layer] if entry is None else ()):
            if expert in members:
                entry, experts = tensors[f"{expert_tensor_name(layer, projection)}.{group}"], members
        assert entry
        size = entry.n_bytes // len(experts)
        begin = entry.offset + size * experts.index(expert)
        yield begin, begin + size


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_K", "mixed"])
@pytest.mark.parametrize("n_prompt", [1, 3])
def test_dropped_experts_are_not_read(
    models: Models, writer: ModelWriter, tokens: list[int], tmp_path: Path, name: str, n_prompt: int
) -> None:
    """All experts that only dropped slots want are overwritten with what reads as NaN."""
    with Session(models(name), threads=1) as session:
        session.route("threshold:threshold=1.5")
        clean = session.run(tokens[:n_prompt], n_step=0)
        stats = session.stats()
    unread = np.argwhere((stats.expert_wanted > 0) & (stats.expert_read == 0))
    assert len(unread) >= 2
    poisoned = tmp_path / "poisoned.gguf"
    data = bytearray((writer.folder / f"{name}.gguf").read_bytes())
    for layer, expert in unread:
        for begin, end in places(writer.folder / f"{name}.gguf", layer, expert):
            data[begin:end] = b"\xff" * (end - begin)
    poisoned.write_bytes(data)
    llm = Llama(poisoned, n_ctx=256)
    with Session(llm, threads=1) as session:
        session.route("threshold:threshold=1.5")
        np.testing.assert_array_equal(session.run(tokens[:n_prompt], n_step=0), clean)
        session.forget()
        session.route("off")
        assert np.isnan(session.run(tokens[:n_prompt], n_step=0)).any()
    llm.close()


def test_counters_are_exact_where_the_answer_is_known(models: Models, tokens: list[int]) -> None:
    tokens = tokens[:150]
    with Session(models("F32"), threads=1, n_ubatch=64) as session:
        session.run(tokens)
        assert not session.stats().n_slots  # off does not count
        session.route("odp:threshold=1.5,protect=0.1,layers=1")
        session.forget()
        session.run(tokens, n_step=6)
        stats = session.stats()
        n_protected = 7 + 7 + 2  # of ubatches of 64, 64 and 16 tokens, rounded up; of decode steps none
        assert stats.dropped.tolist() == [[0, 0], [0, 150 - n_protected]]
        assert stats.kept.tolist() == [[150, 150], [150, n_protected]]
        assert stats.protected.tolist() == [[0, 0], [0, n_protected]]
        assert (stats.expert_read <= stats.expert_wanted).all()
        assert (stats.expert_read[0] == stats.expert_wanted[0]).all()
        assert stats.expert_read[1].sum() < stats.expert_wanted[1].sum()
        assert stats.expert_wanted.max() <= 3 + 6  # passes over the model
        session.reset_stats()
        assert not session.stats().n_slots
        assert not session.stats().expert_wanted.any()


def test_where_few_logits_are_wanted_the_last_layer_counts_those(models: Models, tokens: list[int]) -> None:
    placed = [(token, i, 0) for i, token in enumerate(tokens[:100])]
    outputs = [3, 17, 40, 99]
    with Session(models("F32"), threads=1) as session:
        session.route("random:rate=0.5")
        every = session.decode(placed)
        session.forget()
        session.reset_stats()
        few = session.decode(placed, outputs)
        assert far(few, every[outputs]) == 0  # random numbers go by position: a wrong row would show
        total = session.stats().kept + session.stats().dropped
        assert total.tolist() == [[100, 100], [4, 4]]


def test_random_drops_at_its_rate_and_by_its_seed(models: Models, tokens: list[int]) -> None:
    with Session(models("F32"), threads=1) as session:
        found = []
        for routing in ("random:rate=0.3,seed=1", "random:rate=0.3,seed=1", "random:rate=0.3,seed=2"):
            session.route(routing)
            session.forget()
            session.reset_stats()
            found.append(session.run(tokens, n_step=0))
            share = session.stats().dropped[:, 1].sum() / (N_LAYER * len(tokens))
            assert abs(share - 0.3) < 0.06  # four standard deviations
        np.testing.assert_array_equal(found[0], found[1])
        assert far(found[0], found[2]) > 0.2


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("unified", [False, True])
def test_sequences_of_a_batch_do_not_change_each_other(
    models: Models, tokens: list[int], unified: bool, flash: bool
) -> None:
    """Everything below the protected ones is dropped, so a wrong importance shows in the logits. Where each
    sequence has memory of its own a batch is cut to equal lengths, so there they are equal from the start.
    """
    lengths = (121, 71, 41) if unified else (90, 90, 90)
    sequences = [tokens[100 * s : 100 * s + n] for s, n in enumerate(lengths)]
    batch = [(sequences[s][i], i, s) for i in range(max(lengths)) for s in range(3) if i < lengths[s]]
    with Session(models("F32"), flash, 1, n_seq_max=4, kv_unified=unified) as session:
        session.route("odp:threshold=1.5,protect=0.1")
        together = session.decode(batch)
        stats = session.stats()
        # rounded up by sequence: all in one would be one less, or the same for those of 90
        expected = sum(-(-n // 10) for n in lengths)
        assert stats.protected.tolist() == [[0, expected]] * N_LAYER
        for s, sequence in enumerate(sequences):
            session.forget()
            alone = session.run(sequence, n_step=0, sequence=3)
            rows = [i for i, (_, _, owner) in enumerate(batch) if owner == s]
            assert far(together[rows], alone) <= 0.02, s


@pytest.mark.parametrize("flash", [False, True])
def test_decode_of_several_sequences_protects_none(models: Models, tokens: list[int], flash: bool) -> None:
    with Session(models("F32"), flash, 1, n_seq_max=4) as session:
        session.route("odp:threshold=1.5,protect=0.5")
        session.decode([(token, 0, s) for s, token in enumerate(tokens[:4])])
        stats = session.stats()
        assert not stats.protected.any()
        assert stats.dropped[:, 1].tolist() == [4] * N_LAYER


@pytest.mark.parametrize("flash", [False, True])
def test_keys_in_scattered_cells(models: Models, tokens: list[int], flash: bool) -> None:
    """Another sequence is interleaved and removed; the next prompt fills its holes."""
    first, second = tokens[:60], tokens[60:160]
    routing = "odp:threshold=1.5,protect=0.1"
    with Session(models("F32"), flash, 1, n_seq_max=2) as session:
        session.decode([(t, i, s) for i, t in enumerate(first) for s in (0, 1)])
        assert llama_cpp.llama_memory_seq_rm(session.memory, 1, -1, -1)
        session.route(routing)
        scattered = session.run(second, start=len(first), n_step=3)
    with Session(models("F32"), flash, 1) as session:
        session.run(first, n_step=0)
        session.route(routing)
        assert far(scattered, session.run(second, start=len(first), n_step=3)) <= 0.02


@pytest.mark.parametrize("flash", [False, True])
def test_shifted_memory(models: Models, tokens: list[int], flash: bool) -> None:
    """The middle of the context is removed and the rest moved up, as for an endless text."""
    found = {}
    for routing in ("off", *LIKE_OFF[:3], "threshold:threshold=1.5", "odp:threshold=1.5,protect=0.1"):
        with Session(models("F32"), flash, 1) as session:
            session.run(tokens[:200], n_step=0)
            assert llama_cpp.llama_memory_seq_rm(session.memory, 0, 20, 120)
            llama_cpp.llama_memory_seq_add(session.memory, 0, 120, -1, -100)
            session.route(routing)
            found[routing] = session.run(tokens[200:300], start=100, n_step=5)
            stats = session.stats()
    for routing in LIKE_OFF[:3]:
        np.testing.assert_array_equal(found[routing], found["off"], err_msg=routing)
    assert stats.protected.tolist() == [[0, 10]] * N_LAYER
    assert far(found["odp:threshold=1.5,protect=0.1"], found["threshold:threshold=1.5"]) > 0.05


def test_flash_attention_protects_the_same_tokens(models: Models, tokens: list[int]) -> None:
    for routing in ("odp:threshold=1.5,protect=0.1", "odp:threshold=1.5,protect=0.1,importance=l1"):
        found = []
        for flash in (False, True):
            with Session(models("F32"), flash, 1, n_ubatch=128) as session:
                session.route(routing)
                found.append(session.run(tokens[:300]))
        assert far(*found) <= 0.02
    with Session(models("F32"), True, 1, n_ubatch=128) as session:
        session.route("odp:threshold=1.5,protect=0.1,importance=attention")
        attention = session.run(tokens[:300])
    assert far(attention, found[1]) > 0.05  # another measure, other tokens: what is compared above can differ


def test_state_and_switching(models: Models, tokens: list[int]) -> None:
    """After a prompt, the same ten tokens: with another routing, with the old one, in another context."""
    prompt, rest = tokens[:100], tokens[100:110]
    with Session(models("F32"), threads=1) as session:
        session.route(ODP)
        session.run(prompt, n_step=0)
        state, counted = session.save(), session.stats()
        dropped = session.run(rest, n_step=10, start=100)
        session.restore(state)
        session.route("threshold:threshold=0")
        whole = session.run(rest, n_step=10, start=100)
        assert far(whole, dropped) > 0.3
        session.restore(state)
        session.route("off")
        np.testing.assert_array_equal(session.run(rest, n_step=10, start=100), whole)
        session.restore(state)
        session.route(ODP)
        session.reset_stats()
        np.testing.assert_array_equal(session.run(rest, n_step=10, start=100), dropped)
        assert session.stats().n_slots == 10 * 2 * N_LAYER
        assert counted.n_slots == 100 * 2 * N_LAYER
    with Session(models("F32"), threads=1) as other:
        other.restore(state)
        assert not other.stats().n_slots
        other.route(ODP)
        np.testing.assert_array_equal(other.run(rest, n_step=10, start=100), dropped)


def test_reused_graphs_give_the_same(
    models: Models, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, reused = [], []
    for disable in ("0", "1"):
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", disable)
        with Session(models("mixed"), threads=1, n_ubatch=32) as session:
            session.route(ODP)
            before = session.run(tokens[:120], n_step=10)
            session.route("threshold:threshold=0.3")  # takes effect at once
            after = session.run(tokens[120:130], n_step=10, start=120)
            reused.append(session.n_reused())
            results.append((np.concatenate([before, after]), session.stats().to_json()))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert reused[0] > 10
    assert reused[1] == 0


def test_warm_up_uses_all_experts(models: Models, tokens: list[int]) -> None:
    with Session(models("F32"), threads=1) as session:
        llama_cpp.llama_set_warmup(session.ctx, True)
        warm = session.run(tokens[:20], n_step=2)
        session.forget()
        session.route("odp:threshold=1.5")
        np.testing.assert_array_equal(session.run(tokens[:20], n_step=2), warm)
        assert not session.stats().n_slots
        llama_cpp.llama_set_warmup(session.ctx, False)
        session.forget()
        session.run(tokens[:20], n_step=2)
        assert session.stats().dropped_share > 0.3


@pytest.mark.parametrize("name", ["F32", "Q4_K", "mixed"])
def test_with_a_lora_adapter(models: Models, tokens: list[int], tmp_path: Path, name: str) -> None:
    path = write_lora(tmp_path / "lora.gguf", N_EMBD, N_FF, N_EXPERT, N_LAYER)
    tokens = tokens[:60]

    def adapted(llm: Llama, routings: Sequence[str]) -> list[Logits]:
        adapter = llama_cpp.llama_adapter_lora_init(llm.model, str(path).encode())
        assert adapter
        with Session(llm, threads=1) as session:
            plain = session.run(tokens)
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
            assert llama_cpp.llama_set_adapters_lora(session.ctx, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
            found = []
            for routing in routings:
                session.forget()
                session.route(routing)
                found.append(session.run(tokens))
            assert far(found[0], plain) > 0.5  # the adapter does something
        llama_cpp.llama_adapter_lora_free(adapter)
        return found

    off, *like_off = adapted(models(name), ("off", *LIKE_OFF))
    for routing, found in zip(LIKE_OFF, like_off, strict=True):
        np.testing.assert_array_equal(found, off, err_msg=routing)
    (one,) = adapted(models(name, 1), ("off",))
    for routing, found in zip(LIKE_ONE_EXPERT, adapted(models(name), LIKE_ONE_EXPERT), strict=True):
        np.testing.assert_array_equal(found, one, err_msg=routing)


def test_embeddings(models: Models, writer: ModelWriter) -> None:
    models("F32")
    texts = ["The king of England", "A river", "He was born in the north of the country , and"]
    with_all: dict[str, list[NDArray[np.float64]]] = {}
    for pooling in (llama_cpp.LLAMA_POOLING_TYPE_MEAN, llama_cpp.LLAMA_POOLING_TYPE_NONE):
        llm = Llama(writer.folder / "F32.gguf", n_ctx=256, embedding=True, n_threads=1, pooling_type=pooling)
        for routing in ("off", *LIKE_OFF[:3], "odp:threshold=1.5,protect=0.1"):
            llm.routing = routing
            with_all[routing] = [np.asarray(vector) for vector in llm.embed(texts)]
        for routing in LIKE_OFF[:3]:
            for found, expected in zip(with_all[routing], with_all["off"], strict=True):
                np.testing.assert_array_equal(found, expected, err_msg=routing)
        dropped = with_all["odp:threshold=1.5,protect=0.1"]
        assert not np.allclose(dropped[0], with_all["off"][0], rtol=1e-2)
        llm.reset_routing_stats()
        llm.embed(texts)
        lengths = [len(llm.tokenize(text.encode())) for text in texts]
        n_protected = sum(-(-n // 10) for n in lengths)
        assert llm.routing_stats().protected.tolist() == [[0, n_protected]] * N_LAYER
        llm.close()


ARCHITECTURES = [("qwen3moe", True), ("olmoe", True), ("gpt-oss", True), ("dots1", True), ("dots1", False)]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("architecture", "norm"), ARCHITECTURES)
def test_weights_are_normalised_where_the_architecture_does(
    tmp_path: Path, architecture: str, norm: bool, flash: bool
) -> None:
    """Dropping all ranks from n on is the same as routing to n experts, whatever happens to the weights."""
    path = write_random_model(tmp_path / "random.gguf", architecture, norm)
    tokens = np.random.default_rng(0).integers(3, 96, 100).tolist()

    def logits(n_used: int, routings: Sequence[str]) -> list[Logits]:
        llm = Llama(path, n_ctx=256, kv_overrides={f"{architecture}.expert_used_count": n_used})
        found = []
        with Session(llm, flash, 1) as session:
            for routing in routings:
                session.forget()
                session.reset_stats()
                session.route(routing)
                found.append(session.run(tokens))
            n_layer = 2 if architecture == "dots1" else 3  # with experts
            if routings[-1] != "off":
                assert (session.stats().kept + session.stats().dropped).sum() == n_layer * n_used * 100
        llm.close()
        return found

    keep_two = "keep_min:keep_min=2,ratio=2"
    four, same, to_one, to_two = logits(
        4, ("off", "threshold:threshold=0", "threshold:threshold=1.5", keep_two)
    )
    (one,), (two,) = logits(1, ("off",)), logits(2, ("off",))
    assert far(four, two) > 0.9
    np.testing.assert_array_equal(same, four)
    np.testing.assert_array_equal(to_one, one)
    if (
        architecture == "gpt-oss"
    ):  # a softmax over two, where upstream takes another route to the same numbers
        np.testing.assert_allclose(to_two, two, atol=2e-3)
    else:
        np.testing.assert_array_equal(to_two, two)


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss"])
def test_attention_with_sinks_and_windows_is_measured_alike(tmp_path: Path, architecture: str) -> None:
    llm = Llama(write_random_model(tmp_path / "random.gguf", architecture), n_ctx=256)
    # A text without near ties: a decision that rounding changes is seen by all tokens after it.
    tokens = np.random.default_rng(1).integers(3, 96, 200).tolist()
    found = []
    for flash in (False, True):
        with Session(llm, flash, 1, n_ubatch=64) as session:
            session.route("odp:threshold=1.5,protect=0.1")
            found.append(session.run(tokens))
            assert session.stats().protected[:, 1].tolist() == [3 * 7 + 1] * 3
    assert far(*found) <= 0.05
    llm.close()


@pytest.mark.parametrize(
    "params",
    [
        RoutingParams("threshold"),
        RoutingParams("threshold", thresholds=np.full((N_LAYER, 2), np.nan, dtype=np.float32)),
        RoutingParams("threshold", thresholds=np.full((N_LAYER, 2), -1, dtype=np.float32)),
        RoutingParams("odp", thresholds=np.zeros((N_LAYER, 2), dtype=np.float32), protect=1.5),
        RoutingParams("top_p", top_p=-0.1),
        RoutingParams("random", rate=2.0),
        RoutingParams("keep_min", keep_min=0),
        RoutingParams("keep_min", ratio=-1.0),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    models: Models, tokens: list[int], params: RoutingParams
) -> None:
    with Session(models("F32"), threads=1) as session:
        session.route("threshold:threshold=1.5")
        before = session.run(tokens[:8])
        with pytest.raises(McError, match="refuses"):
            set_routing(session.ctx, params)
        session.forget()
        np.testing.assert_array_equal(session.run(tokens[:8]), before)
