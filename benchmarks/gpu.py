"""The cost of watching a training on a CUDA GPU: slow-down, waits for the device, memory.

    python -m benchmarks.gpu [--rounds 6] [--seconds 3] [--json FILE]     # on a machine with one
    python -m benchmarks.gpu --dry                                        # its logic, on the CPU

nanoGPT's GPU shape in bf16, and GPT-2 124M with and without `torch.compile`, each in three
processes that take turns (`turns.py`): bare, under `tui-trainer run` without a viewer, and with
one. Waits are counted with torch.profiler in separate turns of forty steps, bare and watched, in
which every cadence occurs with `--budget 0`; a row shows their difference per step. The memory
added is the difference of `torch.cuda.max_memory_allocated`; the next column excludes the copies of
the initial Wq, Wk and Wv, which the drift from initialization needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from clock import SYNCHRONIZING
from loop import GPTS
from report import begin, finish, machine, write_json
from started import NATURAL_CADENCES, RUN, Way
from trainee import Trainee
from turns import SETTLE_S, WARM_S, compare, trainees

WAYS = (
    Way("bare"),
    Way("bare again"),
    Way("tui-trainer, no viewer", home=RUN),
    Way("tui-trainer, viewer", home=RUN, viewer=True),
    Way("natural cadences, no viewer", home=RUN, flags=NATURAL_CADENCES),
)
CASES: dict[str, tuple[str, ...]] = {
    "nanoGPT's GPU shape, bf16": ("--shape", "gpt-gpu", "--dtype", "bf16"),
    "GPT-2 124M, bf16": ("--shape", "gpt2", "--dtype", "bf16"),
    "GPT-2 124M, bf16, compiled": ("--shape", "gpt2", "--dtype", "bf16", "--compile"),
}
DRY: dict[str, tuple[str, ...]] = {
    "tiny": ("--shape", "tiny", "--threads", "1"),
    "tiny, bf16": ("--shape", "tiny", "--threads", "1", "--dtype", "bf16"),
}


def copies_bytes(loop: tuple[str, ...]) -> int:
    """Size of the initial query, key and value matrices, in float32."""
    shape = GPTS[loop[loop.index("--shape") + 1]]
    return 3 * 4 * int(shape["layers"]) * int(shape["width"]) ** 2


def waits(trainee: Trainee, steps: int) -> dict[str, float]:
    """Waits for the device per step, by name."""
    answer = trainee.ask(600.0, do="profile", steps=steps)
    return {name: answer["counts"].get(name, 0) / answer["steps"] for name in SYNCHRONIZING}


def measure(loop: tuple[str, ...], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    rows = []
    with trainees(WAYS, loop) as started:
        bare, *others = started
        found = compare(
            bare, others, options.rounds, options.seconds, options.warm, 0, options.settle
        )
        figures = {name: one.figures() for name, one in found.items()}
        memory = {each.way.name: each.ask(do="memory")["peak_bytes"] for each in started}
        counted = {each.way.name: waits(each, options.profiled) for each in started}
    for way in WAYS:
        added = {name: count - counted["bare"][name] for name, count in counted[way.name].items()}
        rows.append(
            {
                "way": way.name,
                **figures[way.name],
                "waits_per_step": counted[way.name],
                "waits_added_per_step": added,
                "peak_bytes": memory[way.name],
                "peak_added_bytes": memory[way.name] - memory["bare"],
                "copies_bytes": copies_bytes(loop) if way.home == RUN else 0,
            }
        )
    return rows


def print_rows(case: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one case."""
    bare_peak = rows[0]["peak_bytes"]
    for row in rows:
        ratio = (
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if "ratio" in row else ""
        )
        text = f"{case:28}{row['way']:28}{row['step_ms']:9.2f}  {ratio:26}"
        cuda = {k: v for k, v in row["waits_added_per_step"].items() if not k.startswith("aten")}
        items = row["waits_added_per_step"]["aten::_local_scalar_dense"]
        text += f"{sum(cuda.values()):9.2f}{items:9.2f}"
        if bare_peak:
            beyond = row["peak_added_bytes"] - row["copies_bytes"]
            text += f"{row['peak_added_bytes'] / 1e6:11.1f}{beyond / bare_peak:10.2%}"
        print(text, flush=True)


def main() -> None:
    """Print the table; write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--warm", type=float, default=WARM_S, help="seconds first, not counted")
    parser.add_argument("--profiled", type=int, default=40, help="steps under the profiler")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="s before the first pair")
    parser.add_argument("--cases", nargs="+", help="parts of case names; default: all")
    parser.add_argument("--batch", type=int, help="examples per step, where memory is small")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        reason = "no CUDA GPU here: nothing is measured (--dry tries the logic on the CPU)"
        print(reason)
        write_json(options.json, {"machine": machine(), "not_measured": reason})
        return
    cases, device = (DRY, "cpu") if options.dry else (CASES, "cuda")
    if options.dry:
        options.rounds, options.seconds, options.warm, options.settle = 1, 2.0, 0.3, 1.0
    card = "no GPU: a dry run with meaningless figures"
    if not options.dry:
        card = torch.cuda.get_device_name()
    begin(card)
    print(f"{'':28}{'':28}{'ms/step':>9}  {'ratio (quartiles)':26}", end="")
    print(f"{'waits +':>9}{'.item +':>9}{'MB added':>11}{'beyond':>10}")
    found = {}
    batch = ("--batch", str(options.batch)) if options.batch else ()
    for case, loop in cases.items():
        if options.cases and not any(part in case for part in options.cases):
            continue
        rows = found[case] = measure((*loop, *batch, "--device", device), options)
        print_rows(case, rows)
    finish(options.json, {"device": card, "cases": found})


if __name__ == "__main__":
    main()
