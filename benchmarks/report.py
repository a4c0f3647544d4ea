"""The header and footer of every benchmark: the machine, and its load from other processes."""

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
"""Figures are marked when other processes use more cores than this."""
IDLE_S = 2.0
TERMINAL = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
"""How the benchmarks' terminals identify themselves."""
_PR_SET_CHILD_SUBREAPER = 36


def environment() -> dict[str, str]:
    """The environment of a command in a benchmark's terminal, independent of the caller's."""
    without = ("COLUMNS", "LINES", "NO_COLOR")
    return {name: value for name, value in os.environ.items() if name not in without} | TERMINAL


def machine() -> str:
    """Processor, cores and versions in one line."""
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
    """Measures the cores that other processes use: the machine's CPU time minus that of this
    process and its descendants.

    `over_all` is true where orphans become children of this process (Linux): run processes outlive
    the app that started them, and their CPU time would otherwise be lost.
    """

    def __init__(self) -> None:
        self.over_all = _adopt_orphans()
        begun = self._now()
        time.sleep(IDLE_S)
        self.before = self._since(begun)
        """Cores used by others in the seconds before the benchmark."""
        self._begun = self._now()

    def _now(self) -> tuple[float, float, float]:
        return time.monotonic(), _all_busy_s(), _own_s()

    def _since(self, begun: tuple[float, float, float]) -> float:
        seconds, busy, own = (b - a for a, b in zip(begun, self._now(), strict=True))
        return max(0.0, (busy - own) / seconds)

    def during(self) -> float:
        """Cores used by others since the benchmark began, on average."""
        return self._since(self._begun) if self.over_all else self.before


def _all_busy_s() -> float:
    """CPU seconds of the whole machine; time stolen by a hypervisor counts as used by others."""
    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user, nice
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - guests)


def _own_s() -> float:
    """CPU seconds of this process and all of its descendants."""
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
    """Print the machine, and measure for 2 s whether other processes use it."""
    global _others
    print(machine(), *more, sep="\n")
    _others = Others()
    print(f"before: {_load_text(_others.before)}", flush=True)


def finish(path: Path | None, figures: dict[str, Any]) -> None:
    """Print the load during the benchmark; write the figures to `path`."""
    assert _others is not None
    during = _others.during()
    print(f"{'during' if _others.over_all else 'before'}: {_load_text(during)}", flush=True)
    load = {
        "load": _load_text(during),
        "others_cores_before": round(_others.before, 3),
        "others_cores": round(during, 3),
    }
    write_json(path, {"machine": machine(), **load, **figures})


def _load_text(cores: float) -> str:
    if cores > BUSY:
        return f"UNDER LOAD: others used {cores:.2f} cores; repeat the benchmark"
    return f"quiet: others used {cores:.2f} cores"


def write_json(path: Path | None, figures: Any) -> None:
    """Write JSON, creating the folder; do nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
