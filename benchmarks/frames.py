"""CPU per frame of the dashboard, and how long single callbacks block the event loop.

    python -m benchmarks.frames [--json FILE] [--frames N]

Runs the real app over a synthetic session and without a terminal, so that only the viewing side is
measured: poll, building rows, comparing them with those on screen, rendering the differences
(Textual's compositor included) and writing the escape sequences. Each case runs in a new process,
so that showing a screen for the first time includes its imports.

CPU is that of the process (`time.process_time`), the least affected by a busy machine, until
everything is drawn. Each panel has two figures: `show`, the CPU to build it, and the CPU to build
and draw it. `callback` is the longest single callback of the event loop, in CPU of its thread,
listed by cause.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import sys
import time
from asyncio.events import Handle
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}  # read when textual is imported
os.environ.pop("NO_COLOR", None)
sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish
from textual.pilot import Pilot

from tests.ui.fake import FakeSession
from tests.ui.fake_run import describe, synthesise
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.attention.overview import LayersTable, TrendChart
from tui_trainer.ui.panels.clipping import ClippingPanel
from tui_trainer.ui.panels.gradients import GradientsPanel
from tui_trainer.ui.panels.loss import LossPanel

CASES: dict[str, tuple[int, tuple[int, int]]] = {
    "27 parameters, 120×40": (27, (120, 40)),
    "51 parameters, 120×40": (51, (120, 40)),
    "10,000 parameters, 120×40": (10_000, (120, 40)),
    "27 parameters, 200×60": (27, (200, 60)),
    "27 parameters, 80×24": (27, (80, 24)),
}
PANELS = (LossPanel, ClippingPanel, GradientsPanel, LayersTable, TrendChart)
KEYS = {"cursor": ("down", "up"), "sort": ("o",)}
"""Keys that are timed on the table of all parameters."""
SCREENS = {"attention": "2", "parameters": "3", "samples": "4", "log": "5", "help": "6"}


class Drawn(TuiTrainerApp):
    """The app, writing the output for a terminal, which Textual omits when it is headless."""

    sent = 0

    @property
    def is_headless(self) -> bool:
        """False, so that Textual writes its output."""
        return False

    def count_output(self) -> None:
        """Count the bytes of the output, and discard them."""
        assert self._driver is not None

        def write(data: str) -> None:
            self.sent += len(data.encode())

        self._driver.write = write  # type: ignore[method-assign]


class Callbacks:
    """The longest callback of every event loop, in milliseconds of its thread's CPU."""

    def __init__(self) -> None:
        self.longest_ms = 0.0

    def __enter__(self) -> Callbacks:
        self._run = run = Handle._run

        def timed(handle: Handle) -> None:
            began = time.thread_time()
            run(handle)
            self.longest_ms = max(self.longest_ms, 1e3 * (time.thread_time() - began))

        Handle._run = timed  # type: ignore[method-assign]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        Handle._run = self._run  # type: ignore[method-assign]

    async def forget(self) -> None:
        """Start over after the callbacks that are due now."""
        await asyncio.sleep(0)
        self.longest_ms = 0.0


