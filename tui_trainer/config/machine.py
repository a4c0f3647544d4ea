"""The CPU cores that this process may use, and how many of them other processes are using."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MIN_PERIOD_S = 0.1
"""A shorter period gives no usable result: the kernel counts in hundredths of a second."""
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_STAT = Path("/proc/stat")


def usable_cores() -> int:
    """Cores in this process's affinity mask, limited by a container's CPU quota (`docker run
    --cpus`, a Kubernetes limit, systemd's CPUQuota)."""
    return max(1, int(min(allowed_cores(), cpu_quota())))


def allowed_cores() -> int:
    """Cores in this process's affinity mask, regardless of its quota."""
    return len(_affinity()) or os.cpu_count() or 1


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def cpu_quota(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """The CPU quota of this process's control groups and their parents, in cores; inf: no limit.

    Version 2 is documented in the kernel's admin-guide/cgroup-v2 (`cpu.max`), version 1 in its
    scheduler/sched-bwc (`cpu.cfs_quota_us`).
    """
    quota = float("inf")
    for directory in _cpu_cgroups(cgroups, own):
        try:
            if (limit := directory / "cpu.max").exists():
                granted, period = limit.read_text().split()
            else:
                granted = (directory / "cpu.cfs_quota_us").read_text().strip()
                period = (directory / "cpu.cfs_period_us").read_text()
            if granted not in ("max", "-1"):
                quota = min(quota, int(granted) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return quota


def _cpu_cgroups(cgroups: Path, own: Path) -> Iterator[Path]:
    """Directories of this process's control groups that may limit CPU time, and their parents."""
    try:
        lines = own.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        path = PurePosixPath(group.lstrip("/"))
        if not controllers:
            yield from (cgroups / part for part in (path, *path.parents))
        elif "cpu" in controllers.split(","):
            for name in {controllers, "cpu"}:  # the mount may list them in another order
                yield from (cgroups / name / part for part in (path, *path.parents))


class OtherLoad:
    """Mean number of this process's allowed cores that other processes have been using since the
    instance was created.

    CPU time of this process, of its parent and of its finished children does not count. Works on
    Linux; elsewhere the load is 0.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._start = self._sample()

    def cores(self, min_period_s: float = MIN_PERIOD_S) -> float:
        """The load. Waits until `min_period_s` seconds have passed since the instance was
        created."""
        if not self._start[1]:
            return 0.0
        started, busy_before, own_before = self._start
        time.sleep(max(0.0, started + min_period_s - time.monotonic()))
        now, busy, own = self._sample()
        if os.getppid() != self._parent:  # the parent ended, and its CPU time is no longer known
            return 0.0
        return max(0.0, (busy - busy_before - (own - own_before)) / (now - started))

    def _sample(self) -> tuple[float, float, float]:
        """Time, CPU seconds of all processes, and CPU seconds of our own processes."""
        return time.monotonic(), _busy_s(_affinity()), _own_s()


def _busy_s(cores: set[int], stat: Path = _STAT) -> float:
    """CPU seconds that these cores were busy since boot, including time stolen by a hypervisor."""
    total = 0.0
    try:
        for line in stat.read_text().splitlines():
            name, *ticks = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, _idle, _iowait, *rest = map(int, ticks)
                total += user + nice + system + sum(rest[:3])  # guests are in user and nice
    except (OSError, ValueError):
        return 0.0
    return total / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    used = sum(os.times()[:4])
    try:
        fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
        used += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        pass
    return used
