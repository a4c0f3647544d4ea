"""CPU per frame of the dashboard, with everything changing and with nothing changed.

    python -m benchmarks.frames [--json FILE] [--frames N]

Runs the real app headless over a synthetic session, so that only the viewing side is measured:
poll, building rows, comparing them with those on screen, and rendering what differs (Textual's
compositor included). CPU is that of the process (`time.process_time`), the fairest on a busy
machine. "keys" is the time from a key press to the end of the frame that shows its effect.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from textual import events

from tests.ui.fake import FakeSession, fake_gpt, fake_large
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.clipping import ClippingPanel
from tui_trainer.ui.panels.gradients import GradientsPanel
from tui_trainer.ui.panels.loss import LossPanel
from tui_trainer.ui.panels.query_key_value import LayersTable, TrendPanel
from tui_trainer.ui.widgets import plot

SIZE = (120, 40)


async def measure(session: FakeSession, frames: int, size: tuple[int, int]) -> dict[str, Any]:
    """Milliseconds: medians over `frames` frames, and the slowest."""
    app = TuiTrainerApp(session, frames_per_second=0.01)  # frames only when asked for
    async with app.run_test(size=size) as pilot:
        while not plot.ready():
            await pilot.pause(0.01)
        await _frame(app)
        gc.freeze()  # as the app does on a terminal
        changed, building, still = [], [], []
        for _ in range(frames):
            session.advance(1)
            before = time.process_time()
            app.frame()
            building.append(time.process_time() - before)
            await _settle(app)
            changed.append(time.process_time() - before)
        for _ in range(frames):
            before = time.process_time()
            app.frame()
            await _settle(app)
            still.append(time.process_time() - before)
        panels = {}
        for kind in (LossPanel, ClippingPanel, GradientsPanel, LayersTable, TrendPanel):
            panel = app.screen.query(kind).first()
            costs = []
            for _ in range(frames):
                session.advance(1)
                snapshot = session.poll()
                before = time.process_time()
                panel.show(snapshot)
                costs.append(time.process_time() - before)
            panels[kind.__name__] = round(1e3 * median(costs), 2)
            await _settle(app)
        keys = []
        for key in ("down", "down", "o", "o", "o", "l", "l", "space", "space") * 3:
            before = time.perf_counter()
            app.post_message(events.Key(key, None))
            while not _idle(app):
                await asyncio.sleep(0)
            await _settle(app)
            keys.append(time.perf_counter() - before)
    return {
        "changed_ms": round(1e3 * median(changed), 2),
        "changed_slowest_ms": round(1e3 * max(changed), 2),
        "building_ms": round(1e3 * median(building), 2),
        "unchanged_ms": round(1e3 * median(still), 3),
        "panels_ms": panels,
        "key_ms": round(1e3 * median(keys), 1),
        "key_slowest_ms": round(1e3 * max(keys), 1),
    }


def _idle(app: TuiTrainerApp) -> bool:
    """Whether every message on the way to the focused widget has been dealt with."""
    pumps = [app, app.screen, *([app.focused] if app.focused else [])]
    return all(pump.message_queue_size == 0 for pump in pumps)


async def _frame(app: TuiTrainerApp) -> None:
    app.frame()
    await _settle(app)


async def _settle(app: TuiTrainerApp) -> None:
    """Until what was refreshed has been rendered."""
    for _ in range(4):
        await asyncio.sleep(0)
    done = asyncio.Event()
    app.screen.call_after_refresh(done.set)
    await done.wait()


def main() -> None:
    """Print the table; write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--frames", type=int, default=60)
    options = parser.parse_args()
    cases = {
        "27 parameters, 120×40": (lambda: fake_gpt(700), SIZE),
        "51 parameters, 120×40": (lambda: fake_large(51, 60), SIZE),
        "10,000 parameters, 120×40": (lambda: fake_large(10_000, 60), SIZE),
        "27 parameters, 200×60": (lambda: fake_gpt(700), (200, 60)),
        "27 parameters, 80×24": (lambda: fake_gpt(700), (80, 24)),
    }
    results = {}
    print(f"{'':28}{'changed':>9}{'slowest':>9}{'unchanged':>11}{'key':>7}   panels (ms of CPU)")
    for name, (session, size) in cases.items():
        result = results[name] = asyncio.run(measure(session(), options.frames, size))
        panels = ", ".join(f"{panel} {cost}" for panel, cost in result["panels_ms"].items())
        print(
            f"{name:28}{result['changed_ms']:>9}{result['changed_slowest_ms']:>9}"
            f"{result['unchanged_ms']:>11}{result['key_ms']:>7}   {panels}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
