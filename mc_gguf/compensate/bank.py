"""Quantized expert matrices on disk, found by what they were made from, so that nothing is quantized twice.

    bank = Bank(folder, bank_key(model.fingerprint, calibration.fingerprint, "ggml"))
    blocks = bank.get(layer, "down", expert, "IQ2_S")               # None: not there, or damaged
    bank.put(layer, "down", expert, "IQ2_S", quantize_rows(...))

    <folder>/<key, 16 digits>/<layer>/<projection>-<type>/<expert>.blocks

There is one file per matrix: a header with the CRC-32 of everything, then the blocks. A file appears by a
rename, so two processes may store the same matrix at the same time. It is not synced to the disk: a file that
a power cut left incomplete fails its check, counts as missing and is made again. The header identifies the
whole key, so blocks of another model, calibration or quantizer are never taken.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.files import atomic_write
from mc_gguf.ggml.types import ggml_type

_MAGIC = b"MCBANK1\n"
_DISK_BLOCK = 4096
_HEADER = struct.Struct("<8s32sIQQ")  # magic, SHA-256 of the identity, CRC-32, rows, bytes per row


def bank_key(model_fingerprint: str, calibration_fingerprint: str, quantizer: str) -> str:
    """The key of a Bank: all that blocks depend on. `quantizer` names the quantizer with its version and
    options.
    """
    document = json.dumps([model_fingerprint, calibration_fingerprint, quantizer])
    return hashlib.sha256(document.encode()).hexdigest()


def matrix_bytes(rows: int, weights_per_row: int, type_name: str) -> int:
    """Bytes of the file of one matrix, rounded up to blocks of the disk."""
    n_bytes = _HEADER.size + rows * ggml_type(type_name).row_bytes(weights_per_row)
    return -(-n_bytes // _DISK_BLOCK) * _DISK_BLOCK


class Bank:
    """Blocks of expert matrices: uint8 (rows, bytes per row). `layer` is the number of the layer in the
    model.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """`key` identifies model, calibration and quantizer (see bank_key)."""
        self.key = key
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]

    def get(self, layer: int, projection: str, expert: int, type_name: str) -> NDArray[np.uint8] | None:
        """The blocks that were stored; None when there are none or the file is damaged."""
        path = self._path(layer, projection, expert, type_name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) < _HEADER.size:
            return None
        magic, identity, crc, rows, row_bytes = _HEADER.unpack_from(data)
        blocks = memoryview(data)[_HEADER.size :]
        wanted = self._identity(layer, projection, expert, type_name)
        if magic != _MAGIC or identity != wanted or len(blocks) != rows * row_bytes:
            return None
        if crc != _crc(identity, rows, row_bytes, blocks):
            return None
        return np.frombuffer(blocks, dtype=np.uint8).reshape(rows, row_bytes)

    def put(
        self, layer: int, projection: str, expert: int, type_name: str, blocks: NDArray[np.uint8]
    ) -> None:
        """Store `blocks`, replacing what there is. Raises OSError when the disk is full."""
        if blocks.ndim != 2 or blocks.dtype != np.uint8:
            raise ValueError(f"blocks are (rows, bytes per row) uint8, not {blocks.shape} {blocks.dtype}")
        path, data = self._path(layer, projection, expert, type_name), blocks.tobytes()
        identity, (rows, row_bytes) = self._identity(layer, projection, expert, type_name), blocks.shape
        crc = _crc(identity, rows, row_bytes, data)
        with atomic_write(path, sync=False) as file:
            file.write(_HEADER.pack(_MAGIC, identity, crc, rows, row_bytes))
            file.write(data)

    def _path(self, layer: int, projection: str, expert: int, type_name: str) -> Path:
        kind = ggml_type(type_name).name
        return self.folder / str(layer) / f"{projection}-{kind}" / f"{expert}.blocks"

    def _identity(self, layer: int, projection: str, expert: int, type_name: str) -> bytes:
        document = json.dumps([self.key, layer, projection, expert, ggml_type(type_name).name])
        return hashlib.sha256(document.encode()).digest()


def _crc(identity: bytes, rows: int, row_bytes: int, data: bytes | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(identity + struct.pack("<QQ", rows, row_bytes)))
