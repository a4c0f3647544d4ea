"""The dialog of the experiments."""

from __future__ import annotations

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of, until
from tui_trainer.protocol.inspection import NOT_CAPTURED, Inspected
from tui_trainer.protocol.settings import SettingChange
from tui_trainer.protocol.travel import (
    EstimateCost,
    FindLearningRate,
    MeasureLandscape,
    ReadTimeline,
    WhatIf,
)
from tui_trainer.ui.screens.experiments import ATTEMPTS, ExperimentsDialog


async def test_cost_of_an_experiment_is_shown_and_its_curves_are_drawn() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        await pilot.press("X")
        await until(pilot, lambda: session.inspected == [ReadTimeline()], "the dialog is open")
        await pilot.press("enter")
        await settle(pilot)
        assert "for example lr=3e-4" in text_of(app)
        await pilot.press("down", "enter")
        await until(pilot, lambda: "falls fastest at 0.01" in text_of(app), "it is answered")
        asked = FindLearningRate(1e-7, 1.0)
        assert session.inspected[-2:] == [EstimateCost(asked), asked]
        shown = text_of(app)
        assert "lr 1e-07" in shown
        assert "● loss" in shown
        await pilot.press("down")
        await settle(pilot)
        assert "against the gradient" in text_of(app)
        await pilot.press("escape")
        await settle(pilot)
        assert not isinstance(app.screen, ExperimentsDialog)


async def test_what_takes_long_is_confirmed_and_can_be_ended() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    changes = (SettingChange("lr", 1.0), SettingChange("clip", 2.0))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("X", *"lr=1 clip=2", "enter")
        await until(pilot, lambda: "enter again starts it" in text_of(app), "it is estimated")
        assert "100 steps in about 7 min, with 42.0 MB of memory" in text_of(app)
        assert session.inspected[-1] == EstimateCost(WhatIf(changes))
        session.hold_answers = True
        await pilot.press("enter")
        await settle(pilot)
        assert session.inspected[-1] == WhatIf(changes)
        await pilot.press("escape")
        await settle(pilot)
        assert session.inspected[-1] == ReadTimeline(), "another request takes its place"
        assert isinstance(app.screen, ExperimentsDialog)


async def test_a_running_script_is_asked_again_once_it_keeps_its_batches() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        await pilot.press("X", "down", "down")
        session.hold_answers = True
        dialog = app.screen
        assert isinstance(dialog, ExperimentsDialog)
        asked = MeasureLandscape("gradient", reach=1.0)
        dialog._asked = asked
        dialog._make(asked, "")
        for _ in range(ATTEMPTS):
            number = session.inspected.count(asked)
            early = Inspected(number, "failed", message=NOT_CAPTURED)
            session.held[-1].set_result(early)
            await until(
                pilot, lambda n=number: session.inspected.count(asked) == n + 1, "it asks again"
            )
        session.held[-1].set_result(early)
        await until(pilot, lambda: NOT_CAPTURED in text_of(app), "the reason")
        assert session.inspected.count(asked) == 1 + ATTEMPTS
