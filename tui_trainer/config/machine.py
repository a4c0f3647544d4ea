"""How much of the machine this process may use, and how much of that others are using."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LEAST_S = 0.1
"""A shorter look says little: the kernel counts in hundredths of a second."""
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_STAT = Path("/proc/stat")


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and of these no more than a
    container's quota pays for (`docker run --cpus`, Kubernetes' limits, systemd's CPUQuota)."""
    return max(1, int(min(allowed_cores(), cpu_quota())))


def allowed_cores() -> int:
    """Cores that this process is bound to, whatever its quota pays for."""
    return len(_allowed()) or os.cpu_count() or 1


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def cpu_quota(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """Cores' worth of CPU time that the control groups of this process grant; inf: no limit.

    Version 2 is described in the kernel's admin-guide/cgroup-v2, `cpu.max`; version 1 in its
    scheduler/sched-bwc, `cpu.cfs_quota_us`. A limit of any group above counts, too.
    """
    least = float("inf")
    for directory in _groups(cgroups, own):
        try:
            if (there := directory / "cpu.max").exists():
                granted, period = there.read_text().split()
            else:
                granted = (directory / "cpu.cfs_quota_us").read_text().strip()
                period = (directory / "cpu.cfs_period_us").read_text()
            if granted not in ("max", "-1"):
                least = min(least, int(granted) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return least


def _groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """Those of this process that may limit its CPU time, with all above."""
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
            for name in {controllers, "cpu"}:  # the mount may have them in another order
                yield from (cgroups / name / part for part in (path, *path.parents))


class OtherLoad:
    """The cores, of those that this process may use, that other processes use: in the mean from the
    moment this is made. What this process, the one that started it, and those it has waited for use
    does not count. Linux alone; elsewhere nobody else is seen."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._begun = self._now()

    def cores(self, least_s: float = LEAST_S) -> float:
        """Waits until there have been `least_s` seconds to look at; 0 where nothing can be seen."""
        if not self._begun[1]:
            return 0.0
        began, busy_before, own_before = self._begun
        time.sleep(max(0.0, began + least_s - time.monotonic()))
        now, busy, own = self._now()
        if os.getppid() != self._parent:  # gone, and with it what it has used
            return 0.0
        return max(0.0, (busy - busy_before - (own - own_before)) / (now - began))

    def _now(self) -> tuple[float, float, float]:
        """The time, and the CPU seconds of all and of ours."""
        return time.monotonic(), _busy_s(_allowed()), _own_s()


def _busy_s(allowed: set[int], stat: Path = _STAT) -> float:
    """CPU seconds since the machine started in which these cores were not idle. What a hypervisor
    took away counts: it is others that have it."""
    total = 0.0
    try:
        for line in stat.read_text().splitlines():
            name, *ticks = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in allowed:
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
