"""What of this machine to use: threads worth starting, memory given back."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # malloc.h


def usable_cores() -> int:
    """Cores that this process may run on, hyperthreads counted once where the system tells them apart."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = [Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in cores]
    if not all(path.is_file() for path in siblings):
        return len(cores)
    return len({path.read_text() for path in siblings})


def return_large_blocks() -> None:
    """Make glibc give freed blocks of a megabyte and more back to the system.

    It keeps blocks of up to 32 MB for itself once such a size has been freed: 10 % more memory, growing with
    the layers.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total
