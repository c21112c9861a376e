"""What the runtime computed, on the disk: one file per MoE block and kind of rows, and the sums so far.

    blk.3.x           rows of the block's input, float16 [rows, n_embd], divided by a power of 2 if need be
    blk.3.x_scale     that power, float32 [rows]
    blk.3.experts     the selected experts, int32 [tokens, K], in the runtime's order
    blk.3.weights     what multiplies their outputs, float32 [tokens, K]
    blk.3.probs       the router's weights before they are renormalised, float32 [tokens, K]
    blk.3.router      the router's probabilities of all experts, float16 [tokens, E]
    blk.3.output_sq   squared norms of the weighted outputs, float32 [tokens, K]
    blk.3.output_max  largest magnitude of the outputs of down, float32 [tokens, K]
    blk.3.hidden_sq   squared norm of the hidden state after the layer, float32 [tokens]
    blk.3.sampled     weighted outputs for the sampled tokens, float16 [samples, K, n_embd]
    input.7           rows of an input of other matrices, float16 [samples, columns]
    sums.safetensors  sums over all tokens so far, and how many these are

float16 keeps 11 bits of each number, where the products of a model in bfloat16 see 8 and those of one in Q8_0
no more. Everything is written at the place of its tokens, then the sums with the number of tokens, by
renaming: a run that was killed goes on after the tokens that its sums have.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_gguf.common.files import atomic_write

_SUMS = "sums.safetensors"
_MAX_HALF = 32768.0  # float16 has numbers up to 65504


@dataclass(frozen=True)
class Rows:
    """One file of rows: `shape` is that of one token."""

    path: Path
    dtype: Any
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

    def write(self, first: int, values: NDArray[Any]) -> None:
        """Put the rows of some tokens at the place of token `first`."""
        data = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1).view(np.uint8).data
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            offset = first * self.row_bytes
            while data:
                written = os.pwrite(handle, data, offset)
                data, offset = data[written:], offset + written
        finally:
            os.close(handle)

    def read(self, n: int) -> NDArray[Any]:
        """The rows of the first `n` tokens, mapped; they are read when they are used."""
        shape = (n, *self.shape)
        if not n:
            return np.zeros(shape, self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=shape)


class Spool:
    """The files in `folder`; `sums` are arrays by name, `facts` a JSON document, `done` counts the tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sums: dict[str, NDArray[Any]] = {}
        self.facts: dict[str, Any] = {}
        self.done = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / _SUMS, framework="numpy") as file:
                header = json.loads((file.metadata() or {})["mc_gguf"])
                self.sums = {name: file.get_tensor(name) for name in file.keys()}
            self.facts, self.done = header["facts"], int(header["done"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            self.sums, self.facts, self.done = {}, {}, 0

    def save(self, done: int) -> None:
        """From now on `done` tokens count as captured."""
        from safetensors.numpy import save

        header = json.dumps({"facts": self.facts, "done": done}, sort_keys=True)
        with atomic_write(self.folder / _SUMS) as file:
            file.write(save(self.sums, metadata={"mc_gguf": header}))
        self.done = done

    def rows(self, name: str, dtype: Any, shape: tuple[int, ...] = ()) -> Rows:
        return Rows(self.folder / name, dtype, shape)

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Add to the sum called `name`."""
        if name in self.sums:
            self.sums[name] += values
        else:
            self.sums[name] = values.astype(np.float64)

    def largest(self, name: str, value: float) -> None:
        """Keep the larger of `value` and the number called `name`."""
        found = self.sums.get(name)
        self.sums[name] = np.array([value if found is None else max(value, float(found[0]))])


def to_half(rows: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """float16 rows, and the powers of 2 [n] that they have to be multiplied by: 1 where every number fits."""
    tensor = torch.from_numpy(rows)
    largest = tensor.abs().amax(dim=1)
    scale = torch.ones_like(largest)
    if len(largest) and float(largest.max()) > _MAX_HALF:
        scale = torch.exp2(torch.ceil(torch.log2(largest / _MAX_HALF)).clamp(min=0))
        tensor = tensor / scale[:, None]
    return tensor.half().numpy(), scale.numpy()


def from_half(rows: NDArray[np.float16], scale: NDArray[np.float32]) -> torch.Tensor:
    """The inverse of to_half()."""
    found = torch.from_numpy(np.array(rows)).float()
    return found.mul_(torch.from_numpy(np.array(scale))[:, None])
