"""How many threads are worth starting: affinity, the quota of a container, what other programs do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mc_gguf.common.cgroup import cpu_quota, memory_limit
from mc_gguf.common.machine import busy_cores, memory_bytes, threads_for_now, usable_cores

TICKS = os.sysconf("SC_CLK_TCK")


def write(root: Path, **files: str) -> Path:
    """Files under `root`; in their names __ stands for a slash, and _dot_ for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def groups(root: Path, lines: str, **files: str) -> Path:
    """A machine whose processes are in the groups `lines`, with files under /sys/fs/cgroup."""
    write(root, proc__self__cgroup=lines)
    return write(root, **{f"sys__fs__cgroup__{name}": text for name, text in files.items()})


def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


def test_no_more_than_the_process_may_use() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_follows_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    first = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {first})
    assert usable_cores() == 1


def test_without_affinity_counts_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4096)  # more than any /sys lists
    assert usable_cores(tmp_path) == 4096


def test_hyperthreads_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    four_cores(monkeypatch)
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path, **{f"sys__devices__system__cpu__cpu{cpu}__topology__thread_siblings_list": siblings})
    assert usable_cores(tmp_path) == 2


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("100000 100000", 1),
        ("350000 100000", 3),
        ("50000 100000", 1),
        ("25000 10000", 2),
        ("max 100000", 4),
        ("900000 100000", 4),
        ("garbage", 4),
        ("100000 0", 4),
    ],
)
def test_version_2_quota(quota: str, cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    four_cores(monkeypatch)
    root = groups(tmp_path, "0::/app\n", app__cpu_dot_max=f"{quota}\n")
    assert usable_cores(root) == cores


def test_every_group_along_the_way_limits(tmp_path: Path) -> None:
    """The service is not limited, the slice above it is; so is a neighbour, which does not matter."""
    root = groups(
        tmp_path,
        "0::/user.slice/app.service\n",
        user_dot_slice__app_dot_service__cpu_dot_max="max 100000",
        user_dot_slice__cpu_dot_max="150000 100000",
        other__cpu_dot_max="1000 100000",
    )
    assert cpu_quota(root) == 1.5


def test_a_container_that_sees_its_own_group_as_root(tmp_path: Path) -> None:
    root = groups(tmp_path, "0::/docker/0123abcd\n", cpu_dot_max="200000 100000")
    assert cpu_quota(root) == 2


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize(("quota", "expected"), [("250000", 2.5), ("-1", None)])
def test_version_1_quota(mount: str, quota: str, expected: float | None, tmp_path: Path) -> None:
    root = groups(
        tmp_path,
        "5:cpu,cpuacct:/app\n4:memory:/app\n0::/elsewhere\n",
        **{f"{mount}__app__cpu_dot_cfs_quota_us": quota, f"{mount}__app__cpu_dot_cfs_period_us": "100000"},
    )
    assert cpu_quota(root) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_limit(tmp_path) is None
    assert groups(tmp_path, "0::/\n") == tmp_path
    assert cpu_quota(tmp_path) is None


def test_memory_limits_of_both_versions(tmp_path: Path) -> None:
    two = groups(
        tmp_path / "2", "0::/a/b\n", a__memory_dot_max=f"{3 << 30}", a__b__memory_dot_max="max", x="y"
    )
    one = groups(
        tmp_path / "1", "4:memory:/a\n0::/\n", memory__a__memory_dot_limit_in_bytes=f"{1 << 30}", x="y"
    )
    assert memory_limit(two) == 3 << 30
    assert memory_limit(one) == 1 << 30
    assert memory_bytes(one) == min(1 << 30, memory_bytes())
    unlimited = groups(
        tmp_path / "3", "4:memory:/\n", memory__memory_dot_limit_in_bytes="9223372036854771712"
    )
    assert memory_limit(unlimited) is None
    assert memory_bytes(unlimited) == memory_bytes(tmp_path)


@contextmanager
def running(root: Path, idle_shares: tuple[float, ...]) -> Iterator[Path]:
    """A machine whose processors are idle for these shares of the time while the block runs."""
    stop, start = threading.Event(), time.monotonic()

    def tick() -> None:
        passed = (time.monotonic() - start) * TICKS
        rows = [f"cpu{i} 1 1 1 {round(1000 + share * passed)} 0 0 0 0" for i, share in enumerate(idle_shares)]
        (root / "proc" / "new").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9", *rows, "intr 1 2"]))
        (root / "proc" / "new").replace(root / "proc" / "stat")

    def keep_ticking() -> None:
        while not stop.wait(0.001):
            tick()

    (root / "proc").mkdir(parents=True, exist_ok=True)
    tick()
    thread = threading.Thread(target=keep_ticking)
    thread.start()
    try:
        yield root
    finally:
        stop.set()
        thread.join()


def test_as_many_threads_as_cores_are_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    four_cores(monkeypatch)
    with running(tmp_path, (1.0, 1.0, 0.9, 1.0)):
        assert threads_for_now(root=tmp_path) == 4
        assert threads_for_now(2, tmp_path) == 2
    assert caplog.text == ""
    with running(tmp_path, (0.0, 1.0, 0.0, 0.9)):
        assert threads_for_now(root=tmp_path) == 2
        assert "other programs keep 2 of 4 cores busy: running with 2 of 4 threads" in caplog.text
        assert threads_for_now(4, tmp_path) == 4
        assert "2 of 4 cores are busy; --threads 2 is faster than 4" in caplog.text
    with running(tmp_path, (0.0, 0.0, 0.0, 0.0)):
        assert threads_for_now(root=tmp_path) == 1


def test_a_quota_and_busy_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four cores two are busy; two of them are all that the container may use."""
    four_cores(monkeypatch)
    groups(tmp_path, "0::/\n", cpu_dot_max="200000 100000")
    with running(tmp_path, (0.0, 1.0, 0.0, 1.0)):
        assert threads_for_now(root=tmp_path) == 2
        assert caplog.text == ""
    with running(tmp_path, (1.0, 1.0, 1.0, 1.0)):
        assert threads_for_now(4, tmp_path) == 4
    assert "this process may use 2 cores; --threads 2 is faster than 4" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_a_program_that_spins_is_seen() -> None:
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as spinning:
        assert spinning.stdout is not None
        spinning.stdout.readline()
        try:
            assert busy_cores(0.5) > 0.8
        finally:
            spinning.kill()


WAITS = """
import os
from mc_gguf.common.machine import brief_waits, wait_briefly
print(os.environ.get("GOMP_SPINCOUNT"))
with brief_waits():
    print(os.environ.get("GOMP_SPINCOUNT"))
print(os.environ.get("GOMP_SPINCOUNT"))
wait_briefly()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "None 300 None 300"),
        ({"GOMP_SPINCOUNT": "7"}, "7 7 7 7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None None None None"),
    ],
)
def test_waiting_threads_sleep_unless_the_user_decided(given: dict[str, str], seen: str) -> None:
    rest = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", WAITS], env=rest | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == seen.split()
