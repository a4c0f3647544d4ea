"""The cost of tracing: the same training in one process, alternately bare and traced.

    python benchmarks/tracer_cost.py [--blocks 12] [--steps 40] [--threads 2] [--budget 0.01]

Trains nanoGPT's CPU shape (4 layers, 4 heads, width 128, block 64, batch 12) on random tokens.
Blocks of steps alternate (bare, traced, bare, traced, …), so that other load on the machine affects
both. Prints the median step of each, the median of the pairwise ratios with its quartiles, the cost
by probe as counted by the tracer, and the number of calls of tui-trainer's Python functions per
step, which does not depend on the load. `--profile` prints where the tracer spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish

import tui_trainer
from tui_trainer.probes import PROBES
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train; returns the milliseconds of each step."""
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        tokens = torch.randint(0, 65, (12, 65))
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        taken.append((time.perf_counter() - began) * 1e3)
    return taken


CALLS_COUNTED = 160
"""Steps whose calls are counted: every natural cadence of the GPT occurs in them."""


def calls_per_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Calls per step of Python functions of the package, without those of the model."""
    package = str(Path(tui_trainer.__file__).resolve().parent)
    models = str(Path(GPT.forward.__code__.co_filename).parent)
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event == "call":
            file = os.path.realpath(frame.f_code.co_filename)
            count += file.startswith(package) and not file.startswith(models)

    sys.setprofile(profile)
    try:
        train(model, optimizer, CALLS_COUNTED)
    finally:
        sys.setprofile(None)
    return count / CALLS_COUNTED


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--blocks", type=int, default=12)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--budget", type=float, default=0.0, help="0: every natural cadence")
    options.add_argument("--profile", action="store_true")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    begin()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    model = GPT(vocabulary=65, block_size=64, layers=4, heads=4, width=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    recorder = Recorder(RunInfo(name="benchmark", task="gpt"))
    tracer = Tracer(recorder, Gate(), PROBES, ProbeOptions(budget=chosen.budget))
    with tracer:
        train(model, optimizer, 20)
    bare: list[float] = []
    traced: list[float] = []
    ratios: list[float] = []
    for _ in range(chosen.blocks):
        plain_steps = train(model, optimizer, chosen.steps)
        with tracer:
            train(model, optimizer, 2)
            watched_steps = train(model, optimizer, chosen.steps)
        bare += plain_steps
        traced += watched_steps
        ratios.append(statistics.median(watched_steps) / statistics.median(plain_steps))
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    plain, watched = statistics.median(bare), statistics.median(traced)
    print(f"bare {plain:.2f} ms, traced {watched:.2f} ms a step")
    print(f"ratio {middle:.4f} (quartiles {low:.4f} to {high:.4f}, {len(ratios)} pairs)")
    time.sleep(0.2)
    table = next(t for t in recorder.info.tables if t.name == "overhead_ms")
    _, values = recorder.history.tables[table.id].tail(10_000)
    medians = np.median(values, axis=0).tolist()
    costs = {each.name: cost for each, cost in zip(table.columns, medians, strict=True)}
    for name, cost in costs.items():
        print(f"  {name:20s} {cost:7.4f} ms")
    print(f"  {'all':20s} {float(np.median(values.sum(axis=1))):7.4f} ms")
    with tracer:
        train(model, optimizer, 20)
        calls = calls_per_step(model, optimizer)
    print(f"{calls:.0f} calls of our functions a step")
    if chosen.profile:
        with tracer, cProfile.Profile() as profile:
            train(model, optimizer, 200)
        pstats.Stats(profile).sort_stats("tottime").print_stats("tui_trainer|built-in", 40)
    recorder.close()
    ratio = {"ratio": middle, "low": low, "high": high, "pairs": len(ratios)}
    finish(
        chosen.json,
        {"bare_ms": plain, "traced_ms": watched, **ratio, "calls": calls, "overhead_ms": costs},
    )


if __name__ == "__main__":
    main()
