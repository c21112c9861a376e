"""What calibrate keeps on disk, so that a killed run can continue.

    model.gguf          the copy of the model that the runtime evaluates, where the source is none itself
    spool/              what the runtime computed (capture/spool.py)
    stats.safetensors   statistics of the layers done
    change-7.npy        what dropping and rounding the experts of layer 7 changes, [2, S, n_embd]
    matrices.json       errors of the other matrices done
    divergences.json    of the changes of layers; matrix-changes.json: of the hidden states by matrices

These lie in the output's working directory (common/workdir.py). The changes of a layer are written first, its
statistics second, all to a temporary name and renamed: so whenever a run is killed, at most one layer is
measured again. A run that need not be continued keeps them in a temporary directory.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mc_gguf.calibrate.statistics import LayerStatistics, stack_layers, unstack_layers
from mc_gguf.common.arrays import write_array
from mc_gguf.common.files import atomic_write

STATE_VERSION = 6

log = logging.getLogger(__name__)

_STATS = "stats.safetensors"


class CalibrationState:
    """Statistics of the layers that are done, and the files above.

    This is a context manager: at its end, a temporary directory is removed.
    """

    def __init__(self, directory: Path | None) -> None:
        self.temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="mc-gguf-"))
        self.layers: list[LayerStatistics] = []
        if (self.directory / _STATS).exists():
            self._load()

    def __enter__(self) -> CalibrationState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.directory / _STATS, framework="numpy") as file:
                arrays = {line.name: file.get_tensor(line.name) for line in LayerStatistics.lines()}
            layers = unstack_layers(arrays)
            for number in range(len(layers)):
                self.change(number)
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("not continuing from %s (%s); measuring the layers anew", self.directory, error)
            return
        self.layers = layers
        log.info("continuing after %d layers", len(layers))

    def add(self, stats: LayerStatistics, change: Tensor) -> None:
        """Record one more layer and its changes [2, S, n_embd]."""
        from safetensors.numpy import save

        layers = [*self.layers, stats]
        with atomic_write(self._change_path(len(self.layers))) as file:
            write_array(file, change.numpy())
        if not self.temporary:
            with atomic_write(self.directory / _STATS) as file:
                file.write(save(stack_layers(layers)))
        self.layers = layers

    def change(self, number: int) -> Tensor:
        """The changes [2, S, n_embd] of the layer that was added as number `number`, counted from 0."""
        return torch.from_numpy(np.load(self._change_path(number), allow_pickle=False))

    def _change_path(self, number: int) -> Path:
        return self.directory / f"change-{number}.npy"

    def remembered(
        self, name: str, keys: list[str], make: Callable[[list[str]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Values by key, of which NAME.json has some already: `make` gives those of the keys that it lacks,
        which are then kept. Values are JSON documents.
        """
        path, found = self.directory / f"{name}.json", dict[str, Any]()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        missing = [key for key in keys if key not in found]
        if missing:
            found |= make(missing)
            with atomic_write(path) as file:
                file.write(json.dumps(found).encode())
        return {key: found[key] for key in keys}
