"""This machine: how many threads are worth starting, how they wait, and what memory there is.

`root`, where a function has it, is where /proc and /sys are.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mc_gguf.common.cgroup import ROOT, cpu_quota, memory_limit

log = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # malloc.h
# Rounds of GCC's OpenMP before a waiting thread sleeps. Its default of 300,000 makes generation on all cores
# up to a hundred times slower where another program has one; 0 halves the speed on a quiet machine.
_WAIT = ("GOMP_SPINCOUNT", "300")
_DECIDED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # variables by which users decide
_SAMPLE_SECONDS = 0.2


def usable_cores(root: Path = ROOT) -> int:
    """The number of cores that this process may keep busy: those of its affinity, and no more than the quota
    of its container, rounded down, for beyond it all threads are stopped for a part of every tenth of a
    second. Hyperthreads of one core count once where the system tells them apart.
    """
    quota = cpu_quota(root)
    count = len(_cores(root))
    return count if quota is None else max(1, min(count, int(quota)))


def threads_for_now(wanted: int | None = None, root: Path = ROOT) -> int:
    """`wanted` threads, or without a wish one for each usable core that other programs leave free. A warning
    says where cores are busy: threads that work on one thing are all as slow as the slowest.
    """
    n_core, usable = len(_cores(root)), usable_cores(root)
    busy = min(n_core, round(busy_cores(_SAMPLE_SECONDS, root)))
    free = max(1, min(usable, n_core - busy))
    if wanted is None and free < usable:
        log.warning(
            "other programs keep %d of %d cores busy: running with %d of %d threads (--threads %d for all)",
            busy,
            n_core,
            free,
            usable,
            usable,
        )
    elif wanted is not None and wanted > free:
        reason = f"{busy} of {n_core} cores are busy" if busy else f"this process may use {usable} cores"
        log.warning("%s; --threads %d is faster than %d", reason, free, wanted)
    return wanted or free


def busy_cores(seconds: float = _SAMPLE_SECONDS, root: Path = ROOT) -> float:
    """How many of the cores that this process may run on others keep busy, measured over `seconds`, in which
    this thread sleeps. 0 where the system does not tell.
    """
    cores = _cores(root)
    before, start = _idle_seconds(root), time.monotonic()
    time.sleep(seconds)
    after, passed = _idle_seconds(root), time.monotonic() - start
    return sum(max(_busy_share(before, after, cpu, passed) for cpu in core) for core in cores)


@contextmanager
def brief_waits() -> Iterator[None]:
    """OpenMP libraries that are loaded in the block wait as after wait_briefly(). The environment then is as
    it was.
    """
    before = dict(os.environ)
    wait_briefly()
    try:
        yield
    finally:
        if _WAIT[0] not in before:
            os.environ.pop(_WAIT[0], None)


def wait_briefly() -> None:
    """Waiting threads of GCC's OpenMP soon sleep, in the libraries that this process loads from now on and in
    the processes that it starts, unless the user has decided how threads wait by an environment variable.
    """
    if not any(name in os.environ for name in _DECIDED):
        os.environ[_WAIT[0]] = _WAIT[1]


def return_large_blocks() -> None:
    """Make glibc give freed blocks of a megabyte or more back to the system.

    Once a block of up to 32 MB has been freed, glibc keeps blocks of that size for itself: calibration took
    10 % more memory, growing with the layers.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process may use: the machine's, or its container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit(root)
    return total if limit is None else min(total, limit)


def _cores(root: Path) -> list[frozenset[int]]:
    """The cores that this process may run on, each as the set of its processors (hyperthreads)."""
    processors = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    )
    names = {}
    for cpu in processors:
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        if not path.is_file():
            return [frozenset([cpu]) for cpu in sorted(processors)]
        names[cpu] = path.read_text()
    groups = (frozenset(cpu for cpu in names if names[cpu] == name) for name in dict.fromkeys(names.values()))
    return list(groups)


def _idle_seconds(root: Path) -> dict[int, float]:
    """How long each processor has been idle since the system started, waits for disks included."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:  # not Linux
        return {}
    ticks = os.sysconf("SC_CLK_TCK")
    rows = (line.split() for line in lines if line.startswith("cpu") and line[3].isdecimal())
    return {int(row[0][3:]): (int(row[4]) + int(row[5])) / ticks for row in rows}


def _busy_share(before: dict[int, float], after: dict[int, float], cpu: int, seconds: float) -> float:
    if cpu not in before or cpu not in after:
        return 0.0
    return min(1.0, max(0.0, 1 - (after[cpu] - before[cpu]) / seconds))
