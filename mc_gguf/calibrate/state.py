"""What calibrate keeps on disk after every layer, so that a killed run can continue.

    stats.safetensors   statistics of the layers done
    hidden-7.npy        hidden states [n_rows, ctx, n_embd] after 7 layers
    branches-7/         those of sensitivity.Branches, one file each
    working/            the branches in layer 7, which is under way

These lie in the output's working directory (common/workdir.py). The hidden states and branches are written
first, the statistics second, all to a temporary name and renamed; then those of the layer before are deleted.
So whenever a run is killed, statistics of n layers find the states after n. Disk: the hidden states twice,
the branches up to three times (sensitivity.py). A run that need not be continued keeps the branches only, in
a temporary directory.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import ModelInfo
from mc_gguf.calibrate.sensitivity import WORKING, branch_rows, branches_directory
from mc_gguf.calibrate.statistics import LayerStatistics, stack_layers, unstack_layers
from mc_gguf.common.arrays import write_array
from mc_gguf.common.files import atomic_write
from mc_gguf.common.workdir import keep_only

STATE_VERSION = 5

log = logging.getLogger(__name__)


_STATS = "stats.safetensors"


class CalibrationState:
    """Statistics of the layers that are done and, after a resume, the hidden states that the next layer
    needs. The branches are in `directory`.

    This is a context manager: at its end, only what a resumed run needs stays in the directory, and a
    temporary directory is removed.
    """

    def __init__(self, directory: Path | None) -> None:
        self.temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="mc-gguf-"))
        self.layers: list[LayerStatistics] = []
        self.hidden: Tensor | None = None

    @classmethod
    def resume(cls, directory: Path | None) -> CalibrationState:
        """The state in `directory` if there is a whole one, else an empty one."""
        state = cls(directory)
        if (state.directory / _STATS).exists():
            state._load()
        state._tidy()
        return state

    def __enter__(self) -> CalibrationState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.temporary:
            shutil.rmtree(self.directory, ignore_errors=True)
        elif (self.directory / _STATS).exists():
            # Not _tidy: an interrupt can have come between a layer's statistics and its place in `layers`.
            shutil.rmtree(self.directory / WORKING, ignore_errors=True)
        else:
            keep_only(self.directory, ())

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.directory / _STATS, framework="numpy") as file:
                arrays = {line.name: file.get_tensor(line.name) for line in LayerStatistics.lines()}
            done = len(arrays["frequency"])
            for branch in range(2 * done + 1):
                np.load(branches_directory(self.directory, done) / f"{branch}.npy", allow_pickle=False)
            # Copied into torch's own memory: the alignment of a buffer can change the last bit of a product.
            hidden = np.load(self.directory / f"hidden-{done}.npy", allow_pickle=False)
            self.hidden = torch.from_numpy(hidden).clone()
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("not continuing from %s (%s); starting anew", self.directory, error)
            return
        self.layers = unstack_layers(arrays)
        log.info("continuing after %d layers", done)

    def add(self, stats: LayerStatistics, hidden: Tensor) -> None:
        """Record one more layer. `hidden` is its output; its branches are in the directory already."""
        layers = [*self.layers, stats]
        if not self.temporary:
            self._save(layers, hidden)
        self.layers = layers
        self._tidy()

    def _save(self, layers: Sequence[LayerStatistics], hidden: Tensor) -> None:
        from safetensors.numpy import save

        with atomic_write(self.directory / f"hidden-{len(layers)}.npy") as file:
            write_array(file, hidden.numpy())
        with atomic_write(self.directory / _STATS) as file:
            file.write(save(stack_layers(layers)))

    def _tidy(self) -> None:
        """Remove what does not belong to the layers that are done: files of the layer before, or of one that
        was interrupted.
        """
        done = len(self.layers)
        needed = (_STATS, f"hidden-{done}.npy", branches_directory(self.directory, done).name)
        keep_only(self.directory, needed if done else ())


def state_bytes(info: ModelInfo, rows: NDArray[np.int32], sensitivity_tokens: int) -> int:
    """The most bytes that a calibration on `rows` [n_rows, ctx] keeps on disk: float32 states of n_embd
    numbers per token, twice for all tokens and three times for the branches.
    """
    n_branch = 2 * info.n_layer + 1
    n_token = 2 * rows.size + 3 * n_branch * branch_rows(rows, sensitivity_tokens).size
    return 4 * info.n_embd * int(n_token)
