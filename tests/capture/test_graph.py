"""ggml's tensors as Node shows them: names, operations, shapes, parameters and numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mc_gguf.capture import graph as graphs
from mc_gguf.capture.graph import Node, check_layout
from mc_gguf.common.errors import McError, RuntimeBuildError
from tests.support.ggml_graph import Graph

pytestmark = pytest.mark.native


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on ggml says of every buffer that it does not lie in the host's memory."""
    monkeypatch.setattr(graphs._ggml(), "ggml_backend_buffer_is_host", lambda _: False)


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "device":
        elsewhere(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int32])
def test_numbers_are_read_in_numpys_order(place: str, kind: Any) -> None:
    values = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(kind)
    with Graph() as graph:
        tensor = graph.leaf(values, "numbers")
        graph.compute(tensor)
        node = graph.node(tensor)
        assert (node.name, node.op, node.shape, node.rows) == ("numbers", "NONE", (5, 3, 2, 1), 6)
        found = node.read()
        assert found.dtype == kind
        np.testing.assert_array_equal(found, values[None])


def test_views_and_permutations_are_read_through_their_strides(place: str) -> None:
    values = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
    with Graph() as graph:
        tensor = graph.leaf(values)
        view = graph("ggml_view_2d", tensor, 3, 4, 24, 12)
        turned = graph("ggml_transpose", view)
        assert graph.node(view).offset == 12
        np.testing.assert_array_equal(graph.compute(turned), values[:, 3:].T[None, None])
        np.testing.assert_array_equal(graph.node(view).read(), values[None, None, :, 3:])


def test_operations_have_their_kind_sources_and_parameters() -> None:
    with Graph() as graph:
        a, b = (graph.leaf(np.ones((2, 8), np.float32), name) for name in "ab")
        node = graph.node(graph("ggml_swiglu_oai", a, b, 1.75, 7.0))
        assert (node.op, node.param(2), node.param(3)) == ("GLU.SWIGLU_OAI", 1.75, 7.0)
        assert [source.name for source in node.sources()] == ["a", "b"]
        second = node.src(1)
        assert second is not None
        assert second.name == "b"
        assert node.src(2) is None
        assert graph.node(graph("ggml_relu", a)).op == "UNARY.RELU"
        swapped = graph.node(graph("ggml_swiglu_swapped", a))
        assert (swapped.op, swapped.int_param(1)) == ("GLU.SWIGLU", 1)
        same = (graph.node(graph("ggml_mul", a, b)) for _ in range(2))
        assert len({node.op_code for node in same}) == 1


@pytest.mark.parametrize("slots", [False, True])
def test_what_is_added_stands_in_the_graph(place: str, slots: bool) -> None:
    shape = (4, 3, 5) if slots else (4, 5)  # tokens, slots, width
    with Graph() as graph:
        tensor = graph.leaf(np.zeros(shape, np.float32))
        graph.compute(tensor)
        change = np.arange(10, dtype=np.float32).reshape(2, 5)
        graph.node(tensor).add(1, change, slots=slots)
        graph.node(tensor).add(1, change, slots=slots)
        expected = np.zeros(shape, np.float32)
        (expected[:, 0] if slots else expected)[1:3] = 2 * change
        np.testing.assert_array_equal(graph.node(tensor).read()[0].reshape(shape), expected)


def test_rows_that_are_apart_are_not_added_to() -> None:
    with Graph() as graph:
        tensor = graph.leaf(np.zeros((3, 4, 5), np.float32))
        turned = graph("ggml_permute", tensor, 0, 2, 1, 3)
        graph.compute(turned)
        with pytest.raises(McError, match="not contiguous"):
            graph.node(turned).add(0, np.ones((1, 5), np.float32), slots=False)


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_layout()
    library: Any = graphs._ggml()
    graphs._ggml.cache_clear()
    monkeypatch.setattr(graphs, "load_ggml_base", lambda: _Other(library))
    try:
        with pytest.raises(RuntimeBuildError, match="ggml_tensor is not the one"):
            check_layout()
    finally:
        graphs._ggml.cache_clear()


class _Other:
    """ggml's library with a larger tensor."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.ggml_tensor_overhead = _Overhead()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


class _Overhead(SimpleNamespace):
    def __call__(self) -> int:
        return 400


def test_a_node_is_what_its_address_is() -> None:
    with Graph() as graph:
        tensor = graph.leaf(np.ones(3, np.float32), "x")
        assert Node(int(tensor)).address == tensor
