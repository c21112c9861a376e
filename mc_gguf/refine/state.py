"""What a search keeps on disk after every round, so that a killed one continues with the same incumbent.

    .refined.plan.json.partial/state.json   identity, rounds done, seconds used, incumbent, what was accepted
    .refined.plan.json.partial/memory-7.npz what 7 rounds have taught (memory.py)
    .refined.plan.json.partial/bank/        quantized matrices, unless a bank was given

Every round depends on its number and the incumbent only, so a round that a kill cut short is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mc_gguf import __version__
from mc_gguf.common.files import atomic_write
from mc_gguf.plan.problem import Ints

STATE_VERSION = 2

log = logging.getLogger(__name__)


@dataclass
class State:
    """Where a search stands. `stalled` counts the rounds since the last step that was accepted;
    `expansion_rows` came from the speed of the machine and stays what it was."""

    identity: str
    compensated: bool
    columns: Ints
    rounds: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    accepted: int = 0
    stalled: int = 0
    expansion_rows: int = 0

    def save(self, path: Path) -> None:
        body = asdict(self) | {"columns": self.columns.tolist(), "version": STATE_VERSION}
        with atomic_write(path) as file:
            file.write(json.dumps(body).encode())

    @classmethod
    def resume(cls, path: Path, key: str, compensated: bool, start: Ints) -> State:
        """The state in `path` if it is of this search (its identity, and the blocks that it measures), else a
        new one that starts from `start`.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            asked = (STATE_VERSION, key, compensated)
            if (body.pop("version"), body["identity"], body["compensated"]) != asked:
                raise ValueError("of another model, plan, text or set of options")
            columns = np.array(body.pop("columns"), dtype=np.int64)
            if columns.shape != start.shape:
                raise ValueError("of another shape")
            found = cls(columns=columns, **body)
        except FileNotFoundError:
            return cls(key, compensated, start.copy())
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("not continuing from %s (%s); starting anew", path, error)
            return cls(key, compensated, start.copy())
        log.info("continuing after %d rounds", found.rounds)
        return found


def identity(**parts: Any) -> str:
    """SHA-256 of what a search depends on."""
    document = json.dumps({"version": STATE_VERSION, "tool": __version__, **parts}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def partial_directory(output: Path) -> Path:
    """Where a refinement that goes to `output` keeps its state until it is complete."""
    return output.parent / f".{output.name}.partial"


def forget_partial(output: Path) -> None:
    shutil.rmtree(partial_directory(output), ignore_errors=True)
