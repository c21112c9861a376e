"""What calibrate keeps on disk after every layer, so that a killed run can continue.

    .calib.safetensors.partial/stats.safetensors   statistics of the layers done; header: identity of the run
    .calib.safetensors.partial/hidden-7.npy        hidden states [n_rows, ctx, n_embd] after 7 layers
    .calib.safetensors.partial/branches-7/         those of sensitivity.Branches, one file each
    .calib.safetensors.partial/working/            the branches in layer 7, which is under way

The hidden states and branches are written first, the statistics second, all to a temporary name and renamed;
then those of the layer before are deleted. So whatever is killed when, statistics of n layers find the states
after n. Disk: the hidden states twice, the branches up to three times (sensitivity.py). A run that shall not
be continued keeps the branches only, in a temporary directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from mc_gguf import __version__
from mc_gguf.calibrate.sensitivity import WORKING, branches_directory
from mc_gguf.calibrate.statistics import LayerStatistics, stack_layers, unstack_layers
from mc_gguf.common.files import atomic_write

STATE_VERSION = 5

log = logging.getLogger(__name__)


_STATS = "stats.safetensors"


class CalibrationState:
    """Statistics of the layers done and, after a resume, the hidden states that the next one needs; the
    branches are in `directory`.

    A context: at its end only what a resumed run needs stays in the directory, nothing of a temporary one.
    """

    def __init__(self, directory: Path | None, fingerprint: str) -> None:
        self.temporary, self.fingerprint = directory is None, fingerprint
        self.directory = directory or Path(tempfile.mkdtemp(prefix="mc-gguf-"))
        self.layers: list[LayerStatistics] = []
        self.hidden: Tensor | None = None

    @classmethod
    def resume(cls, directory: Path | None, identity: Mapping[str, object]) -> CalibrationState:
        """The state in `directory` if it is of the run that `identity` describes, else an empty one."""
        document = json.dumps({"state": STATE_VERSION, "tool": __version__, **identity}, sort_keys=True)
        state = cls(directory, hashlib.sha256(document.encode()).hexdigest())
        if (state.directory / _STATS).exists():
            state._load()
        state.directory.mkdir(parents=True, exist_ok=True)
        state._tidy()
        return state

    def __enter__(self) -> CalibrationState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not _tidy: an interrupt can have come between a layer's statistics and its place in `layers`.
        useless = self.temporary or not (self.directory / _STATS).exists()
        shutil.rmtree(self.directory if useless else self.directory / WORKING, ignore_errors=True)

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.directory / _STATS, framework="numpy") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    raise ValueError("of another model, text or set of options")
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
        """One more layer is done; `hidden` is what comes out of it. The branches are in the directory."""
        layers = [*self.layers, stats]
        if not self.temporary:
            self._save(layers, hidden)
        self.layers = layers
        self._tidy()

    def _save(self, layers: Sequence[LayerStatistics], hidden: Tensor) -> None:
        from safetensors.numpy import save

        with atomic_write(self.directory / f"hidden-{len(layers)}.npy") as file:
            np.save(file, hidden.numpy(), allow_pickle=False)
        with atomic_write(self.directory / _STATS) as file:
            file.write(save(stack_layers(layers), metadata={"fingerprint": self.fingerprint}))

    def _tidy(self) -> None:
        """Removes what is not of the layers done, as of the one before or of one that a kill ended."""
        done = len(self.layers)
        needed = {_STATS, f"hidden-{done}.npy", branches_directory(self.directory, done).name}
        for path in self.directory.iterdir():
            if done and path.name in needed:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
