"""How long OpenMP's threads should spin at a barrier: on an idle machine, and on a shared one.

    python benchmarks/spinning.py [--threads 2 3 4] [--json FILE]

Idle: `loop.py` (nanoGPT's CPU shape) under `tui-trainer run` without a viewer, compared in turns
with the bare loop (`turns.py`), for several values of GOMP_SPINCOUNT. Shared: ms per step of the
bare loop while other processes compute on the same cores, always or part of the time; `over` where
60 steps and the start took longer than 25 s. Last, two such loops started together; the slower one
makes its last steps alone. Takes about twelve minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish
from started import RUN, Way
from turns import SETTLE_S, TURN_S, WARM_S, compare, trainees

COUNTS = ("", "100000", "30000", "10000")
"""Values of GOMP_SPINCOUNT; "": not set, which means 300,000."""
STEPS, GIVE_UP_S = 60, 25.0
SOMETIMES = """
import time
while True:
    end = time.perf_counter() + {busy}
    while time.perf_counter() < end: pass
    time.sleep({rest})
"""
LOADS = {
    "no other": [],
    "9 ms in 250": [SOMETIMES.format(busy=0.009, rest=0.241)],
    "30 ms in 100": [SOMETIMES.format(busy=0.03, rest=0.07)],
    "one process": ["while True: pass"],
    "two processes": ["while True: pass"] * 2,
}
LOOP = Path(__file__).parent / "loop.py"


@contextlib.contextmanager
def running(codes: Sequence[str]) -> Iterator[None]:
    """Run other processes on the same cores."""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start(count: str, threads: int) -> subprocess.Popen[str]:
    """Start the bare loop."""
    command = [sys.executable, str(LOOP), "--steps", str(STEPS), "--threads", str(threads)]
    environment = {**os.environ, **({"GOMP_SPINCOUNT": count} if count else {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def step_ms(process: subprocess.Popen[str]) -> float | None:
    """The time per step that the loop prints at its end; None when it took too long."""
    try:
        printed, _ = process.communicate(timeout=GIVE_UP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
    found = re.search(r"([\d.]+) ms", printed)
    return float(found[1]) if found else None


def line(name: str, threads: int, cells: Sequence[float | None], form: str = "10.1f") -> None:
    """Print one row."""
    text = "".join(f"{cell:{form}}" if cell is not None else f"{'over':>10}" for cell in cells)
    print(f"{name:16}{threads:3}{text}", flush=True)


def idle_machine(threads: Sequence[int]) -> list[dict[str, Any]]:
    """Ratio of a watched loop to the bare one, by spin count."""
    ways = [Way(f"spin {count}", home=RUN, env={"GOMP_SPINCOUNT": count or "300000"})
            for count in COUNTS]  # fmt: skip
    rows = []
    with trainees([Way("bare"), *ways], ("--threads", str(max(threads)))) as (bare, *others):
        for number in threads:
            found = compare(bare, others, 3, TURN_S, WARM_S, number, settle=SETTLE_S)
            ratios = [found[way.name].figures()["ratio"] for way in ways]
            rows.append({"threads": number, **dict(zip(COUNTS, ratios, strict=True))})
            line("ratio, watched", number, ratios, "10.2f")
    return rows


def shared_machine(threads: Sequence[int]) -> list[dict[str, Any]]:
    """Milliseconds a step of the bare loop, by load and spin count."""
    rows = []
    for name, codes in LOADS.items():
        with running(codes):
            for number in threads:
                took = [step_ms(start(count, number)) for count in COUNTS]
                rows.append({"load": name, "threads": number, **dict(zip(COUNTS, took))})  # noqa: B905
                line(name, number, took)
    return rows


def two_at_once(threads: Sequence[int]) -> list[dict[str, Any]]:
    """Milliseconds a step of two loops at once, by the spin counts of both."""
    rows = []
    for number in threads:
        for first, second in (("", ""), ("", "10000"), ("10000", "10000")):
            both = [start(first, number), start(second, number)]
            took = [step_ms(process) for process in both]
            rows.append({"threads": number, "counts": [first, second], "ms": took})
            line(f"{first or 'unset'}, {second or 'unset'}", number, took)
    return rows


def main() -> None:
    """Print the tables; write them as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    middle = sorted({max(1, cores // 2), max(1, cores - 1), cores})
    parser.add_argument("--threads", nargs="+", type=int, default=middle)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin()
    print(f"{'':16}{'thr':>3}" + "".join(f"{count or 'unset':>10}" for count in COUNTS))
    figures = {"idle": idle_machine(options.threads), "shared": shared_machine(options.threads)}
    print("two at once: ms of the first, of the second")
    figures["two"] = two_at_once(options.threads[:-1])
    finish(options.json, figures)


if __name__ == "__main__":
    main()
