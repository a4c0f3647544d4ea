"""The time from the command to the first paint, and to the first training step.

    python -m benchmarks.startup [--times 5] [--json FILE]

Starts `tui-trainer gpt` in a pseudo-terminal of 120×40. First paint: the first bytes after which
the screen (drawn by pyte) shows the frame of the dashboard. First step: its time as recorded by the
run itself. `import torch` is timed in another process before each start: it takes half of the time,
and varies with the state of the disk cache.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pexpect
import pyte

sys.path.insert(0, str(Path(__file__).parent))

from processes import kill_all_of
from report import begin, environment, finish

from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import StoreError

PAINTED_CELLS = 200
"""Number of non-blank cells from which a screen counts as painted."""
FIRST_STEP_WITHIN_S = 120.0


def import_seconds(module: str) -> float:
    """Wall-clock seconds of a process that imports `module`, minus those of one that does not."""
    times = []
    for code in (f"import {module}", "pass"):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - began)
    return times[0] - times[1]


def start(command: list[str]) -> tuple[float, float]:
    """(seconds to the first paint, seconds to the first step) from the command."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as folder:
        began, wall = time.perf_counter(), time.time()
        whole = [*command, "--runs-dir", folder, "--name", "benchmark"]
        child = pexpect.spawn(whole[0], whole[1:], dimensions=(40, 120), env=environment())
        try:
            painted = first_paint(child) - began
            stepped = first_step(child, Path(folder) / "benchmark") - wall
        finally:
            kill_all_of(folder)
            child.close(force=True)
    return painted, stepped


def first_paint(child: pexpect.spawn) -> float:
    """The time of the first paint, by `time.perf_counter`."""
    screen = pyte.Screen(120, 40)
    stream = pyte.ByteStream(screen)
    while True:
        received = os.read(child.child_fd, 1 << 16)
        arrived = time.perf_counter()
        stream.feed(received)
        if sum(not cell.isspace() for line in screen.display for cell in line) >= PAINTED_CELLS:
            return arrived


def first_step(child: pexpect.spawn, run: Path) -> float:
    """The time of the first step, by `time.time`, as recorded by the run itself."""
    end = time.monotonic() + FIRST_STEP_WITHIN_S
    while time.monotonic() < end:
        readable, _, _ = select.select([child.child_fd], [], [], 0.1)
        if readable:
            os.read(child.child_fd, 1 << 16)
        with contextlib.suppress(OSError, sqlite3.Error, StoreError):
            history = StoredHistory(run)
            first = history.step_times.first_step
            history.close()
            if first is not None:
                return first[1]
    raise TimeoutError(f"no step within {FIRST_STEP_WITHIN_S:.0f} s")


def main() -> None:
    """Print the table; write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin()
    command = [sys.executable, "-m", "tui_trainer"]
    cases = {
        "gpt": [*command, "gpt"],
        "gpt, in the app": [*command, "gpt", "--in-app"],
        "vit": [*command, "vit"],
    }
    torch: list[float] = []
    painted: dict[str, list[float]] = {name: [] for name in cases}
    beyond: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.times):
        for name, case in cases.items():
            torch.append(import_seconds("torch"))
            paint, step = start(case)
            painted[name].append(paint)
            beyond[name].append(step - torch[-1])
    figures = {"import torch": spread(torch)}
    figures |= {f"{name}: first paint": spread(times) for name, times in painted.items()}
    figures |= {f"{name}: first step beyond torch": spread(t) for name, t in beyond.items()}
    print(f"{'seconds':40}{'median':>8}{'least':>8}{'most':>8}")
    for name, one in figures.items():
        print(f"{name:40}{one['median']:8.2f}{one['least']:8.2f}{one['most']:8.2f}")
    finish(options.json, {"seconds": figures})


def spread(times: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


if __name__ == "__main__":
    main()
