"""The cost of a long run's history: memory, appending a row, drawing a window.

python benchmarks/history.py [--steps 10000000] [--series 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish

from tui_trainer.history import MemorySeries
from tui_trainer.protocol.schema import Column, Table


def table(columns: int) -> Table:
    return Table(0, "grad_norm", tuple(Column(f"c{i}") for i in range(columns)))


def resident() -> int:
    return psutil.Process().memory_info().rss


def milliseconds(action: Callable[[], object], repeats: int = 30) -> float:
    """Median wall-clock time of `action` in milliseconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def append_microseconds(columns: int, rows: int = 20_000) -> float:
    history = MemorySeries(table(columns))
    values = np.random.default_rng(0).standard_normal((64, columns)).astype(np.float32)
    begin = time.perf_counter()
    for step in range(rows):
        history.append(step, values[step & 63])
    return (time.perf_counter() - begin) / rows * 1e6


def filled(columns: int, steps: int) -> MemorySeries:
    history = MemorySeries(table(columns))
    values = np.random.default_rng(0).standard_normal((4096, columns)).astype(np.float32)
    for start in range(0, steps, 4096):
        count = min(4096, steps - start)
        history.extend(np.arange(start, start + count), values[:count])
    return history


def measure(steps: int, series: int) -> dict[str, float]:
    """Every figure, by name."""
    figures = {f"append, {series} columns, µs a row": append_microseconds(series)}
    figures["append, 10,000 columns, µs a row"] = append_microseconds(10_000, 2_000)
    before = resident()
    history = filled(series, steps)
    label = f"{steps:,} steps × {series} series"
    figures[f"memory, {label}, MB"] = (resident() - before) / 1e6
    figures |= windows(history, steps, series)
    figures |= sparklines(filled(10_000, 20_000))
    return figures


def windows(history: MemorySeries, steps: int, series: int) -> dict[str, float]:
    """The time to read charts of 200 columns with two points each."""
    figures, one, every = {}, [0], range(series)
    spans = {"whole run": (0, steps), "a third": (steps // 3, steps * 2 // 3)}
    spans |= {"last 10,000": (steps - 10_000, steps), "last 100": (steps - 100, steps)}
    for name, (start, stop) in spans.items():
        for which, columns in (("1 series", one), (f"{series} series", every)):
            took = milliseconds(lambda c=columns, a=start, b=stop: history.window(c, a, b, 400))
            figures[f"window of 400, {name}, {which}, ms"] = took
    return figures


def sparklines(wide: MemorySeries) -> dict[str, float]:
    """The time to read the rows of a dashboard for a model with 10,000 parameters."""
    figures, rows, visible = {}, wide.rows, range(3_000, 3_040)
    took = milliseconds(lambda: wide.window(visible, 0, rows, 20))
    figures["20 buckets of 40 in 10,000 columns, whole run, ms"] = took
    took = milliseconds(lambda: wide.window(visible, rows - 100, rows, 20))
    figures["20 buckets of 40 in 10,000 columns, last 100, ms"] = took
    took = milliseconds(lambda: wide.window(range(10_000), 0, rows, 20))
    figures["20 buckets of all 10,000 columns, whole run, ms"] = took
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin()
    figures = measure(options.steps, options.series)
    for name, value in figures.items():
        print(f"{name:55} {value:10.3f}")
    finish(options.json, {"figures": figures})


if __name__ == "__main__":
    main()
