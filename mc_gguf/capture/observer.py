"""The listener of a capture: it recognises MoE blocks and matrices in the graph and hands over their rows.

What is recognised, in the order in which the graph has it (build_moe_ffn of the pinned llama.cpp):

    ffn_moe_probs-N          the router's probabilities
    ffn_moe_weights-N        those of the selected experts; ffn_moe_weights_softmax-N replaces them
    MUL_MAT_ID               by a stack of experts, whose name says block and projection
    ffn_moe_weighted-N       outputs times routing weights (Llama 4 multiplies inputs instead)
    l_out-N                  the hidden states after the layer
    MUL_MAT                  by any other matrix of the model
    result_norm              the input of the output matrix: nothing that comes after it is needed

Names are compared exactly: views of a tensor have its name with something added.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import EXPERT_STACK
from mc_gguf.capture.function import ExpertFunction, UnknownFunctionError, function_of, scale_of
from mc_gguf.capture.graph import Node
from mc_gguf.capture.listener import Listener

Array = NDArray[Any]

_NAMED = re.compile(
    r"(ffn_moe_probs|ffn_moe_weights|ffn_moe_weights_softmax|ffn_moe_weighted|l_out)-\d+|(result_norm)"
)
MATMUL_ID = ("MUL_MAT_ID", "MUL_MAT_ID_GROUPED")
# What lies between the hidden states and the input of a MoE block, beside a norm.
_BEFORE_NORM = ("RESHAPE", "VIEW", "CONT", "MUL", "REPEAT")


@dataclass(eq=False)
class Block:
    """What the graph has shown of the MoE block `layer` so far.

    Attributes:
        layer: number of the layer, from the name of its weights.
        probs: [tokens, K] the router's weights of the selected experts.
        router: [tokens, E] its probabilities of all experts.
        experts: [tokens, K] the selected experts.
        weighted_input: whether routing weights multiply the inputs.
        function: None where the graph has an operation that is not known; `unknown` names it then.
        seen: projections whose products have been computed.
    """

    layer: int
    probs: Array
    router: Array
    experts: Array
    weighted_input: bool
    function: ExpertFunction | None = None
    unknown: str = ""
    seen: set[str] = field(default_factory=set)


class Sink:
    """What an observer reports to. Arrays are valid during the call only."""

    def block_input(self, block: Block, rows: Array, before: Array | None) -> None:
        """`rows` [rows, n_embd]: one row per token, or per token and slot where inputs are weighted. `before`
        [tokens, n_embd]: the hidden states before the norm, where the graph has one.
        """

    def block_middle(self, block: Block, rows: Array) -> None:
        """The input of down, `rows` [tokens, K, n_ff]."""

    def block_output(self, block: Block, node: Node, weights: Array | None) -> None:
        """Outputs [n_embd, K, tokens] of the experts, times `weights` [tokens, K] (None: not weighted)."""

    def layer_output(self, node: Node, layer: int) -> None:
        """Hidden states [n_embd, tokens] after the layer that had the last MoE block."""

    def wants_matrix(self, name: str) -> bool:
        """Whether the inputs of the matrix are of interest."""
        return False

    def matrix_product(self, name: str, node: Node) -> None:
        """The product with a matrix has been computed."""

    def final_input(self, node: Node) -> None:
        """The input of the output matrix has been computed."""


class Observer(Listener):
    """A listener that reports to `sink`."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink
        self._probs: Array = np.zeros((0, 0), np.float32)
        self._router: Array = np.zeros((0, 0), np.float32)
        self._block: Block | None = None
        self._functions: dict[int, tuple[ExpertFunction | None, str]] = {}
        self._named: dict[str, Callable[[Node], None]] = {
            "ffn_moe_probs": self._on_router,
            "ffn_moe_weights": self._on_probs,
            "ffn_moe_weights_softmax": self._on_probs,
            "ffn_moe_weighted": self._on_weighted,
            "l_out": self._on_layer,
            "result_norm": self._on_result,
        }

    def begin(self) -> None:
        """A batch begins."""
        self.is_finished = False
        self._block = None

    def wants(self, node: Node) -> bool:
        return bool(self._roles(node))

    def computed(self, node: Node) -> None:
        for role in self._roles(node):
            role(node)

    def _roles(self, node: Node) -> list[Callable[[Node], None]]:
        """What is done with a node once it is computed."""
        op, roles = node.op, list[Callable[[Node], None]]()
        weights = node.src(0) if op in MATMUL_ID or op == "MUL_MAT" else None
        if weights is not None and op in MATMUL_ID and EXPERT_STACK.fullmatch(weights.name):
            roles.append(self._on_expert_product)
        elif weights is not None and op == "MUL_MAT" and weights.op == "NONE":
            if self.sink.wants_matrix(weights.name):
                roles.append(self._on_product)
        if found := _NAMED.fullmatch(node.name):
            roles.append(self._named[found[1] or found[2]])
        return roles

    def _on_product(self, node: Node) -> None:
        weights = node.src(0)
        assert weights is not None
        self.sink.matrix_product(weights.name, node)

    def _on_router(self, node: Node) -> None:
        values = node.read()
        self._router = values.reshape(-1, values.shape[-1]).copy()

    def _on_probs(self, node: Node) -> None:
        first, second = node.shape[:2]  # [1, K, tokens], or [K, tokens]
        self._probs = node.read().reshape(-1, second if first == 1 else first).copy()

    def _on_expert_product(self, node: Node) -> None:
        weights, inputs, ids = (node.src(i) for i in range(3))
        assert weights is not None
        assert inputs is not None
        assert ids is not None
        found = EXPERT_STACK.fullmatch(weights.name)
        assert found is not None
        layer, projection = int(found[1]), found[2]
        block = self._block
        if block is None or block.layer != layer or projection in block.seen or "down" in block.seen:
            experts, is_weighted = ids.read()[0, 0].copy(), is_weighted_input(inputs)
            block = self._block = Block(layer, self._probs, self._router, experts, is_weighted)
            rows = inputs.read()
            self.sink.block_input(block, rows.reshape(-1, rows.shape[-1]), before_norm(inputs))
        block.seen.add(projection)
        if projection == "down":
            block.function, block.unknown = self._function(layer, inputs)
            self.sink.block_middle(block, inputs.read()[0])
            if block.weighted_input:
                self.sink.block_output(block, node, None)

    def _function(self, layer: int, inputs: Node) -> tuple[ExpertFunction | None, str]:
        if layer not in self._functions:
            try:
                self._functions[layer] = ExpertFunction(function_of(inputs)), ""
            except UnknownFunctionError as error:
                self._functions[layer] = None, str(error)
        return self._functions[layer]

    def _on_weighted(self, node: Node) -> None:
        """After down: the outputs. Before the inner matrices it is their input, which is read there."""
        block = self._block
        if block is None or "down" not in block.seen or block.weighted_input:
            return
        outputs, weights = node.src(0), node.src(1)
        assert outputs is not None
        assert weights is not None
        if block.function is not None:
            block.function = _with_down(block.function, outputs)
            self._functions[block.layer] = block.function, ""
        self.sink.block_output(block, node, weights.read().reshape(len(block.experts), -1).copy())

    def _on_layer(self, node: Node) -> None:
        if self._block is not None and "down" in self._block.seen:
            self.sink.layer_output(node, self._block.layer)

    def _on_result(self, node: Node) -> None:
        self.sink.final_input(node)
        self.is_finished = True


def is_weighted_input(inputs: Node) -> bool:
    """Whether the input of experts is already multiplied by the routing weights."""
    return inputs.op == "MUL" and inputs.name.startswith("ffn_moe_weighted")


def before_norm(inputs: Node) -> Array | None:
    """What was normalised to become the input of a MoE block; the residual connection keeps it in memory."""
    node: Node | None = inputs
    while node is not None and node.op in _BEFORE_NORM:
        node = node.src(0)
    source = node.src(0) if node is not None and node.op in ("RMS_NORM", "NORM") else None
    if source is None or source.kind:
        return None
    rows = source.read()
    return rows.reshape(-1, rows.shape[-1])


def _with_down(function: ExpertFunction, outputs: Node) -> ExpertFunction:
    """`function` with the bias and scale that `outputs`, what is weighted, has beside the product."""
    bias = scale = ""
    node: Node | None = outputs
    while node is not None and node.op not in MATMUL_ID:
        other = node.src(1)
        if node.op == "ADD_ID" and other is not None:
            bias = other.name
        elif node.op == "MUL" and other is not None:
            scale = scale_of(other)
        node = node.src(0)
    return ExpertFunction(function.expression, bias, scale)
