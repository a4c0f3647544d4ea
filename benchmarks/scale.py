"""The cost of tracing a step, and of a key on the screen, for models with very many tensors.

    python -m benchmarks.scale [--layers 5 50 250 1000] [--json FILE]

The models have `--layers` attention layers of ten tiny tensors each, so that only the number of
tensors matters. The overhead is that counted by the tracer on the training thread, probe by probe,
over forty steps, in which every natural cadence occurs (`--budget 0`). With the default budget the
governor stretches some cadences to several hundred steps, which a mean over a few steps would miss.
So the governed share is computed: the cost of one measurement of a probe divided by its cadence,
plus the measured mean of all probes whose cadence is not stretched.

On screen: the CPU of one key on the table of all parameters, drawn headless. Last, the cost for a
billion parameters, extrapolated from one measured transformer block of 50 million.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from report import begin, finish

from tests.ui.fake import fake_large
from tui_trainer.history.records import StepRecord
from tui_trainer.probes import PROBES
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer
from tui_trainer.ui.app import TuiTrainerApp

WIDTH = 8
ROUND = 40
"""A multiple of every natural cadence (8, 10, 20)."""
BLOCKS, BLOCK_WIDTH = 20, 2048
"""A transformer of a billion parameters: 20 times 12·2048²."""
TOKENS, TRIED_TOKENS = 2048, 64
IN_TURNS = (schema.UPDATE_RATIO, schema.ATTENTION_SPECTRUM)
"""Tables that are measured in parts: a step measures 64 MB of weights, or one matrix, whatever the
number of tensors."""


class Attention(nn.Module):
    """An attention layer of ten tensors."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.W_query, self.W_key, self.W_value, self.W_out = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        y = self.norm(x)
        y = F.scaled_dot_product_attention(self.W_query(y), self.W_key(y), self.W_value(y))
        return x + self.W_out(y)


