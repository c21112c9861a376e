"""Mixed-expert files in the patched llama.cpp: the same numbers as files that stock llama.cpp understands.

Noise: ggml quantizes activations to 8 bits for quantized weights. How far that moves logits away from those
of the same weights stored as F32 is measured on uniform files with the unpatched library; a mixed file must
not be further away than the worst of the types it holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mc_gguf.common.errors import FormatError
from mc_gguf.ggml.gguf_file import read_header
from mc_gguf.ggml.types import CANDIDATES
from mc_gguf.runtime import Runtime
from mc_gguf.source import open_checkpoint
from tests.support.mixed_files import Groups, ModelWriter, first_layers, run_logits

pytestmark = pytest.mark.native
ALL = tuple(range(8))
Noise = Callable[[str, int], NDArray[np.float64]]
N_LAYER = 2  # of the bundled model; quantizing all six to every type takes minutes


@pytest.fixture(scope="module")
def writer(tiny_model: Path, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> ModelWriter:
    folder = tmp_path_factory.mktemp("mixed")
    return ModelWriter(open_checkpoint(first_layers(tiny_model, N_LAYER, folder / "model")), folder)


def relative(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Relative distance of logits [n_tokens, n_vocab] by token: its quantiles 50 % and 85 %.

    Where two experts are nearly tied noise changes a token's routing and with it everything, so the mean says
    little; a wrong expert reaches about a quarter of the tokens, so the 85 % quantile finds it.
    """
    distances = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return np.asarray(np.quantile(distances, [0.5, 0.85]))


def one_group(kind: str) -> Groups:
    return [(kind, ALL)]


def split(kind_of_size: list[tuple[str, int]], seed: int) -> Groups:
    """Groups of the given types and sizes with random experts, ascending within a group."""
    order = np.random.default_rng(seed).permutation(8).tolist()
    groups = []
    for kind, size in kind_of_size:
        groups.append((kind, sorted(order[:size])))
        order = order[size:]
    return groups


@pytest.mark.parametrize("repack", [False, True])
def test_plain_files_are_bit_identical_to_the_unpatched_build(
    writer: ModelWriter, runtime: Runtime, unpatched_runtime: Runtime, tmp_path: Path, repack: bool
) -> None:
    models = [writer.write(kind, one_group(kind)) for kind in ("F32", "Q8_0", "Q2_K", "IQ2_XXS", "Q4_K")]
    batches = "1,2,7,32,512"
    found = run_logits(runtime, models, tmp_path / "a.npz", batches, "1,2", repack)
    expected = run_logits(unpatched_runtime, models, tmp_path / "b.npz", batches, "1,2", repack)
    assert found.keys() == expected.keys()
    assert len(found) == 5 * 5 * 2
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *[(kind, [3, 5]) for kind in (*CANDIDATES, "Q8_0", "BF16", "F32")],
        *[("Q2_K", sizes) for sizes in ([1, 7], [2, 6], [4, 4], [1] * 8)],
    ],
)
def test_groups_of_one_type_are_bit_identical_to_the_plain_file(
    writer: ModelWriter, runtime: Runtime, tmp_path: Path, kind: str, sizes: list[int]
) -> None:
    plain = writer.write(f"plain-{kind}", one_group(kind))
    layers = {i: split([(kind, n) for n in sizes], seed=i) for i in range(N_LAYER)}
    grouped = writer.write(f"grouped-{kind}", layers)
    found = run_logits(runtime, [plain, grouped], tmp_path / "a.npz", "1,2,7,32,512", "1,2")
    for key in [key for key in found if key.startswith("plain")]:
        np.testing.assert_array_equal(found[key.replace("plain", "grouped")], found[key], err_msg=key)


