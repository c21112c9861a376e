"""What a search keeps on disk after every round, so that a killed one continues with the same incumbent.

    bank/                   quantized matrices, unless a bank was given
    states/                 hidden states, while the bank is filled with compensated matrices
    search/state.json       rounds done, seconds used, incumbent, what was accepted
    search/memory-7.npz     what 7 rounds have taught (memory.py)

These lie in the output's working directory (common/workdir.py), `search/` as a part of it that depends on
more than the model and its calibration. Every round depends on its number and the incumbent only, so a round
that a kill cut short is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
class SearchState:
    """Where a search stands.

    `columns` [L, E, 3] are the incumbent's. `stalled` counts the rounds since the last step that was
    accepted. `expansion_rows` follows from the speed of the machine at the start and does not change
    afterwards.
    """

    columns: Ints
    rounds: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    accepted: int = 0
    stalled: int = 0
    expansion_rows: int = 0

    def save(self, path: Path) -> None:
        body = asdict(self) | {"columns": self.columns.tolist()}
        with atomic_write(path) as file:
            file.write(json.dumps(body).encode())

    @classmethod
    def resume(cls, path: Path, start: Ints) -> SearchState:
        """The state in `path`; a new one that starts from `start` when there is none, or it is damaged."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            columns = np.array(body.pop("columns"), dtype=np.int64)
            if columns.shape != start.shape:
                raise ValueError("of another shape")
            found = cls(columns=columns, **body)
        except FileNotFoundError:
            return cls(start.copy())
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("not continuing from %s (%s); starting anew", path, error)
            return cls(start.copy())
        log.info("continuing after %d rounds", found.rounds)
        return found


def identity(**parts: Any) -> dict[str, Any]:
    """All that a search depends on."""
    return {"version": STATE_VERSION, "tool": __version__, **parts}


def request_digest(request: dict[str, Any]) -> str:
    """SHA-256 of an identity: what a refined plan keeps of it."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
