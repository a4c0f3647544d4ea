"""The time to take and restore a snapshot, as a ratio to a plain copy of as many bytes.

Also measured: a snapshot of an unchanged training; snapshots of a training with seven of eight
layers frozen, with the share of memory that each adds; and the cost of a step with time travel
unused, and with snapshots at their usual cadence.

    python benchmarks/snapshots.py [--parameters 20e6] [--repeat 7]

Ratios are of medians over alternating turns in one process, since a shared machine is noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.probes import PROBES
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.environment import initial_info
from tui_trainer.settings.edits import LiveEdits
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.tracer import Tracer
from tui_trainer.travel.snapshots import (
    SnapshotStore,
    TrainingParts,
    TrainingSnapshot,
    TrainingState,
)
from tui_trainer.travel.time_travel import TimeTravel


def trained(parameters: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with about `parameters` parameters, and its AdamW after one step."""
    width = max(16, int((parameters / 8) ** 0.5))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    width = model[0].in_features  # type: ignore[index,union-attr]
    optimizer.zero_grad()
    model(torch.randn(8, int(width))).square().mean().backward()
    optimizer.step()


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copies(parameters: float, repeat: int) -> dict[str, float]:
    """Throughput of taking a snapshot, of restoring it, and of a plain copy of as many bytes."""
    model, optimizer = trained(parameters)
    parts = TrainingParts([model], [optimizer])
    state = TrainingState.take(parts)
    plain = [tensor.clone() for tensor in state.tensors]
    for _, states in state.optimizers:
        plain += [each.clone() for held in states for each in held.values()]
    taking, again, restoring, copying = [], [], [], []
    for _ in range(repeat):
        copying.append(seconds(lambda: [tensor.clone() for tensor in plain]))
        taking.append(seconds(lambda: TrainingState.take(parts)))
        restoring.append(seconds(state.restore))
        same = TrainingState.take(parts, state)  # restoring has changed the versions: a full copy
        again.append(seconds(lambda same=same: TrainingState.take(parts, same)))
    gigabytes = state.nbytes / 1e9
    copy, take, restore = map(statistics.median, (copying, taking, restoring))
    for layer in list(model.children())[:-1]:  # one layer of eight is trained
        layer.requires_grad_(False)
    optimizer.zero_grad()
    tuned = TrainingState.take(parts)
    tuning, snapshots = [], SnapshotStore(1 << 40)
    for number in range(repeat):
        step(model, optimizer)
        tuning.append(seconds(lambda tuned=tuned: TrainingState.take(parts, tuned)))
        tuned = TrainingState.take(parts, tuned)
        snapshots.add(TrainingSnapshot(number, tuned, None))
    return {
        "megabytes": gigabytes * 1e3,
        "copy_gb_s": gigabytes / copy,
        "take_gb_s": gigabytes / take,
        "restore_gb_s": gigabytes / restore,
        "take_ratio": take / copy,
        "restore_ratio": restore / copy,
        "unchanged_ratio": statistics.median(again) / copy,
        "frozen_ratio": statistics.median(tuning) / copy,
        "frozen_memory_share": snapshots.nbytes / repeat / state.nbytes,
    }


class Loop:
    """A traced loop that keeps snapshots in `memory` bytes; None: without time travel."""

    def __init__(self, parameters: float, memory: int | None) -> None:
        self.model, self.optimizer = trained(parameters)
        self.recorder = Recorder(initial_info(RunSpec(name="r", directory=".", task="script")))
        self.gate = Gate()
        self.tracer = Tracer(self.recorder, self.gate, PROBES)
        if memory is not None:
            edits = LiveEdits(self.tracer, self.gate, self.recorder)
            self.travel = TimeTravel(self.tracer, self.gate, self.recorder, edits, memory)

    def run(self, steps: int) -> float:
        with self.tracer:
            return seconds(lambda: [step(self.model, self.optimizer) for _ in range(steps)]) / steps


def loops(parameters: float, repeat: int) -> dict[str, float]:
    """Time of a step without the package `travel`, with it unused, and with snapshots."""
    ways = {"without": None, "unused": 0, "used": 1 << 30}
    found = {name: Loop(parameters, memory) for name, memory in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        names = list(found)
        for name in names[turn % 3 :] + names[: turn % 3]:  # another one comes first in each turn
            taken = found[name].run(60)
            if turn:  # the first turn lets the cadences settle
                times[name].append(taken)
    for loop in found.values():
        loop.recorder.close(60)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "step_ms": medians["without"] * 1e3,
        "unused_ratio": medians["unused"] / medians["without"],
        "used_ratio": medians["used"] / medians["without"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=20e6)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    found = copies(arguments.parameters, arguments.repeat)
    found |= loops(min(arguments.parameters, 1e6), arguments.repeat)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
