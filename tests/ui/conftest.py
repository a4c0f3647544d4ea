"""What makes the tests of screens quick, and the same on a busy machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from textual.css.model import RuleSet
from textual.css.stylesheet import Stylesheet
from textual.pilot import Pilot

from tui_trainer.learn.measurement_process import (
    MeasurementError,
    MeasurementProcess,
    PageMeasurement,
)

IDLE_AFTER_S = 0.005


@pytest.fixture(autouse=True, scope="session")
def parse_style_sheets_once() -> Iterator[None]:
    """Saves a fifth of a test: rules depend only on the arguments and the variables, and are never
    changed."""
    parse, parsed = Stylesheet._parse_rules, dict[Any, list[RuleSet]]()

    def look_up(self: Stylesheet, *arguments: Any, **named: Any) -> list[RuleSet]:
        key = arguments, tuple(sorted(named.items())), tuple(sorted(self._variables.items()))
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


@pytest.fixture(autouse=True, scope="session")
def wait_for_the_event_loop() -> Iterator[None]:
    """`Pilot.pause` returns when the event loop has nothing left to run, however long that takes.

    Textual's own waits until the process uses little of the processor, which is true of every
    process on a busy machine, and never of an app that is drawn often; and for 30 s at most.
    """

    async def wait(min_sleep: float = 0.02, max_sleep: float = 1) -> None:
        await asyncio.sleep(IDLE_AFTER_S)
        ready, empty = asyncio.get_running_loop()._ready, 0  # type: ignore[attr-defined]
        while empty < 2:
            empty = 0 if ready else empty + 1
            await asyncio.sleep(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textual.pilot.wait_for_idle", wait)
        patch.setattr(Pilot._wait_for_screen, "__defaults__", (240.0,))
        yield
