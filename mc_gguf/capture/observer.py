"""The eval callback of a capture: it recognises MoE blocks and matrices in the graph and hands over their rows.

What is recognised, in the order in which the graph has it (build_moe_ffn of the pinned llama.cpp):

    ffn_moe_probs-N          the router's probabilities
    ffn_moe_weights-N        those of the selected experts; ffn_moe_weights_softmax-N replaces them
    MUL_MAT_ID               by a stack of experts, whose name says block and projection
    ffn_moe_weighted-N       outputs times routing weights (Llama 4 multiplies inputs instead)
    l_out-N                  the hidden states after the layer
    MUL_MAT                  by any other matrix of the model

Names are compared exactly: views of a tensor have its name with something added.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import EXPERT_STACK
from mc_gguf.capture.function import ExpertFunction, UnknownFunctionError, _scale_of, function_of
from mc_gguf.capture.graph import Node

Array = NDArray[Any]

_NAMED = re.compile(r"(ffn_moe_probs|ffn_moe_weights|ffn_moe_weights_softmax|ffn_moe_weighted|l_out)-\d+")
_MATRIX = re.compile(r".*\.weight")
MATMUL_ID = ("MUL_MAT_ID", "MUL_MAT_ID_GROUPED")


@dataclass(eq=False)
class Block:
    """What the graph has shown of the MoE block `layer` so far.

    Attributes:
        layer: number of the layer, from the name of its weights.
        probs: [tokens, K] the router's weights of the selected experts.
        router: [tokens, E] its probabilities of all experts.
        experts: [tokens, K] the selected experts.
        function: None where the graph has an operation that is not known; `unknown` names it then.
        weighted_input: whether routing weights multiply the inputs.
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
        """Outputs [n_embd, K, tokens] of the experts, times `weights` [tokens, K]; None: they are not
        weighted.
        """

    def layer_output(self, node: Node, layer: int) -> None:
        """Hidden states [n_embd, tokens] after the layer that had the last MoE block."""

    def matrix(self, name: str, node: Node) -> bool:
        """A product with the matrix `name` is about to be computed; returns whether its sources are wanted."""
        return False

    def matrix_product(self, name: str, node: Node) -> None:
        """It has been computed."""


class Observer:
    """An eval callback that reports to `sink`.

    What a sink raises is kept, the computation ends as soon as the scheduler asks again, and `check` raises
    it: an exception must not pass through C.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.error: BaseException | None = None
        self._probs: Array = np.zeros((0, 0), np.float32)
        self._router: Array = np.zeros((0, 0), np.float32)
        self._block: Block | None = None
        self._functions: dict[int, tuple[ExpertFunction | None, str]] = {}

    def check(self) -> None:
        """Raises what happened in a callback."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def __call__(self, address: int, ask: bool, _user_data: object) -> bool:
        if self.error is not None:
            return False
        try:
            node = Node(address)
            if ask:
                return self._role(node) is not None
            role = self._role(node)
            if role is not None:
                role(node)
        except BaseException as error:
            self.error = error
            return False
        return True

    def _role(self, node: Node) -> Callable[[Node], None] | None:
        """What is done with a node once it is computed; None: nothing."""
        op = node.op
        if op in MATMUL_ID:
            weights = node.src(0)
            if weights is not None and EXPERT_STACK.fullmatch(weights.name):
                return self._product
            return None
        if op == "MUL_MAT":
            weights = node.src(0)
            if weights is not None and weights.op == "NONE" and _MATRIX.fullmatch(weights.name):
                if self.sink.matrix(weights.name, node):
                    return self._matrix
        found = _NAMED.fullmatch(node.name)
        return None if found is None else self._named.get(found[1], None)

    @property
    def _named(self) -> dict[str, Callable[[Node], None]]:
        return {
            "ffn_moe_probs": self._on_router,
            "ffn_moe_weights": self._on_probs,
            "ffn_moe_weights_softmax": self._on_probs,
            "ffn_moe_weighted": self._on_weighted,
            "l_out": self._on_layer,
        }

    def _matrix(self, node: Node) -> None:
        weights = node.src(0)
        assert weights is not None
        self.sink.matrix_product(weights.name, node)
        if (found := _NAMED.fullmatch(node.name)) and found[1] == "ffn_moe_probs":  # logits serve as such
            self._on_router(node)

    def _on_router(self, node: Node) -> None:
        values = node.read()
        self._router = values.reshape(-1, values.shape[-1]).copy()

    def _on_probs(self, node: Node) -> None:
        n_expert, k, n_token = node.shape[:3]
        values = node.read()
        self._probs = values.reshape(-1, k if n_expert == 1 else n_expert).copy()

    def _product(self, node: Node) -> None:
        weights, inputs, ids = node.src(0), node.src(1), node.src(2)
        assert weights is not None and inputs is not None and ids is not None
        found = EXPERT_STACK.fullmatch(weights.name)
        assert found is not None
        layer, projection = int(found[1]), found[2]
        block = self._block
        if block is None or block.layer != layer or projection in block.seen or "down" in block.seen:
            block = self._block = Block(
                layer, self._probs, self._router, ids.read()[0, 0].copy(), _is_weighted(inputs)
            )
            rows = inputs.read()
            self.sink.block_input(block, rows.reshape(-1, rows.shape[-1]), _before_norm(inputs))
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
        assert outputs is not None and weights is not None
        if block.function is not None:
            block.function = _with_down(block.function, outputs)
            self._functions[block.layer] = block.function, ""
        values = weights.read()
        self.sink.block_output(block, node, values.reshape(len(block.experts), -1).copy())

    def _on_layer(self, node: Node) -> None:
        if self._block is not None and "down" in self._block.seen:
            self.sink.layer_output(node, self._block.layer)


def _is_weighted(inputs: Node) -> bool:
    return inputs.op == "MUL" and inputs.name.startswith("ffn_moe_weighted")


def _before_norm(inputs: Node) -> Array | None:
    """What was normalised to become the input of a MoE block; the residual connection keeps it in memory."""
    node: Node | None = inputs
    while node is not None and node.op in ("RESHAPE", "VIEW", "CONT", "MUL", "REPEAT"):
        node = node.src(0)
    if node is None or node.op not in ("RMS_NORM", "NORM"):
        return None
    source = node.src(0)
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
            scale = _scale_of(other)
        node = node.src(0)
    return ExpertFunction(function.expression, bias, scale)


def callback_type() -> Any:
    """The ctypes type of ggml_backend_sched_eval_callback."""
    return ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
