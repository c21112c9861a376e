"""How many threads are worth starting on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may run on, hyperthreads counted once where the system tells them apart."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = [Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in cores]
    if not all(path.is_file() for path in siblings):
        return len(cores)
    return len({path.read_text() for path in siblings})
