"""Expert matrices in every type, as float32.

They are quantized once and stored in a bank, dequantized when needed, and kept in memory while there is room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import Calibration
from mc_gguf.calibrate.finite import place
from mc_gguf.compensate.bank import Bank
from mc_gguf.ggml.quantizers import dequantize_rows, quantize_rows
from mc_gguf.ggml.types import ggml_type
from mc_gguf.source import Checkpoint

# (layer of the model, projection, expert)
Place = tuple[int, str, int]
Quantizer = Callable[[int, str, int, str], NDArray[np.uint8]]


class GgmlQuantizer:
    """ggml's quantizers with the calibration's importance matrices, as quantize uses them."""

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration, threads: int = 1) -> None:
        self.checkpoint, self.calibration, self.threads = checkpoint, calibration, threads

    def __call__(self, layer: int, projection: str, expert: int, type_name: str) -> NDArray[np.uint8]:
        weights = self.checkpoint.expert(layer, projection, expert)
        imatrix = self.calibration.imatrix(layer, projection, expert)
        with place(layer, f"expert {expert}, {projection}"):
            return quantize_rows(weights, type_name, imatrix, self.threads)


class Matrices:
    """What quantize would write, dequantized. At most `limit_bytes` of it are kept in memory."""

    def __init__(self, checkpoint: Checkpoint, quantizer: Quantizer, bank: Bank, limit_bytes: int) -> None:
        self.checkpoint, self.quantizer, self.bank = checkpoint, quantizer, bank
        self.limit_bytes = limit_bytes
        self._kept: OrderedDict[tuple[Place, str | None], Tensor] = OrderedDict()
        self._n_byte = 0

    def get(self, layer: int, projection: str, expert: int, type_name: str | None) -> Tensor:
        """The matrix (rows, cols), float32, after rounding to the type; None: as the source has it."""
        key = ((layer, projection, expert), type_name)
        found = self._kept.get(key)
        if found is None:
            found = self._make(layer, projection, expert, type_name)
            self._keep(key, found)
        else:
            self._kept.move_to_end(key)
        return found

    def _make(self, layer: int, projection: str, expert: int, type_name: str | None) -> Tensor:
        if type_name is None:
            return _aligned(self.checkpoint.expert(layer, projection, expert))
        info = self.checkpoint.info
        rows, cols = info.expert_shape(projection)
        blocks = self.blocks(layer, projection, expert, type_name)
        return _aligned(dequantize_rows(blocks, type_name, cols, rows))

    def blocks(self, layer: int, projection: str, expert: int, type_name: str) -> NDArray[np.uint8]:
        """The quantized blocks from the bank; what it lacks is quantized and stored."""
        rows, cols = self.checkpoint.info.expert_shape(projection)
        blocks = self.bank.get(layer, projection, expert, type_name)
        if blocks is None or blocks.shape != (rows, ggml_type(type_name).row_bytes(cols)):
            blocks = self.quantizer(layer, projection, expert, type_name)
            self.bank.put(layer, projection, expert, type_name, blocks)
        return blocks

    def _keep(self, key: tuple[Place, str | None], matrix: Tensor) -> None:
        n_byte = matrix.numel() * matrix.element_size()
        if n_byte > self.limit_bytes:
            return
        self._kept[key] = matrix
        self._n_byte += n_byte
        while self._n_byte > self.limit_bytes:
            _, old = self._kept.popitem(last=False)
            self._n_byte -= old.numel() * old.element_size()


def _aligned(array: NDArray[np.float32]) -> Tensor:
    """The array on a 64-byte boundary; otherwise the last bits of a product would depend on its address."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()
