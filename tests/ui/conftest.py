"""What makes the tests of screens quick, and the same on a busy machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from textual.app import App
from textual.css.model import RuleSet
from textual.css.stylesheet import Stylesheet
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input

from tui_trainer.learn.measurement_process import (
    MeasurementError,
    MeasurementProcess,
    PageMeasurement,
)

IDLE_AFTER_S = 0.005
MAX_ROUNDS = 200
"""Layouts and refreshes one after another, for an app that never comes to rest."""


@pytest.fixture(autouse=True, scope="session")
def parse_style_sheets_once() -> Iterator[None]:
    """Saves a fifth of a test: rules depend only on the arguments and the variables, and are never
    changed."""
    parse, parsed = Stylesheet._parse_rules, dict[Any, list[RuleSet]]()

    def look_up(self: Stylesheet, *arguments: Any, **named: Any) -> list[RuleSet]:
        key = arguments, frozenset(named.items()), frozenset(self._variables.items())
        if key not in parsed:
            parsed[key] = parse(self, *arguments, **named)
        return parsed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stylesheet, "_parse_rules", look_up)
        yield


@pytest.fixture(autouse=True)
def measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that pass by the pages to learn from start no process that imports PyTorch."""

    def refuse(self: MeasurementProcess, page: str, seed: int) -> PageMeasurement:
        raise MeasurementError("not measured in tests")

    monkeypatch.setattr(MeasurementProcess, "prepare", lambda self: None)
    monkeypatch.setattr(MeasurementProcess, "measure", refuse)


async def run_what_is_ready(min_sleep: float = 0.02, max_sleep: float = 1) -> None:
    """Until the event loop has nothing left to run, however long that takes. In place of Textual's
    `wait_for_idle`, whose arguments it takes."""
    await asyncio.sleep(IDLE_AFTER_S)
    ready, empty = asyncio.get_running_loop()._ready, 0  # type: ignore[attr-defined]
    while empty < 2:
        empty = 0 if ready else empty + 1
        await asyncio.sleep(0)


def is_to_be_drawn(screen: Screen[Any]) -> bool:
    """Whether a layout or a refresh waits for the timer that draws."""
    return bool(
        screen._layout_required
        or screen._scroll_required
        or screen._repaint_required
        or screen._recompose_required
        or screen._dirty_widgets
        or screen._callbacks
    )


async def come_to_rest(app: App[Any]) -> None:
    """Until no message, layout or refresh is left, the screen has the size of the terminal, and one
    screen has replaced another. What a layout changes may need a layout again."""
    for _ in range(MAX_ROUNDS):
        await run_what_is_ready()
        if not app._running or not app.screen_stack:
            return
        if app._resize_event is not None or getattr(app, "_screen_switch", None) is not None:
            continue  # until a timer
        screen = app.screen
        if app._batch_count or not screen.is_current or not is_to_be_drawn(screen):
            return
        screen._on_timer_update()


@pytest.fixture(autouse=True, scope="session")
def wait_for_the_event_loop() -> Iterator[None]:
    """`Pilot.pause` and `Pilot.press` return once the app is at rest, however long that takes.

    Textual's own wait until the process uses little of the processor, which is true of every
    process on a busy machine, and never of an app that is drawn often; and for 30 s at most. Then
    they make one layout.
    """
    press_keys = App._press_keys

    async def pause(self: Pilot[Any], delay: float | None = None) -> None:
        await self._wait_for_screen()
        if delay is not None:
            await asyncio.sleep(delay)
        await come_to_rest(self.app)

    async def press(self: App[Any], keys: Iterable[str]) -> None:
        for key in keys:
            await press_keys(self, [key])
            await come_to_rest(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textual.app.wait_for_idle", run_what_is_ready)
        patch.setattr("textual.pilot.wait_for_idle", run_what_is_ready)
        patch.setattr(App, "_press_keys", press)
        patch.setattr(Pilot, "pause", pause)
        patch.setattr(Pilot._wait_for_screen, "__defaults__", (240.0,))
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_passes_with_time() -> Iterator[None]:
    """What is shown for some seconds is still there when a slow test looks at it, and no cursor
    blinks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(App, "NOTIFICATION_TIMEOUT", 3600.0)
        patch.setattr("tui_trainer.ui.app.STATUS_MESSAGE_S", 3600.0)
        patch.setattr(Input, "_toggle_cursor", lambda field: None)
        yield


@pytest.fixture
def utc() -> Iterator[None]:
    """Times of day are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()