@pytest.fixture(scope="module")
def noise(writer: ModelWriter, unpatched_runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Noise:
    """Relative distance of logits between a stock file of a type and its weights as F32, in llama.cpp."""
    uniform = [writer.write(f"uniform-{kind}", one_group(kind)) for kind in CANDIDATES]
    as_f32 = [writer.write(f"uniform-{kind}-f32", one_group(kind), dequantize=True) for kind in CANDIDATES]
    out = tmp_path_factory.mktemp("noise") / "n.npz"
    found = run_logits(unpatched_runtime, [*uniform, *as_f32], out, "64,256", "2")

    def of(kind: str, batch: int) -> NDArray[np.float64]:
        return relative(found[f"uniform-{kind} {batch} 2"], found[f"uniform-{kind}-f32 {batch} 2"])

    return of


# Every candidate type, every group size from 1 to 8 (8 as a stock tensor beside a mixed layer).
SIZES = ([1, 7], [2, 6], [3, 5], [4, 4], [1, 2, 5], [8])
CASES = range(0, len(CANDIDATES) + 1, 2)


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("shift", CASES)
def test_mixed_equals_its_weights_as_f32(
    writer: ModelWriter, runtime: Runtime, noise: Noise, tmp_path: Path, shift: int, repack: bool
) -> None:
    layers: dict[int, Groups] = {}
    for i, sizes in enumerate(SIZES[(shift // 2 + j) % len(SIZES)] for j in range(N_LAYER)):
        kinds = [CANDIDATES[(shift + i + 3 * g) % len(CANDIDATES)] for g in range(len(sizes))]
        layers[i] = split(list(zip(kinds, sizes, strict=True)), seed=shift + i)
    used = {kind for groups in layers.values() for kind, _ in groups}
    mixed = writer.write(f"mixed-{shift}", layers)
    as_f32 = writer.write(f"mixed-{shift}-f32", layers, dequantize=True)
    found = run_logits(runtime, [mixed, as_f32], tmp_path / "m.npz", "64,256", "2", repack)
    for batch in (64, 256):
        distance = relative(found[f"mixed-{shift} {batch} 2"], found[f"mixed-{shift}-f32 {batch} 2"])
        limit = 1.5 * np.max([noise(kind, batch) for kind in used], axis=0)
        assert (distance <= limit).all(), f"{distance} exceeds {limit}"


def load_error(runtime: Runtime, path: Path) -> str:
    """What the patched llama.cpp says about a file that it must refuse."""
    from mc_gguf import Llama

    with pytest.raises(FormatError) as caught:
        Llama(path)
    return str(caught.value)


def test_weights_are_mapped_and_not_copied(
    writer: ModelWriter, runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    from mc_gguf import Llama

    mixed = writer.write("mapped", [("F32", (0, 1, 2)), ("BF16", (3, 4, 5, 6, 7))])
    Llama(mixed, verbose=True, use_mmap=True).close()
    lines = [line for line in capfd.readouterr().err.splitlines() if "model buffer size" in line]
    assert len(lines) == 1, lines
    assert "CPU_Mapped" in lines[0]


def test_another_architecture_loads_its_groups(
    writer: ModelWriter, runtime: Runtime, unpatched_runtime: Runtime, tmp_path: Path
) -> None:
    """qwen3moe, with this model's weights: what it computes means nothing, but groups must not change it."""
    plain = writer.write("qwen-plain", one_group("Q3_K"), architecture="qwen3moe")
    grouped = writer.write("qwen-grouped", split([("Q3_K", 3), ("Q3_K", 5)], seed=1), architecture="qwen3moe")
    found = run_logits(runtime, [plain, grouped], tmp_path / "a.npz", "1,64")
    stock = run_logits(unpatched_runtime, [plain], tmp_path / "b.npz", "1,64")
    for batch in (1, 64):
        expected = stock[f"qwen-plain {batch} 2"]
        np.testing.assert_array_equal(found[f"qwen-plain {batch} 2"], expected)
        np.testing.assert_array_equal(found[f"qwen-grouped {batch} 2"], expected)


def test_stock_llama_cpp_refuses_mixed_files(
    writer: ModelWriter, unpatched_runtime: Runtime, tmp_path: Path
) -> None:
    mixed = writer.write("refused", [("Q2_K", (0, 1, 2)), ("Q3_K", (3, 4, 5, 6, 7))])
    with pytest.raises(AssertionError, match="does not load"):
        run_logits(unpatched_runtime, [mixed], tmp_path / "x.npz")


def test_the_loader_refuses_a_version_that_it_does_not_know(writer: ModelWriter, runtime: Runtime) -> None:
    groups = [("Q2_K", (0, 1, 2)), ("Q3_K", (3, 4, 5, 6, 7))]
    assert "'mc_gguf.version' is 2" in load_error(runtime, writer.write("version", groups, version=2))


def test_the_loader_refuses_a_group_that_is_no_weights(
    writer: ModelWriter, runtime: Runtime, tmp_path: Path
) -> None:
    good = writer.write("kind", [("F32", (0, 1, 2)), ("BF16", (3, 4, 5, 6, 7))])
    data = bytearray(good.read_bytes())
    name = b"blk.1.ffn_up_exps.weight.0"
    kind = data.index(name) + len(name) + 4 + 3 * 8  # behind the number of dimensions and the shape
    assert data[kind : kind + 4] == struct.pack("<i", 0)
    data[kind : kind + 4] = struct.pack("<i", 26)  # I32
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    assert "is I32" in load_error(runtime, bad)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ((0, 0), 9, "group 9"),
        ((0, 0), -1, "group -1"),
        ((0, 1), 100, "position 100"),
        ((1, 1), 0, "two experts"),
    ],
)
def test_the_loader_refuses_a_map_that_leads_astray(
    writer: ModelWriter, runtime: Runtime, tmp_path: Path, entry: tuple[int, int], value: int, words: str
) -> None:
    good = writer.write("map", [("Q2_K", (0, 1, 2)), ("Q3_K", (3, 4, 5, 6, 7))])
    name = "blk.1.ffn_up_exps.weight.map"
    offset = read_header(good).tensors[name].offset
    data = bytearray(good.read_bytes())
    at = offset + 8 * entry[0] + 4 * entry[1]
    data[at : at + 4] = struct.pack("<i", value)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    message = load_error(runtime, bad)
    assert name in message
    assert words in message
