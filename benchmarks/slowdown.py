"""The slow-down of a watched training: tui-trainer compared with established tools.

    python -m benchmarks.slowdown [--launches 2] [--rounds 2] [--shapes gpt vit] [--json FILE]

The same plain loop (`loop.py`) runs bare and watched, in turns (`turns.py`), timed inside the
process that trains. `bare again` is a second process with the same bare loop: its difference is the
noise. `--launches` times `--rounds` is the number of pairs in each row, at least four. All
processes are restarted for each launch, because two processes of the same program differ by a few
percent throughout their lives. `CPU` is the ratio of the CPU time of the training thread alone,
which does not include other load on the machine; `others` is the CPU time, in ms per step, of all
other threads of the process (OpenMP's, and those that record, store and serve). With a viewer, the
last columns are the bytes and frames that it sent to its terminal in the counted parts.

Takes about twenty minutes on four cores; without the rivals and with one shape, seven.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish
from rivals import NEEDS, RIVALS
from started import IN_APP, NATURAL_CADENCES, RUN, Way
from turns import SETTLE_S, TURN_S, WARM_S, Compared, compare, trainees

LEAST_PAIRS = 4
BARE, AGAIN = Way("bare"), Way("bare again")
HOMES = (
    AGAIN,
    Way("tui-trainer, no viewer", home=RUN),
    Way("tui-trainer, viewer", home=RUN, viewer=True),
    Way("tui-trainer, in the app", home=IN_APP, viewer=True),
)
UNSTRETCHED = Way("natural cadences, viewer", home=RUN, viewer=True, flags=NATURAL_CADENCES)


def rivals() -> list[Way]:
    """The installed rivals; print a line for each one that is missing."""
    found = []
    for name in RIVALS:
        package = NEEDS.get(name)
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: skipped, {package} is not installed (pip install tui-trainer[bench])")
        else:
            found.append(Way(name, script=("--rival", name)))
    return found


def measure(shape: str, threads: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of one shape: homes for each number of threads, rivals for the middle number."""
    loop = ("--shape", shape, "--threads", str(max(threads)))
    turn = {"rounds": options.rounds, "seconds": options.seconds, "warm": options.warm}
    homes: dict[int, dict[str, Compared]] = {count: {} for count in threads}
    for _ in range(options.launches):
        with trainees([BARE, *HOMES], loop) as (bare, *others):
            settle = options.settle
            for count in threads:
                compare(bare, others, threads=count, settle=settle, known=homes[count], **turn)
                settle = options.settle / 3
    rows = [row for count in threads for row in print_rows(shape, count, homes[count])]
    if options.rivals:
        count = threads[len(threads) // 2]
        compared: dict[str, Compared] = {}
        for _ in range(options.launches):
            with trainees([BARE, AGAIN, UNSTRETCHED, *rivals()], loop) as (bare, *others):
                compare(bare, others, threads=count, settle=options.settle, known=compared, **turn)
        rows += print_rows(shape, count, compared, "rivals")
    return rows


def print_rows(
    shape: str, threads: int, found: dict[str, Compared], part: str = "homes"
) -> list[dict[str, Any]]:
    """Print the rows and return them."""
    rows = []
    for name, compared in found.items():
        one = compared.figures()
        rows.append({"part": part, "shape": shape, "threads": threads, "way": name, **one})
        text = f"{shape:6}{threads:3}  {name:30}{one['step_ms']:9.2f}"
        if "ratio" in one:
            text += f"{one['ratio']:9.3f}   {one['low']:.3f} to {one['high']:.3f}"
            text += f"{one['pairs']:6}{one['cpu_ratio']:9.3f}{one['others_ms']:9.3f}"
        if "frames_per_second" in one:
            text += f"{one['bytes_per_second']:9,.0f}{one['frames_per_second']:10.2f}"
        print(text, flush=True)
    return rows


def main() -> None:
    """Print the table; write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=2, help="of every process")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of every row and launch")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="s before the first pair")
    parser.add_argument("--no-rivals", dest="rivals", action="store_false")
    parser.add_argument("--seconds", type=float, default=TURN_S, help="of a turn")
    parser.add_argument("--warm", type=float, default=WARM_S, help="seconds first, not counted")
    parser.add_argument("--shapes", nargs="+", default=["gpt", "vit"])
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    threads = options.threads or sorted({1, max(1, cores // 2), cores})
    if options.launches * options.rounds < LEAST_PAIRS:
        print(f"fewer than {LEAST_PAIRS} pairs: too few for figures")
    begin()
    print(
        f"{'shape':6}{'thr':>3}  {'':30}{'ms/step':>9}{'ratio':>9}   quartiles       pairs", end=""
    )
    print(f"{'CPU':>9}{'others':>9}{'bytes/s':>9}{'frames/s':>10}", flush=True)
    rows = [row for shape in options.shapes for row in measure(shape, threads, options)]
    finish(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
