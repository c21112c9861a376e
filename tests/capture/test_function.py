"""The expert's function as it is read from ggml's graph, against ggml's own numbers and numpy's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_gguf.capture import function as functions
from mc_gguf.capture.function import ExpertFunction, UnknownFunctionError, evaluate, function_of, scale_of
from tests.support.ggml_graph import Address, Graph

pytestmark = pytest.mark.native

Doubles = NDArray[np.float64]
N_EXPERT, N_EMBD, N_FF, TOKENS, USED = 3, 16, 32, 7, 2
GATE, UP = ["product", "gate"], ["product", "up"]
erf = np.vectorize(math.erf, otypes=[np.float64])


def silu(x: Doubles) -> Doubles:
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: Doubles) -> Doubles:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))))


def gelu_erf(x: Doubles) -> Doubles:
    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))


def gelu_quick(x: Doubles) -> Doubles:
    return np.asarray(x / (1 + np.exp(-1.702 * x)))


def swiglu_oai(gate: Doubles, up: Doubles) -> Doubles:
    """alpha 1.702, limit 2."""
    x = np.minimum(gate, 2)
    return np.asarray(x / (1 + np.exp(-1.702 * x)) * (np.clip(up, -2, 2) + 1))


def swiglu_clamp(gate: Doubles, up: Doubles) -> Doubles:
    """limit 1.5."""
    return np.asarray(silu(np.minimum(gate, 1.5)) * np.clip(up, -1.5, 1.5))


# enum ggml_unary_op; SQR, SQRT and the rest have functions of their own.
UNARY: dict[str, tuple[Callable[[Doubles], Doubles], str]] = {
    "UNARY.SILU": (silu, "ggml_silu"),
    "UNARY.GELU": (gelu, "ggml_gelu"),
    "UNARY.GELU_ERF": (gelu_erf, "ggml_gelu_erf"),
    "UNARY.GELU_QUICK": (gelu_quick, "ggml_gelu_quick"),
    "UNARY.RELU": (lambda x: np.maximum(x, 0), "ggml_relu"),
    "UNARY.SIGMOID": (lambda x: 1 / (1 + np.exp(-x)), "ggml_sigmoid"),
    "UNARY.TANH": (np.tanh, "ggml_tanh"),
    "UNARY.SOFTPLUS": (lambda x: np.log1p(np.exp(x)), "ggml_softplus"),
    "UNARY.NEG": (np.negative, "ggml_neg"),
    "UNARY.ABS": (np.abs, "ggml_abs"),
    "UNARY.EXP": (np.exp, "ggml_exp"),
    "SQR": (np.square, "ggml_sqr"),
    "SQRT": (np.sqrt, "ggml_sqrt"),
}
BINARY: dict[str, tuple[Callable[[Doubles, Doubles], Doubles], str]] = {
    "MUL": (np.multiply, "ggml_mul"),
    "ADD": (np.add, "ggml_add"),
    "SUB": (np.subtract, "ggml_sub"),
    "DIV": (np.divide, "ggml_div"),
}
GLU: dict[str, tuple[Callable[[Doubles, Doubles], Doubles], str, tuple[float, ...]]] = {
    "GLU.REGLU": (lambda g, u: np.maximum(g, 0) * u, "ggml_reglu_split", ()),
    "GLU.GEGLU": (lambda g, u: gelu(g) * u, "ggml_geglu_split", ()),
    "GLU.SWIGLU": (lambda g, u: silu(g) * u, "ggml_swiglu_split", ()),
    "GLU.GEGLU_ERF": (lambda g, u: gelu_erf(g) * u, "ggml_geglu_erf_split", ()),
    "GLU.GEGLU_QUICK": (lambda g, u: gelu_quick(g) * u, "ggml_geglu_quick_split", ()),
    "GLU.SWIGLU_OAI": (swiglu_oai, "ggml_swiglu_oai", (1.702, 2.0)),
    "GLU.SWIGLU_CLAMP": (swiglu_clamp, "ggml_swiglu_clamp", (1.5,)),
}


@dataclass
class Products:
    """A graph with the experts' products; `vectors` are biases and scales by name."""

    graph: Graph
    experts: NDArray[np.int32]
    ids: Address
    by_projection: dict[str, Address]
    vectors: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, graph: Graph, **rows: int) -> Products:
        """Products of random inputs with a random matrix of so many rows per projection; some inputs are
        large.
        """
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((TOKENS, 1, N_EMBD)) * np.linspace(0.1, 3, TOKENS)[:, None, None]
        experts = np.array([rng.permutation(N_EXPERT)[:USED] for _ in range(TOKENS)], dtype=np.int32)
        x, ids = graph.leaf(inputs.astype(np.float32)), graph.leaf(experts)
        made = {}
        for name, n in rows.items():
            weights = rng.standard_normal((N_EXPERT, n, N_EMBD)) / N_EMBD**0.5
            stack = graph.leaf(weights.astype(np.float32), f"blk.4.ffn_{name}_exps.weight")
            made[name] = graph("ggml_mul_mat_id", stack, x, ids)
        return cls(graph, experts, ids, made, {})

    def vector(self, name: str, *shape: int) -> Address:
        rng = np.random.default_rng(len(self.vectors) + 1)
        self.vectors[name] = rng.standard_normal(shape).astype(np.float32)
        return self.graph.leaf(self.vectors[name], name)

    def evaluated(self, expression: list[Any]) -> NDArray[np.float32]:
        """The expression, expert by expert, as the runtime lays out its numbers [tokens, slots, rows]."""
        numbers = {p: self.graph.node(t).read()[0] for p, t in self.by_projection.items()}
        found: dict[tuple[int, int], NDArray[np.float32]] = {}
        for expert in range(N_EXPERT):
            tokens, slots = np.nonzero(self.experts == expert)
            products = {p: torch.from_numpy(z[tokens, slots]) for p, z in numbers.items()}
            own = {name: torch.as_tensor(np.array(v[expert])) for name, v in self.vectors.items()}
            values = evaluate(expression, products, own.__getitem__).numpy()
            found |= dict(zip(zip(tokens, slots, strict=True), values, strict=True))
        return np.array([[found[t, s] for s in range(USED)] for t in range(TOKENS)])

    def check(self, result: Address, expression: list[Any], tolerance: float = 1e-5) -> None:
        """ggml computes for `result` what `expression`, which is read from it, says."""
        assert function_of(self.graph.node(result)) == expression
        expected = self.graph.compute(result)[0]
        found = self.evaluated(expression)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def doubles(graph: Graph, tensor: Address) -> Doubles:
    return np.asarray(graph.node(tensor).read()[0], dtype=np.float64)


