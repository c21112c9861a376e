"""This machine: how many threads are worth starting, and memory given back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # malloc.h


def usable_cores() -> int:
    """The number of cores that this process may run on. Hyperthreads of one core count once where the system
    tells them apart.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = [Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in cores]
    if not all(path.is_file() for path in siblings):
        return len(cores)
    return len({path.read_text() for path in siblings})


def return_large_blocks() -> None:
    """Make glibc give freed blocks of a megabyte or more back to the system.

    Once a block of up to 32 MB has been freed, glibc keeps blocks of that size for itself: calibration took
    10 % more memory, growing with the layers.
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