def session_of(parameters: int, frames: int) -> FakeSession:
    """A run that has made some steps, and can make as many more as the benchmark needs."""
    made, layers = (700, 4) if parameters == 27 else (60, max(1, (parameters - 3) // 6))
    total = made + frames * (1 + len(PANELS)) + 10
    return FakeSession(synthesise(describe(layers, total_steps=total)), made)


def measure(case: str, frames: int) -> dict[str, Any]:
    """The figures of a case in milliseconds: medians over `frames` frames, and the slowest."""
    parameters, size = CASES[case]
    return asyncio.run(_measure(session_of(parameters, frames), frames, size))


async def _measure(session: FakeSession, frames: int, size: tuple[int, int]) -> dict[str, Any]:
    app = Drawn(session, frames_per_second=0.01)  # frames only when asked for
    with Callbacks() as callbacks:
        async with app.run_test(size=size) as pilot:
            app.count_output()
            await app.workers.wait_for_complete()  # what is imported after the first paint
            app.draw_frame()
            await _settle(app)
            longest = {"start, and the dashboard": callbacks.longest_ms}
            gc.freeze()  # as the app does on a terminal
            sent = app.sent
            changed, building, longest["frame"] = await _frames(app, session, frames, callbacks)
            sent = app.sent - sent
            if not sent:
                raise RuntimeError("nothing was drawn")
            still = []
            for _ in range(frames):
                before = time.process_time()
                app.draw_frame()
                await _settle(app)
                still.append(time.process_time() - before)
            panels = {kind.__name__: await _panel(app, session, kind, frames) for kind in PANELS}
            longest |= await _screens(pilot, callbacks)
            app.simulate_key("3")
            await pilot.pause()
            keys = {}
            for name, pressed in KEYS.items():
                keys[name], longest[f"key: {name}"] = await _keys(app, pilot, pressed, callbacks)
            if session.status.ended:
                raise RuntimeError("the run was over before everything was measured")
    return {
        "changed_ms": _ms(changed),
        "changed_slowest_ms": round(1e3 * max(changed), 2),
        "building_ms": _ms(building),
        "unchanged_ms": _ms(still),
        "bytes_per_frame": round(sent / frames),
        "panels_ms": panels,
        "keys_ms": keys,
        "longest_callback_ms": {name: round(took, 2) for name, took in longest.items()},
    }


def _ms(seconds: Sequence[float]) -> float:
    return round(1e3 * median(seconds), 3)


async def _frames(
    app: Drawn, session: FakeSession, frames: int, callbacks: Callbacks
) -> tuple[list[float], list[float], float]:
    """(seconds of each frame, seconds of building each, milliseconds of the longest callback)."""
    changed, building, longest = [], [], 0.0
    for _ in range(frames):
        session.advance(1)
        await callbacks.forget()
        spent: list[float] = []
        before = time.process_time()

        def draw(spent: list[float] = spent, before: float = before) -> None:
            app.draw_frame()
            spent.append(time.process_time() - before)

        app.call_next(draw)
        await _settle(app)
        changed.append(time.process_time() - before)
        building += spent
        longest = max(longest, callbacks.longest_ms)
    return changed, building, longest


async def _panel(
    app: Drawn, session: FakeSession, kind: type[Any], frames: int
) -> dict[str, float]:
    """Median milliseconds to build one panel, and to build and draw it."""
    panel = app.screen.query(kind).first()
    showing, drawn = [], []
    for _ in range(frames):
        session.advance(1)
        snapshot = session.poll()
        await asyncio.sleep(0)
        before = time.process_time()
        panel.show(snapshot)
        showing.append(time.process_time() - before)
        await _settle(app)
        drawn.append(time.process_time() - before)
    return {"show": _ms(showing), "drawn": _ms(drawn)}


async def _screens(pilot: Pilot[Any], callbacks: Callbacks) -> dict[str, float]:
    """The longest callback while each screen is shown for the first time."""
    longest = {}
    for name, key in SCREENS.items():
        await callbacks.forget()
        pilot.app.simulate_key(key)
        await pilot.pause()
        await _settle(pilot.app)
        if pilot.app.current_mode != name:
            raise RuntimeError(f"key {key} shows {pilot.app.current_mode}, not {name}")
        longest[f"first time: {name}"] = callbacks.longest_ms
    return longest


async def _keys(
    app: Drawn, pilot: Pilot[Any], keys: Sequence[str], callbacks: Callbacks
) -> tuple[float, float]:
    """(median CPU milliseconds from a key until its effect is drawn, longest callback)."""
    costs, longest = [], 0.0
    for number in range(20):
        await pilot.pause()
        await _settle(app)
        await callbacks.forget()
        before = time.process_time()
        app.simulate_key(keys[number % len(keys)])
        for _ in range(8):  # through the queues of app, screen and table
            await asyncio.sleep(0)
        await _settle(app)
        costs.append(time.process_time() - before)
        longest = max(longest, callbacks.longest_ms)
    return _ms(costs), longest


async def _settle(app: Any) -> None:
    """Wait until everything that was refreshed has been rendered."""
    for _ in range(4):
        await asyncio.sleep(0)
    done = asyncio.Event()
    app.screen.call_after_refresh(done.set)
    await done.wait()


def main() -> None:
    """Print the tables; write them as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--cases", nargs="+", help="parts of their names; default: all")
    options = parser.parse_args()
    chosen = [
        case for case in CASES if not options.cases or any(part in case for part in options.cases)
    ]
    begin()
    results = {}
    print(
        f"{'CPU ms':28}{'changed':>9}{'slowest':>9}{'unchanged':>11}{'cursor':>8}{'sort':>7}",
        end="",
    )
    print("   bytes   panels: show, and drawn")
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning, max_tasks_per_child=1) as processes:
        for case in chosen:
            one = results[case] = processes.submit(measure, case, options.frames).result()
            panels = ", ".join(
                f"{panel} {cost['show']:.2f} {cost['drawn']:.2f}"
                for panel, cost in one["panels_ms"].items()
            )
            print(
                f"{case:28}{one['changed_ms']:9.2f}{one['changed_slowest_ms']:9.2f}"
                f"{one['unchanged_ms']:11.3f}{one['keys_ms']['cursor']:8.2f}"
                f"{one['keys_ms']['sort']:7.2f}{one['bytes_per_frame']:8,}   {panels}",
                flush=True,
            )
    print("\nlongest callback, ms" + "".join(f"{case:>27}" for case in results))
    for name in next(iter(results.values()))["longest_callback_ms"]:
        figures = (one["longest_callback_ms"][name] for one in results.values())
        print(f"{name:24}" + "".join(f"{figure:27.1f}" for figure in figures))
    finish(options.json, {"cases": results})


if __name__ == "__main__":
    main()
