"""What calibrate keeps on disk after every layer, so that a killed run can continue.

    .calib.safetensors.partial/stats.safetensors   statistics of the layers done; header: identity of the run
    .calib.safetensors.partial/hidden-7.npy        hidden states [n_rows, ctx, n_embd] after 7 layers
    .calib.safetensors.partial/branches-7.npy      those of sensitivity.Branches

The hidden states are written first, the statistics second, all to a temporary name and renamed; then the
hidden states of the layer before are deleted. So whatever is killed when, statistics of n layers find the
states after n.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc_gguf import __version__
from mc_gguf.artifacts import PROJECTIONS, Floats, ModelInfo, atomic_write

N_QUANTILES = 1001  # odd: the median is one of them
STATE_VERSION = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LayerStats:
    """One layer's share of a Calibration, float64; the names and last dimensions are those of Calibration."""

    frequency: Floats
    routing_weight: Floats
    sq_error: Floats
    output_sq: Floats
    imatrix_in: Floats
    imatrix_mid: Floats
    ratio_quantiles: Floats
    routing_curve: Floats

    @classmethod
    def empty(cls, info: ModelInfo, n_types: int) -> LayerStats:
        e = info.n_expert
        return cls(
            frequency=np.zeros(e), routing_weight=np.zeros(e), sq_error=np.zeros((e, len(PROJECTIONS),
            n_types)), output_sq=np.zeros(e), imatrix_in=np.zeros((e, info.n_embd)), imatrix_mid=np.zeros((e,
            info.n_ff)), ratio_quantiles=np.zeros((info.n_expert_used - 1, N_QUANTILES)),
            routing_curve=np.zeros(N_QUANTILES),
        )  # fmt: skip


_HIDDEN = ("hidden", "branches")
_NAMES = tuple(f.name for f in fields(LayerStats))


class State:
    """Statistics of the layers done and, after a resume, the hidden states and branches that the next one
    needs.
    """

    def __init__(self, directory: Path | None, fingerprint: str) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self.layers: list[LayerStats] = []
        self.hidden: Tensor | None = None
        self.branches: Tensor | None = None

    @classmethod
    def resume(cls, directory: Path | None, identity: Mapping[str, object]) -> State:
        """The state in `directory` if it is of the run that `identity` describes, else an empty one."""
        document = json.dumps({"state": STATE_VERSION, "tool": __version__, **identity}, sort_keys=True)
        state = cls(directory, hashlib.sha256(document.encode()).hexdigest())
        if directory is not None and directory.exists():
            state._load(directory)
        return state

    def _load(self, directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(directory / "stats.safetensors", framework="numpy") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    raise ValueError("of another model, text or set of options")
                arrays = {name: file.get_tensor(name) for name in _NAMES}
            done = len(arrays["frequency"])
            self.hidden, self.branches = (_load(directory / f"{name}-{done}.npy") for name in _HIDDEN)
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("not continuing from %s (%s); starting anew", directory, error)
            shutil.rmtree(directory, ignore_errors=True)
            return
        self.layers = [LayerStats(**{name: arrays[name][i] for name in _NAMES}) for i in range(done)]
        log.info("continuing after %d layers", done)

    def add(self, stats: LayerStats, hidden: Tensor, branches: Tensor) -> None:
        """One more layer is done; `hidden` and `branches` are what comes out of it."""
        from safetensors.numpy import save

        self.layers.append(stats)
        if self.directory is None:
            return
        done = len(self.layers)
        for name, tensor in zip(_HIDDEN, (hidden, branches), strict=True):
            with atomic_write(self.directory / f"{name}-{done}.npy") as file:
                np.save(file, tensor.numpy(), allow_pickle=False)
        arrays = {name: np.stack([getattr(layer, name) for layer in self.layers]) for name in _NAMES}
        with atomic_write(self.directory / "stats.safetensors") as file:
            file.write(save(arrays, metadata={"fingerprint": self.fingerprint}))
        for name in _HIDDEN:
            (self.directory / f"{name}-{done - 1}.npy").unlink(missing_ok=True)


def _load(path: Path) -> Tensor:
    # Copied into torch's own memory: the alignment of a buffer can change the last bit of a matrix product.
    return torch.from_numpy(np.load(path, allow_pickle=False)).clone()
