"""What transformers' models compute in their MoE blocks, and what changes of these do to their output: the
reference for capture and calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class BlockReference:
    """One MoE block on N tokens; a token's K experts come in the order of their probabilities.

    Attributes:
        mlp: transformers' block.
        before: [N, n_embd] hidden states before the feed-forward block.
        x: [N, n_embd] the same, normalised: the block's input.
        after: [N, n_embd] hidden states after the layer.
    """

    mlp: Any
    before: Tensor
    x: Tensor
    after: Tensor

    @cached_property
    def router(self) -> Tensor:
        """[N, E] probabilities of all experts."""
        return torch.softmax(self.x @ self.mlp.gate.weight.data.T, dim=-1)

    @cached_property
    def experts(self) -> Tensor:
        """[N, K] the selected experts."""
        return self.router.topk(self.mlp.gate.top_k).indices

    @property
    def probs(self) -> Tensor:
        """[N, K] their probabilities."""
        return self.router.gather(1, self.experts)

    @property
    def weights(self) -> Tensor:
        """[N, K] what multiplies their outputs."""
        return self.kept(torch.ones_like(self.probs))

    def kept(self, keep: Tensor) -> Tensor:
        """[N, K] routing weights of the experts that `keep` marks with ones; Mixtral has no choice but to
        renormalise them.
        """
        probs = self.probs * keep
        renormalises = getattr(self.mlp.gate, "norm_topk_prob", True)
        return probs / probs.sum(1, keepdim=True) if renormalises else probs

    def keep(self, thresholds: NDArray[np.float64]) -> Tensor:
        """[N, K] 0 for the experts of rank j >= 1 with w_j / w_0 < thresholds[j - 1], else 1."""
        limits = torch.from_numpy(np.concatenate([[0.0], thresholds]))
        return (self.probs / self.probs[:, :1] >= limits).float()

    @property
    def n_expert(self) -> int:
        return int(self.mlp.experts.down_proj.shape[0])

    def matrices(self, number: int) -> dict[str, Tensor]:
        """One expert's matrices by projection: views of the model's own."""
        gate, up = self.mlp.experts.gate_up_proj.data[number].chunk(2)
        return {"gate": gate, "up": up, "down": self.mlp.experts.down_proj.data[number]}

    def tokens_of(self, number: int) -> tuple[Tensor, Tensor]:
        """The tokens of an expert, and its rank among theirs."""
        index, ranks = torch.nonzero(self.experts == number, as_tuple=True)
        return index, ranks

    def output(self, matrices: Mapping[str, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """The input of down [n, n_ff] and the output [n, n_embd] of an expert with these matrices."""
        x = self.x[index]
        hidden = torch.nn.functional.silu(x @ matrices["gate"].T) * (x @ matrices["up"].T)
        return hidden, hidden @ matrices["down"].T

    def outputs(self, rounded: bool = False) -> Tensor:
        """[N, K, n_embd] outputs of the experts, not weighted; with `rounded` of rounded ones."""
        found = torch.zeros(*self.experts.shape, self.x.shape[1])
        for number in range(self.n_expert):
            index, ranks = self.tokens_of(number)
            matrices = self.matrices(number)
            if rounded:
                matrices = {p: round_rows(m) for p, m in matrices.items()}
            found[index, ranks] = self.output(matrices, index)[1]
        return found


def round_rows(matrix: Tensor) -> Tensor:
    """Every row in multiples of 1.05 root mean squares, at most two of them."""
    step = 1.05 * matrix.square().mean(-1, keepdim=True).sqrt()
    return (matrix / step).round().clamp(-2, 2) * step


@torch.no_grad()
def block_references(model: Any, rows: Tokens) -> list[BlockReference]:
    """The blocks of all layers, for the tokens of `rows`."""
    seen: dict[str, list[Tensor]] = {"before": [], "x": [], "after": []}
    handles = []
    for layer in model.model.layers:
        parts = (("before", layer.post_attention_layernorm), ("x", layer.mlp))
        for name, module in parts:
            handles.append(module.register_forward_pre_hook(_keep_input(seen[name])))
        handles.append(layer.register_forward_hook(_keep_output(seen["after"])))
    model(torch.from_numpy(rows).long())
    for handle in handles:
        handle.remove()
    columns = zip(model.model.layers, *seen.values(), strict=True)
    return [BlockReference(layer.mlp, *tensors) for layer, *tensors in columns]


def _keep_input(into: list[Tensor]) -> Any:
    return lambda _, inputs: into.append(inputs[0].flatten(0, 1).clone())


def _keep_output(into: list[Tensor]) -> Any:
    return lambda _, inputs, output: into.append(_tensor(output).flatten(0, 1).clone())


def _tensor(output: Any) -> Tensor:
    return torch.as_tensor(output[0] if isinstance(output, tuple) else output)


@torch.no_grad()
def divergence(model: Any, rows: Tokens, module: Any, change: Tensor) -> float:
    """Mean KL divergence, in nats per token, of the model's output when `change` [N, n] is added to the
    output of one of its modules.
    """
    base = log_probs(model, rows)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        added = _tensor(output) + change.view_as(_tensor(output))
        return (added, *output[1:]) if isinstance(output, tuple) else added

    handle = module.register_forward_hook(add)
    changed = log_probs(model, rows)
    handle.remove()
    return float((base.exp() * (base - changed)).sum(-1).mean())


@torch.no_grad()
def log_probs(model: Any, rows: Tokens) -> Tensor:
    logits = torch.as_tensor(model(torch.from_numpy(rows).long()).logits)
    return torch.log_softmax(logits.double(), dim=-1)
