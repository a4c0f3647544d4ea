"""What every benchmark says beside its figures."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

BUSY = 0.5
"""Load, other than ours, from which figures are marked."""


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


_at_start = os.getloadavg()[0]


def loaded() -> str:
    """Whether others were using the machine when this process began."""
    if _at_start > BUSY:
        return f"UNDER LOAD: {_at_start:.1f} processes were running before; take these again"
    return f"quiet machine: load {_at_start:.2f} before"


def write_json(path: Path | None, figures: Any) -> None:
    """Write the figures where the user wants them, if anywhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