class Block(nn.Module):
    """A transformer block: 12·width² parameters in matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = self.attention(x)
        return x + self.down(F.gelu(self.up(x)))


class OverheadRecorder(Recorder):
    """A recorder that also keeps the cost of measuring, by probe."""

    def __init__(self) -> None:
        super().__init__(RunInfo(name="benchmark", task="scale"))
        self.overhead: list[Any] = []
        """Rows of `overhead_ms`: each the mean of ten steps."""

    def record(self, record: StepRecord) -> None:
        wanted = self._table(schema.OVERHEAD).id
        self.overhead += [row for table, row in record.rows if table == wanted]
        super().record(record)

    def _table(self, name: str) -> Any:
        return next(table for table in self.info.tables if table.name == name)

    def costs_ms(self) -> dict[str, float]:
        """Mean per step, by probe; `tracer` is the cost outside the probes."""
        columns = self._table(schema.OVERHEAD).columns
        means = [statistics.fmean(column) for column in zip(*self.overhead, strict=True)]
        return {column.name: mean for column, mean in zip(columns, means, strict=True) if mean}

    def cadences(self) -> dict[str, int]:
        """Current cadences, by table."""
        return {table.name: table.every for table in self.info.tables}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor | None = None
) -> list[float]:
    """Train; returns the milliseconds of each step."""
    taken = []
    x = torch.randn(2, 4, WIDTH) if x is None else x
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


Costs = tuple[dict[str, float], dict[str, int]]
"""(milliseconds per step by probe, current cadence by table)"""


def traced(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    budget: float,
    warm: int,
    steps: int,
    x: Tensor | None = None,
) -> Costs:
    """Train and measure `steps` steps; `warm` and `steps` are multiples of ten."""
    recorder = OverheadRecorder()
    try:
        with Tracer(recorder, Gate(), PROBES, ProbeOptions(budget=budget)) as tracer:
            train(model, optimizer, warm, x)
            tracer.flush()
            recorder.overhead.clear()
            train(model, optimizer, steps, x)
            tracer.flush()
            return recorder.costs_ms(), recorder.cadences()
    finally:
        recorder.close()


def governed_ms(natural: Costs, governed: Costs) -> dict[str, float]:
    """Milliseconds per step by probe: the cost of one measurement divided by the governor's
    cadence, or the measured cost if the cadence is not stretched."""
    costs, usual = natural
    found = {}
    for name, cost in costs.items():
        every, given = usual.get(name, 1), governed[1].get(name, 1)
        found[name] = cost * every / given if given > every else governed[0].get(name, 0.0)
    return found


def trace(layers: int, settle: int) -> dict[str, Any]:
    """The figures of a model: a bare step, and the overhead without and with the governor."""
    model = nn.Sequential(*(Attention() for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    train(model, optimizer, 2)
    natural = traced(model, optimizer, 0.0, 10, ROUND)
    bare = train(model, optimizer, 10)
    governed = traced(model, optimizer, ProbeOptions().budget, 10 * math.ceil(settle / 10), 20)
    bare += train(model, optimizer, 10)
    figures: dict[str, Any] = {"layers": layers, "tensors": len(list(model.parameters()))}
    figures["bare_ms"] = statistics.median(bare)
    figures["natural_ms"] = sum(natural[0].values())
    figures["natural_us_per_tensor"] = 1e3 * figures["natural_ms"] / figures["tensors"]
    by_probe = governed_ms(natural, governed)
    figures["governed_ms"] = sum(by_probe.values())
    figures["governed_share"] = figures["governed_ms"] / figures["bare_ms"]
    figures["natural_ms_by_probe"], figures["governed_ms_by_probe"] = natural[0], by_probe
    figures["every"] = governed[1]
    return figures


# ---------------------------------------------------------------- on screen


async def table_ms(parameters: int, times: int) -> dict[str, float]:
    """CPU milliseconds of one key on the table of all parameters, until it is drawn."""
    app = TuiTrainerApp(fake_large(parameters, 60), frames_per_second=0.01)
    async with app.run_test(size=(120, 40)) as pilot:
        await app.workers.wait_for_complete()  # imports after the first paint
        await pilot.press("3")
        await pilot.pause()
        figures = {}
        for name, keys in (
            ("scroll", ("pagedown", "pageup")),
            ("cursor", ("down", "up")),
            ("sort", ("o", "o")),
            ("reverse", ("r", "r")),
        ):
            figures[name] = await _keys(app, pilot, keys, times)
        await pilot.press("slash")
        figures["filter"] = await _keys(app, pilot, ("7", "backspace"), times)
    return figures


async def _keys(app: TuiTrainerApp, pilot: Any, keys: tuple[str, ...], times: int) -> float:
    costs = []
    for number in range(times):
        began = time.process_time()
        app.simulate_key(keys[number % len(keys)])
        done = asyncio.Event()
        for _ in range(8):
            await asyncio.sleep(0)
        app.screen.call_after_refresh(done.set)
        await done.wait()
        costs.append(1e3 * (time.process_time() - began))
        await pilot.pause()
    return statistics.median(costs)


# ---------------------------------------------------------------- a billion


def billion(width: int = BLOCK_WIDTH) -> dict[str, Any]:
    """The cost of all natural cadences, by probe, for a transformer of 20 blocks like the one
    measured here, and the duration of its step."""
    model = Block(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # holds no state
    x = torch.randn(1, TRIED_TOKENS, width)
    train(model, optimizer, 1, x)
    costs, cadences = traced(model, optimizer, 0.0, 10, ROUND, x)
    one = sum(p.numel() for p in model.parameters())
    by_probe = {
        name: cost * (1 if name in IN_TURNS else BLOCKS) for name, cost in costs.items() if cost
    }
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    began = time.perf_counter()
    a @ b
    flops = 2 * 2048**3 / (time.perf_counter() - began)
    parameters = one * BLOCKS
    step_ms = 1e3 * 6 * parameters * TOKENS / flops
    return {
        "parameters": parameters,
        "measured_parameters": one,
        "natural_ms_by_probe": by_probe,
        "natural_ms": sum(by_probe.values()),
        "every": cadences,
        "tokens": TOKENS,
        "gflops": flops / 1e9,
        "step_ms": step_ms,
        "natural_share": sum(by_probe.values()) / step_ms,
    }


def print_billion(guess: dict[str, Any]) -> None:
    """Print the extrapolation and its assumptions."""
    print(f"\n{guess['parameters']:,} parameters, extrapolated, one thread, ms a step:")
    for name, cost in sorted(guess["natural_ms_by_probe"].items(), key=lambda pair: -pair[1]):
        every = guess["every"].get(name, 1)
        cadence = f"every {every} steps" if every > 1 else ""
        print(f"  {name:20}{cost:9.1f}  {cadence}")
    print(
        f"  {'all':20}{guess['natural_ms']:9.1f}  of a step of {guess['step_ms']:,.0f}: "
        f"{guess['natural_share']:.2%} with no cadence stretched\n"
        f"Assumes: one block of {guess['measured_parameters']:,} parameters, measured over "
        f"{ROUND} steps at every natural cadence;\n{BLOCKS} such blocks and no embeddings; "
        f"{' and '.join(IN_TURNS)} cost the same a step, since they are\nmeasured in "
        f"turns of one size, everything else costs {BLOCKS} times as much; a step of "
        f"{guess['tokens']:,} tokens takes 6 operations a parameter and\n"
        f"token at the {guess['gflops']:,.0f} Gflop/s of a "
        "matrix product here, which no training reaches, so the share is an upper bound."
    )


def main() -> None:
    """Print the tables; write them as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 50, 250, 1000])
    parser.add_argument("--settle", type=int, default=80, help="steps before the governed ones")
    parser.add_argument("--times", type=int, default=20, help="of each key")
    parser.add_argument("--parameters", nargs="+", type=int, default=[50, 10_000], help="on screen")
    parser.add_argument("--width", type=int, default=BLOCK_WIDTH, help="of the block measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin()
    print(
        f"{'layers':>8}{'tensors':>9}{'bare ms':>9}{'natural ms':>12}{'µs/tensor':>11}"
        f"{'governed':>10}"
    )
    rows = []
    for layers in options.layers:
        rows.append(one := trace(layers, options.settle))
        print(f"{layers:8}{one['tensors']:9}{one['bare_ms']:9.1f}{one['natural_ms']:12.2f}", end="")
        print(f"{one['natural_us_per_tensor']:11.2f}{one['governed_share']:10.2%}", flush=True)
    print(f"\n{'CPU ms a key':>14}{'scroll':>9}{'cursor':>9}{'sort':>9}{'reverse':>9}{'filter':>9}")
    keys = {}
    for count in options.parameters:
        keys[count] = shown = asyncio.run(table_ms(count, options.times))
        print(f"{count:>14,}" + "".join(f"{value:9.1f}" for value in shown.values()), flush=True)
    print_billion(guess := billion(options.width))
    finish(options.json, {"tracing": rows, "keys_ms": keys, "billion": guess})


if __name__ == "__main__":
    main()
