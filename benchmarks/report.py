"""What every benchmark says beside its figures: on what machine, and who else was using it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil

BUSY = 0.15
"""Cores used by others from which figures are marked."""
LOOK_S = 2.0
TERMINAL = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
"""What the terminals of the benchmarks say of themselves."""
_PR_SET_CHILD_SUBREAPER = 36


def environment() -> dict[str, str]:
    """For a command on a terminal: ours, whatever the terminal that we are on."""
    without = ("COLUMNS", "LINES", "NO_COLOR")
    return {name: value for name, value in os.environ.items() if name not in without} | TERMINAL


def machine() -> str:
    """Processor, cores and versions in a line."""
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_processor()}, {cores} cores; Python {platform.python_version()}, "
        f"torch {version('torch')}, textual {version('textual')}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


class Others:
    """The cores that others use: all CPU time of the machine less that of our own processes.

    `over_all` holds where orphans become our children (Linux): run processes outlive the app that
    has started them, and once they are gone nobody else could say what they used.
    """

    def __init__(self) -> None:
        self.over_all = _adopt_orphans()
        begun = self._now()
        time.sleep(LOOK_S)
        self.before = self._since(begun)
        """In the seconds before anything was measured."""
        self._begun = self._now()

    def _now(self) -> tuple[float, float, float]:
        return time.monotonic(), _all_busy_s(), _own_s()

    def _since(self, begun: tuple[float, float, float]) -> float:
        seconds, busy, own = (b - a for a, b in zip(begun, self._now(), strict=True))
        return max(0.0, (busy - own) / seconds)

    def during(self) -> float:
        """In the mean since the benchmark began."""
        return self._since(self._begun) if self.over_all else self.before


def _all_busy_s() -> float:
    """CPU seconds of the whole machine; what a hypervisor took away counts as used by others."""
    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user, nice
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - guests)


def _own_s() -> float:
    """CPU seconds of this process, those it has started and those they have started."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
    used = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        used += usage.ru_utime + usage.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            used += sum(child.cpu_times()[:4])
    return used


def _adopt_orphans() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    return False


_others: Others | None = None


def begin(*more: str) -> None:
    """Print on what machine this is, and look for 2 s whether others use it."""
    global _others
    print(machine(), *more, sep="\n")
    _others = Others()
    print(f"before: {_said(_others.before)}", flush=True)


def finish(path: Path | None, figures: dict[str, Any]) -> None:
    """Print how loaded the machine was meanwhile; write the figures where the user wants them."""
    assert _others is not None
    during = _others.during()
    print(f"{'meanwhile' if _others.over_all else 'before'}: {_said(during)}", flush=True)
    load = {
        "load": _said(during),
        "others_cores_before": round(_others.before, 3),
        "others_cores": round(during, 3),
    }
    write_json(path, {"machine": machine(), **load, **figures})


def _said(cores: float) -> str:
    if cores > BUSY:
        return f"UNDER LOAD: others used {cores:.2f} cores; take these again"
    return f"quiet: others used {cores:.2f} cores"


def write_json(path: Path | None, figures: Any) -> None:
    """Write to a file whose folder need not be there yet; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
