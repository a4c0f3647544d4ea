"""Models with very many parameter tensors: what tracing a step costs, and a key on the screen.

    python -m benchmarks.scale [--layers 5 50 250 1000] [--json FILE]

A model of so many attention layers, of ten tiny tensors each: all cost is that of their number. Own
cost is what the tracer itself counts on the training thread, at every natural cadence
(`--budget 0`) and with the default budget once the governor has settled. On screen: CPU of one key
on the table of all parameters, drawn headless. Last, what a billion parameters would cost, from the
speed at which norms are read here.
"""

from __future__ import annotations

import argparse
import asyncio
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

from report import loaded, machine, write_json

from tests.ui.fake import fake_large
from tui_trainer.history.records import StepRecord
from tui_trainer.probes import PROBES
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.recording.recorder import Recorder
from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.probe import Options
from tui_trainer.tracing.tracer import Tracer
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.widgets import plot

WIDTH = 8
BILLION = 1_000_000_000


class Attention(nn.Module):
    """Ten tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.W_query, self.W_key, self.W_value, self.W_out = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        y = self.norm(x)
        y = F.scaled_dot_product_attention(self.W_query(y), self.W_key(y), self.W_value(y))
        return x + self.W_out(y)


class Kept(Recorder):
    """Also keeps what each step's measuring has cost."""

    def __init__(self) -> None:
        super().__init__(RunInfo(name="benchmark", task="scale"))
        self.own_ms: list[float] = []

    def record(self, record: StepRecord) -> None:
        """As the recorder's."""
        self.own_ms.append(record.own_ms)
        super().record(record)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Milliseconds of each step."""
    taken = []
    x = torch.randn(2, 4, WIDTH)
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


def trace(layers: int, steps: int, settle: int) -> dict[str, float]:
    """Cost of a step: bare, and ours without and with the governor."""
    model = nn.Sequential(*(Attention() for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    train(model, optimizer, 2)
    figures = {"layers": float(layers), "tensors": float(len(list(model.parameters())))}
    bare = []
    for name, budget, warm in (("all", 0.0, 3), ("governed", 0.01, settle)):
        recorder = Kept()
        with Tracer(recorder, Gate(), PROBES, Options(budget=budget)) as tracer:
            train(model, optimizer, warm)
            tracer.flush()
            recorder.own_ms.clear()
            train(model, optimizer, steps)
        figures[f"{name}_ms"] = statistics.fmean(recorder.own_ms)
        recorder.close()
        bare += train(model, optimizer, max(3, steps // 4))
    figures["bare_ms"] = statistics.median(bare)
    figures["governed_share"] = figures["governed_ms"] / figures["bare_ms"]
    figures["all_us_per_tensor"] = 1e3 * figures["all_ms"] / figures["tensors"]
    return figures


# ---------------------------------------------------------------- on screen


async def table_ms(parameters: int, times: int) -> dict[str, float]:
    """CPU milliseconds of one key on the table of all parameters, until it is drawn."""
    app = TuiTrainerApp(fake_large(parameters, 60), frames_per_second=0.01)
    async with app.run_test(size=(120, 40)) as pilot:
        while not plot.ready():
            await pilot.pause(0.01)
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


def billion() -> dict[str, float]:
    """An extrapolation: seconds a step for norms of 10⁹ gradients and weights, and for training."""
    tensors = [torch.randn(4096, 4096) for _ in range(4)]
    torch._foreach_norm(tensors)
    began = time.perf_counter()
    torch._foreach_norm(tensors)
    per_parameter = (time.perf_counter() - began) / sum(t.numel() for t in tensors)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    began = time.perf_counter()
    a @ b
    flops = 2 * 2048**3 / (time.perf_counter() - began)
    tokens = 2048
    return {
        "norms_s": 2 * BILLION * per_parameter,
        "step_s": 6 * BILLION * tokens / flops,
        "tokens": float(tokens),
        "gb_per_s": 4 / per_parameter / 1e9,
    }


def main() -> None:
    """Print the tables; write them as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 50, 250, 1000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settle", type=int, default=75, help="steps before the governed ones")
    parser.add_argument("--times", type=int, default=20, help="of each key")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), loaded(), sep="\n")
    print(
        f"{'layers':>8}{'tensors':>9}{'bare ms':>9}{'all ms':>9}{'µs/tensor':>11}{'governed':>10}"
    )
    rows = []
    for layers in options.layers:
        rows.append(one := trace(layers, options.steps, options.settle))
        print(f"{layers:8}{one['tensors']:9.0f}{one['bare_ms']:9.1f}{one['all_ms']:9.2f}", end="")
        print(f"{one['all_us_per_tensor']:11.2f}{one['governed_share']:10.2%}", flush=True)
    print(f"\n{'CPU ms a key':>14}{'scroll':>9}{'cursor':>9}{'sort':>9}{'reverse':>9}{'filter':>9}")
    keys = {}
    for count in (50, 10_000):
        one = keys[count] = asyncio.run(table_ms(count, options.times))
        print(f"{count:>14,}" + "".join(f"{value:9.1f}" for value in one.values()), flush=True)
    guess = billion()
    print(
        f"\n10⁹ parameters, extrapolated: norms of gradients and weights {guess['norms_s']:.2f} s "
        f"at {guess['gb_per_s']:.0f} GB/s; a step on {guess['tokens']:.0f} tokens "
        f"{guess['step_s']:.0f} s at this machine's matrix speed: "
        f"{guess['norms_s'] / guess['step_s']:.2%} where every step is measured"
    )
    figures = {"tracing": rows, "keys_ms": keys, "billion": guess}
    write_json(options.json, {"machine": machine(), "load": loaded(), **figures})


if __name__ == "__main__":
    main()
