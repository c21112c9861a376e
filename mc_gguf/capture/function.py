"""What one expert computes between its matrices, read from the graph: the input of down as a function of the
products with gate and up (build_moe_ffn of the pinned llama.cpp).

A function is an expression of nested lists, which is stored as JSON:

    ["GLU.SWIGLU", ["product", "gate"], ["product", "up"]]
    ["GLU.SWIGLU_OAI", ["bias", ["product", "gate"], "blk.0.ffn_gate_exps.bias"], [...], 1.702, 7.0]
    ["GLU.GEGLU", ["half", 0, ["product", "gate_up"]], ["half", 1, ["product", "gate_up"]]]
    ["SQR", ["UNARY.RELU", ["product", "up"]]]

Every operation works on each hidden unit alone, so one evaluation for many tokens and units, and automatic
differentiation, give all that measurements need. Whether the expression is right is not taken on trust: the
products that it is evaluated for must give the input of down that the runtime computed (layer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_gguf.artifacts import EXPERT_STACK
from mc_gguf.capture.graph import Node

Expression = list[Any]
Vectors = Callable[[str], Tensor]  # name of a tensor -> one expert's part of it: a bias [n], a scale []


class UnknownFunctionError(Exception):
    """The graph has an operation that is not in the tables below; the message names it."""


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "UNARY.SILU": F.silu,
    "UNARY.GELU": lambda x: F.gelu(x, approximate="tanh"),
    "UNARY.GELU_ERF": F.gelu,
    "UNARY.GELU_QUICK": lambda x: x * torch.sigmoid(1.702 * x),
    "UNARY.RELU": F.relu,
    "UNARY.SIGMOID": torch.sigmoid,
    "UNARY.TANH": torch.tanh,
    "UNARY.SOFTPLUS": F.softplus,
    "UNARY.NEG": torch.neg,
    "UNARY.ABS": torch.abs,
    "UNARY.EXP": torch.exp,
    "SQR": torch.square,
    "SQRT": torch.sqrt,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MUL": torch.mul,
    "ADD": torch.add,
    "SUB": torch.sub,
    "DIV": torch.div,
}
_GLU: dict[str, Callable[[Tensor], Tensor]] = {
    "GLU.REGLU": F.relu,
    "GLU.GEGLU": _UNARY["UNARY.GELU"],
    "GLU.SWIGLU": F.silu,
    "GLU.GEGLU_ERF": F.gelu,
    "GLU.GEGLU_QUICK": _UNARY["UNARY.GELU_QUICK"],
}
_TRANSPARENT = ("RESHAPE", "CONT", "CPY", "DUP")
_VECTOR = re.compile(r"blk\.\d+\.ffn_(?:gate|up|gate_up|down)_exps\.(bias|scale)")


def function_of(node: Node) -> Expression:
    """The expression whose value `node`, the input of down, has. Raises UnknownFunctionError."""
    op, sources = node.op, list(node.sources())
    if op in ("MUL_MAT_ID", "MUL_MAT_ID_GROUPED"):
        return _product(sources[0].name)
    if op in _TRANSPARENT:
        return function_of(sources[0])
    if op == "VIEW":
        return _half(node, sources[0])
    if op == "ADD_ID":
        return ["bias", function_of(sources[0]), _vector(sources[1])]
    if op == "MUL" and (scale := scale_of(sources[1])):
        return ["scale", function_of(sources[0]), scale]
    if op in _UNARY:
        return [op, function_of(sources[0])]
    if op in _BINARY:
        return [op, function_of(sources[0]), function_of(sources[1])]
    if op in ("SCALE", "CLAMP"):
        return [op, function_of(sources[0]), node.param(0), node.param(1)]
    if op in _GLU or op in ("GLU.SWIGLU_OAI", "GLU.SWIGLU_CLAMP"):
        gate, up = _glu_sources(node, sources)
        limits = {"GLU.SWIGLU_OAI": [node.param(2), node.param(3)], "GLU.SWIGLU_CLAMP": [node.param(3)]}
        return [op, gate, up, *limits.get(op, [])]
    raise UnknownFunctionError(op)


def _product(name: str) -> Expression:
    found = EXPERT_STACK.fullmatch(name)
    if found is None:
        raise UnknownFunctionError(f"a product with {name}")
    return ["product", found[2]]


def _half(node: Node, source: Node) -> Expression:
    """A view of one half of the rows of a merged product."""
    if node.shape[0] == source.shape[0] and node.offset == 0:
        return function_of(source)
    half, remainder = divmod(node.offset, 4 * node.shape[0])
    if 2 * node.shape[0] != source.shape[0] or remainder or half > 1:
        raise UnknownFunctionError("a view that is not one half of gate and up")
    return ["half", half, function_of(source)]


def _glu_sources(node: Node, sources: list[Node]) -> tuple[Expression, Expression]:
    if len(sources) == 2:
        return function_of(sources[0]), function_of(sources[1])
    whole, swapped = function_of(sources[0]), node.int_param(1)
    return ["half", int(bool(swapped)), whole], ["half", int(not swapped), whole]


def _vector(node: Node) -> str:
    if not _VECTOR.fullmatch(node.name):
        raise UnknownFunctionError(f"a bias called {node.name}")
    return node.name


def scale_of(node: Node) -> str:
    """The name of the tensor with one scale per expert that was spread over the slots; empty: it is none."""
    while node.op in ("GET_ROWS", "REPEAT", "RESHAPE", "VIEW", "CONT"):
        source = node.src(0)
        if source is None:
            return ""
        node = source
    return node.name if _VECTOR.fullmatch(node.name) else ""


def evaluate(function: Expression, products: Mapping[str, Tensor], vectors: Vectors) -> Tensor:
    """The value of an expression.

    Args:
        function: as function_of() gives it.
        products: by projection, [tokens, rows of the matrix].
        vectors: the expert's biases and scales.
    """
    op, *rest = function
    if op == "product":
        return products[rest[0]]
    values = [evaluate(x, products, vectors) for x in rest if isinstance(x, list)]
    if op == "half":
        n = values[0].shape[-1] // 2
        return values[0][..., n * rest[0] : n * (rest[0] + 1)]
    if op in ("bias", "scale"):
        vector = vectors(rest[1])
        return values[0] + vector if op == "bias" else values[0] * vector
    if op in _UNARY:
        return _UNARY[op](values[0])
    if op in _BINARY:
        return _BINARY[op](values[0], values[1])
    if op == "SCALE":
        return torch.add(values[0] * rest[1], rest[2])
    if op == "CLAMP":
        return values[0].clamp(rest[1], rest[2])
    if op in _GLU:
        return _GLU[op](values[0]) * values[1]
    gate, up, limits = values[0], values[1], rest[2:]
    if op == "GLU.SWIGLU_OAI":
        gate = gate.clamp(max=limits[1])
        return gate * torch.sigmoid(limits[0] * gate) * (up.clamp(-limits[1], limits[1]) + 1)
    gate = gate.clamp(max=limits[0])  # GLU.SWIGLU_CLAMP
    return F.silu(gate) * up.clamp(-limits[0], limits[0])


@dataclass(frozen=True)
class ExpertFunction:
    """What happens between an expert's inner matrices and down.

    Attributes:
        expression: as function_of() gives it.
        down_bias: name of the tensor that is added to the products with down; empty: none.
        down_scale: name of the tensor with a scale per expert of these products; empty: none.
    """

    expression: Expression
    down_bias: str = ""
    down_scale: str = ""

    def hidden(self, products: Mapping[str, Tensor], vectors: Vectors) -> Tensor:
        """The input of down [tokens, n_ff]."""
        return evaluate(self.expression, products, vectors)

    @property
    def text(self) -> str:
        """The expression as people write it."""
        return _text(self.expression)


def _text(function: Expression) -> str:
    op, *rest = function
    if op == "product":
        return str(rest[0])
    if op == "half":
        return f"{_text(rest[1])}[{rest[0]}]"
    if op in ("bias", "scale"):
        return f"({_text(rest[0])} {'+' if op == 'bias' else '*'} {op})"
    parts = [_text(x) if isinstance(x, list) else f"{x:g}" for x in rest]
    return f"{op.split('.')[-1].lower()}({', '.join(parts)})"
