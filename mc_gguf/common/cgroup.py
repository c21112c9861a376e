"""The limits that the control groups of this process set: cores' worth of time, and memory.

Containers, systemd and batch systems set them, in groups that lie in groups; each limit along the way holds.
Both versions of Linux's control groups are read, also side by side. A container may see its own group as the
root of the mount while /proc names the path that the host gave it: what does not exist is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
UNLIMITED_BYTES = 1 << 60  # version 1 writes a number near 2^63 for "no limit"


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that this process may use, or None without a limit. `root`: where /proc and /sys
    are.
    """
    quotas = []
    for folder in _groups(root, "cpu"):
        words = _words(folder / "cpu.max")  # version 1 has a file for each
        words = words or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))  # not "max", nor -1
    return min(quotas, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory that this process may use, or None without a limit."""
    limits = []
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [int(word) for word in _words(folder / name) if word.isdecimal()]
    return min((limit for limit in limits if limit < UNLIMITED_BYTES), default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups that this process is in, from the mount's root on, and only existing ones."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            mounts = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            mounts = [mount / controllers, mount / controller]
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for place in mounts:
            folders = [place / parent for parent in (inside, *inside.parents)]
            yield from dict.fromkeys(folder for folder in folders if folder.is_dir())


def _words(path: Path) -> list[str]:
    """The words in a file; none where there is no such file."""
    try:
        return path.read_text().split()
    except OSError:
        return []