def test_every_operation_of_the_tables_is_tried() -> None:
    assert set(UNARY) == set(functions._UNARY)
    assert set(BINARY) == set(functions._BINARY)
    assert set(GLU) == {*functions._GLU, "GLU.SWIGLU_OAI", "GLU.SWIGLU_CLAMP"}


@pytest.mark.parametrize("op", UNARY)
def test_functions_of_one_product(op: str) -> None:
    formula, name = UNARY[op]
    with Graph() as graph:
        products = Products.of(graph, up=N_FF)
        up, expression = products.by_projection["up"], list[Any](UP)
        if op == "SQRT":
            up, expression = graph("ggml_sqr", up), ["SQR", UP]
        # ggml looks GELU up in a table of 16-bit floats.
        products.check(graph(name, up), [op, expression], 2e-3 if "GELU" in op else 1e-5)
        np.testing.assert_allclose(
            products.evaluated([op, expression]), formula(doubles(graph, up)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("op", BINARY)
def test_functions_of_two_products(op: str) -> None:
    formula, name = BINARY[op]
    with Graph() as graph:
        products = Products.of(graph, gate=N_FF, up=N_FF)
        gate, up = products.by_projection.values()
        products.check(graph(name, gate, up), [op, GATE, UP], 1e-4)
        expected = formula(doubles(graph, gate), doubles(graph, up))
        np.testing.assert_allclose(products.evaluated([op, GATE, UP]), expected, rtol=1e-5)


@pytest.mark.parametrize("op", GLU)
def test_gated_functions(op: str) -> None:
    formula, name, parameters = GLU[op]
    with Graph() as graph:
        products = Products.of(graph, gate=N_FF, up=N_FF)
        gate, up = products.by_projection.values()
        result = graph(name, gate, up, *parameters)
        expression = [op, GATE, UP, *(float(np.float32(p)) for p in parameters)]
        products.check(result, expression, 4e-3 if op in ("GLU.GEGLU", "GLU.GEGLU_QUICK") else 1e-5)
        expected = formula(doubles(graph, gate), doubles(graph, up))
        np.testing.assert_allclose(products.evaluated(expression), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_gate_and_up_of_one_matrix(swapped: bool) -> None:
    with Graph() as graph:
        products = Products.of(graph, gate_up=2 * N_FF)
        (whole,) = products.by_projection.values()
        name = "ggml_swiglu_swapped" if swapped else "ggml_swiglu"
        halves = [["half", i, ["product", "gate_up"]] for i in (0, 1)]
        products.check(graph(name, whole), ["GLU.SWIGLU", *(halves[::-1] if swapped else halves)])


def test_views_of_halves_and_copies_of_them() -> None:
    with Graph() as graph:
        products = Products.of(graph, gate_up=2 * N_FF)
        (whole,) = products.by_projection.values()
        row = 4 * 2 * N_FF
        views = [
            graph("ggml_view_3d", whole, N_FF, USED, TOKENS, row, row * USED, first)
            for first in (0, 4 * N_FF)
        ]
        gate, up = graph("ggml_cont", views[0]), graph("ggml_cont", views[1])
        result = graph("ggml_swiglu_split", gate, graph("ggml_reshape_3d", up, N_FF, USED, TOKENS))
        halves = [["half", i, ["product", "gate_up"]] for i in (0, 1)]
        products.check(result, ["GLU.SWIGLU", *halves])


def test_other_views_are_not_known() -> None:
    with Graph() as graph:
        products = Products.of(graph, gate_up=2 * N_FF)
        (whole,) = products.by_projection.values()
        row = 4 * 2 * N_FF
        for n, first in ((N_FF, 4), (N_FF // 2, 0)):
            view = graph("ggml_view_3d", whole, n, USED, TOKENS, row, row * USED, first)
            with pytest.raises(UnknownFunctionError, match="a view that is not one half"):
                function_of(graph.node(view))


def test_numbers_of_scales_and_limits() -> None:
    with Graph() as graph:
        products = Products.of(graph, up=N_FF)
        (up,) = products.by_projection.values()
        limited = graph("ggml_clamp", graph("ggml_scale_bias", up, 1.5, -0.25), -1.0, 0.5)
        products.check(limited, ["CLAMP", ["SCALE", UP, 1.5, -0.25], -1.0, 0.5])
        expected = np.clip(doubles(graph, up) * 1.5 - 0.25, -1, 0.5)
        found = products.evaluated(["CLAMP", ["SCALE", UP, 1.5, -0.25], -1.0, 0.5])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_biases_and_scales_of_each_expert() -> None:
    with Graph() as graph:
        products = Products.of(graph, gate=N_FF, up=N_FF)
        gate, up = products.by_projection.values()
        bias = products.vector("blk.4.ffn_gate_exps.bias", N_EXPERT, N_FF)
        scale = products.vector("blk.4.ffn_up_exps.scale", N_EXPERT)
        gate = graph("ggml_add_id", gate, bias, products.ids)
        scales = graph("ggml_reshape_3d", scale, 1, N_EXPERT, 1)
        scales = graph("ggml_repeat_4d", scales, 1, N_EXPERT, TOKENS, 1)
        up = graph("ggml_mul", up, graph("ggml_get_rows", scales, products.ids))
        expression = [
            "GLU.SWIGLU",
            ["bias", GATE, "blk.4.ffn_gate_exps.bias"],
            ["scale", UP, "blk.4.ffn_up_exps.scale"],
        ]
        products.check(graph("ggml_swiglu_split", gate, up), expression)
        assert ExpertFunction(expression).text == "swiglu((gate + bias), (up * scale))"


def test_a_product_of_two_values_is_no_scale() -> None:
    with Graph() as graph:
        products = Products.of(graph, up=N_FF)
        (up,) = products.by_projection.values()
        squares = graph("ggml_mul", up, up)
        assert scale_of(graph.node(up)) == ""
        products.check(squares, ["MUL", UP, UP])


def test_what_is_not_known_is_named() -> None:
    with Graph() as graph:
        products = Products.of(graph, up=N_FF)
        (up,) = products.by_projection.values()
        with pytest.raises(UnknownFunctionError, match=r"^UNARY\.HARDSWISH$"):
            function_of(graph.node(graph("ggml_sqr", graph("ggml_hardswish", up))))
        with pytest.raises(UnknownFunctionError, match=r"^SOFT_MAX$"):
            function_of(graph.node(graph("ggml_soft_max", up)))
        bias = graph("ggml_add_id", up, graph.leaf(np.ones((3, N_FF), np.float32), "other"), products.ids)
        with pytest.raises(UnknownFunctionError, match="a bias called other"):
            function_of(graph.node(bias))
        stack = graph.leaf(np.ones((3, N_FF, N_EMBD), np.float32), "blk.4.other.weight")
        x = graph.leaf(np.ones((TOKENS, 1, N_EMBD), np.float32))
        with pytest.raises(UnknownFunctionError, match=r"a product with blk\.4\.other\.weight"):
            function_of(graph.node(graph("ggml_mul_mat_id", stack, x, products.ids)))


def test_functions_are_written_as_people_write_them() -> None:
    whole = ["product", "gate_up"]
    merged = ["GLU.GEGLU", ["half", 0, whole], ["half", 1, whole]]
    assert ExpertFunction(merged).text == "geglu(gate_up[0], gate_up[1])"
    assert ExpertFunction(["SQR", ["UNARY.RELU", UP]]).text == "sqr(relu(up))"
    assert ExpertFunction(["GLU.SWIGLU_OAI", GATE, UP, 1.702, 7.0]).text == "swiglu_oai(gate, up, 1.702, 7)"
