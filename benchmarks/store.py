"""The cost of the run store: bytes, and the time to write it, to open it and to draw any zoom.

python benchmarks/store.py [--steps 1000000] [--series 200] [--minutes 15] [--directory DIR]
                           [--json FILE]

The longest supported run, 10 million steps of 200 series, takes 9 GB and seven minutes:
python benchmarks/store.py --steps 10000000. Where --minutes or half of the free disk is used up
earlier, the steps written by then are measured, and the size of all steps is extrapolated.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish

from tui_trainer.protocol.schema import Column, Table
from tui_trainer.store import codec
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import STORE_FILE, open_for_writing
from tui_trainer.store.series import SeriesWriter


def norms(steps: int, series: int) -> np.ndarray:
    """Series that look like gradient norms: slow drift, noise of some per cent, spikes."""
    random = np.random.default_rng(0)
    drift = np.cumsum(random.standard_normal((steps, series)) * 0.003, axis=0)
    values = np.exp(drift + random.standard_normal((steps, series)) * 0.1 - 2)
    values[random.random((steps, series)) < 1e-4] *= 100
    return values.astype(np.float32)


def write(directory: Path, steps: int, series: int, minutes: float) -> tuple[int, float]:
    """Write up to `steps` steps within `minutes` and half of the free disk; returns (steps written,
    seconds)."""
    room = shutil.disk_usage(directory).free / 2
    values = norms(20_000, series)
    table = Table(0, "grad_norm", tuple(Column(f"c{i}") for i in range(series)))
    begin = time.perf_counter()
    connection = open_for_writing(directory)
    writer = SeriesWriter(table)
    written = 0
    for start in range(0, steps, 2_000):
        size = (directory / STORE_FILE).stat().st_size
        if time.perf_counter() - begin > 60 * minutes or size > room:
            break
        for step in range(start, min(steps, start + 2_000)):
            writer.add(2 * step, step, values[step % 20_000])
        connection.execute("BEGIN IMMEDIATE")
        writer.write(connection, 0)
        connection.execute("COMMIT")
        writer.written()
        written = min(steps, start + 2_000)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return written, time.perf_counter() - begin


def draw(directory: Path, steps: int) -> dict[str, float]:
    """Milliseconds to open the store, and to draw windows of 400 buckets of one series, the first
    time with nothing unpacked before."""
    figures, opened = {}, []
    for _ in range(5):
        begin = time.perf_counter()
        history = StoredHistory(directory)
        opened.append(time.perf_counter() - begin)
        history.close()
    figures["open, ms"] = statistics.median(opened) * 1e3
    zooms = {"whole run": (0, steps), "a third": (steps // 3, steps * 2 // 3)}
    zooms |= {"100,000 steps": (steps // 2, steps // 2 + 100_000)}
    zooms |= {"1,000 steps": (steps // 2, steps // 2 + 1_000), "last 100": (steps - 100, steps)}
    for name, (start, stop) in zooms.items():
        cold, warm = [], []
        for repeat in range(7):
            history = StoredHistory(directory)
            table = history.tables[0]
            for times in (cold, warm):
                begin = time.perf_counter()
                table.window([repeat % table.columns], start, stop, 400)
                times.append(time.perf_counter() - begin)
            history.close()
        figures[f"draw {name}, first time, ms"] = statistics.median(cold) * 1e3
        figures[f"draw {name}, again, ms"] = statistics.median(warm) * 1e3
    return figures


def packings() -> dict[str, float]:
    """Bytes per value of a chunk of rows, by kind of packing."""
    chunk = np.ascontiguousarray(norms(20_000, codec.GROUP)[: codec.CHUNK].T)
    return {
        "rows as they are, bytes a value": chunk.nbytes / chunk.size,
        "rows, zlib 1, bytes a value": len(zlib.compress(chunk.tobytes(), 1)) / chunk.size,
        "rows, byte planes + zlib 1, bytes a value": len(codec.pack(chunk)) / chunk.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--directory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin()
    figures = packings()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        steps, seconds = write(Path(name), options.steps, options.series, options.minutes)
        size = (Path(name) / STORE_FILE).stat().st_size
        values = steps * options.series
        figures["million steps written"] = steps / 1e6
        figures["all levels, bytes a value"] = size / values
        figures["file, MB"] = size / 1e6
        if steps < options.steps:
            whole = size / steps * options.steps / 1e6
            figures["file of all steps, extrapolated, MB"] = whole
        figures["written, million values a second"] = values / seconds / 1e6
        figures |= draw(Path(name), steps)
    for label, value in figures.items():
        print(f"{label:50} {value:10.3f}")
    finish(options.json, {"figures": figures})


if __name__ == "__main__":
    main()
