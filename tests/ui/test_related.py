"""The lines of the other runs of the same tree on the charts of a run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of, until
from tui_trainer.history.window import Window
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.ui import related_runs
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.loss import LossPanel
from tui_trainer.ui.related_runs import RelatedCurve


class Branch:
    """A branch that recorded the steps from 200 on."""

    name = "gpt-calm-otter-2"
    run = SimpleNamespace(name=name, directory=Path("/runs/gpt-calm-otter-2"), live=False)

    def window(self, table: str, column: str, steps: tuple[int, int], buckets: int):
        if table == "step" and column not in ("loss", "grad_norm_preclip"):
            return None
        edges = np.linspace(*steps, buckets + 1).astype(np.int64)
        filled = edges[:-1] >= 200
        values = np.where(filled, 2.0, np.nan).astype(np.float32)[:, None]
        return Window(
            edges,
            values,
            values,
            values,
            filled,
            np.zeros((buckets, 1), bool),
            np.zeros((buckets, 1), np.uint8),
        )

    def close(self) -> None:
        pass

    def newest(self, table: str, column: str) -> float:
        return 2.0


async def test_a_branch_has_a_dim_line_and_its_name_on_the_charts() -> None:
    app = app_on("dashboard", fake_gpt(steps=300))
    app.related_runs.find = lambda: None  # type: ignore[method-assign]
    async with app.run_test(size=(200, 60)) as pilot:
        await frame(pilot)
        assert "■" not in text_of(app)
        app.related_runs.runs = (Branch(),)  # type: ignore[assignment]
        app.redraw()
        await settle(pilot)
        shown = text_of(app)
        assert shown.count("■ gpt-calm-otter-2 2") == 2, "below the loss and the norm"
        assert shown.count("■") >= 5, "signs along both lines"
        panel = app.screen.query_one(LossPanel)
        assert panel.snapshot.related == app.related_runs.runs


def test_an_error_while_related_runs_are_read_does_not_end_the_reading() -> None:
    tried = threading.Event()
    found = related_runs.RelatedRuns(lambda call, *given: call(*given), lambda: None)
    found._reading = found._refreshing = True

    def broken() -> None:
        raise ValueError("unexpected")

    found._thread.put(broken)
    found._thread.put(tried.set)
    assert tried.wait(60)
    assert not found._reading
    assert not found._refreshing
    found.close()


async def shown_on(mode: str, size: tuple[int, int], app: TuiTrainerApp) -> str:
    app.related_runs.find = lambda: None  # type: ignore[method-assign]
    async with app.run_test(size=size) as pilot:
        await frame(pilot)
        assert "■" not in text_of(app)
        app.related_runs.runs = (Branch(),)  # type: ignore[assignment]
        app.redraw()
        await settle(pilot)
        return text_of(app)


async def test_a_branch_has_its_line_on_the_charts_of_parameters_and_of_attention() -> None:
    for mode, charts in (("parameters", 3), ("attention", 4)):
        shown = await shown_on(mode, (200, 60), app_on(mode, fake_gpt(steps=300)))
        assert shown.count("■ gpt-calm-otter-2") >= charts, shown
        assert shown.count("■") > 2 * charts, "signs along the lines"
    narrow = await shown_on("parameters", (80, 24), app_on("parameters", fake_gpt(steps=300)))
    assert narrow.count("■ g") == 2, narrow


class Recording:
    """The branch while it trains, on a disk that only the thread for it may wait for."""

    def __init__(self) -> None:
        self.run = SimpleNamespace(name=Branch.name, directory=Branch.run.directory, live=True)
        self.newest = 2.0
        self.closed = False

    def find(self, info: RunInfo) -> list[Any]:
        self._read()
        return [self.run]

    def open(self, entries: Sequence[Any], known: Sequence[Any]) -> tuple[Any, ...]:
        self._read()
        self.closed = not entries
        return (self,) if entries else ()

    def curve(self, table: str, column: str, steps: tuple[int, int], buckets: int) -> RelatedCurve:
        self._read()
        return RelatedCurve(Branch().window(table, column, steps, buckets), self.newest)

    def refresh(self) -> bool:
        self._read()
        return True

    def _read(self) -> None:
        assert threading.current_thread() is not threading.main_thread()


async def test_other_runs_are_read_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    monkeypatch.setattr(related_runs, "find_related", recording.find)
    monkeypatch.setattr(related_runs, "open_related", recording.open)
    app = app_on("dashboard", fake_gpt(steps=300))
    async with app.run_test(size=(200, 60)) as pilot:
        await until(pilot, lambda: "■ gpt-calm-otter-2 2" in text_of(app), "its line")
        recording.newest = 1.25
        app.related_runs.refresh()
        await until(pilot, lambda: "■ gpt-calm-otter-2 1.25" in text_of(app), "newer steps")
        app.session.advance(100)
        steps = app.snapshot.status.step
        await until(pilot, lambda: app.snapshot.status.step > steps, "another range of steps")
        assert "■ gpt-calm-otter-2 1.25" in text_of(app), "the line stays until it is read again"
    async with asyncio.timeout(240):
        while not recording.closed:
            await asyncio.sleep(0.01)


def test_a_window_is_moved_by_whole_steps() -> None:
    window = Branch().window("step", "loss", (1, 301), 60)
    shown = related_runs.moved(window, (101, 401))
    assert shown.edges[[0, -1]].tolist() == [101, 401]
    filled = shown.edges[:-1][shown.filled]
    assert 200 <= filled[0] <= 205
    assert 296 <= filled[-1] <= 300
    assert np.isnan(shown.last[~shown.filled]).all()
    assert (shown.last[shown.filled] == 2.0).all()


def test_the_newest_value_is_that_of_the_width_that_was_read_last() -> None:
    run = related_runs.CachedRun(Branch.run, lambda: None)  # type: ignore[arg-type]
    for buckets, newest in ((60, 2.0), (80, 1.25)):
        curve = related_runs.CachedCurve(RelatedCurve(None, newest), (1, 301))
        run.keep({("step", "loss", buckets): curve})
    assert run.newest("step", "loss") == 1.25
