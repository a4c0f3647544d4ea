"""The dialog of the settings of a live run."""

from __future__ import annotations

from textual import events

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of, until
from tui_trainer.protocol.actions import Branch, ChangeSettings, UndoSettings
from tui_trainer.protocol.settings import ReadSettings, SettingChange
from tui_trainer.ui.screens.experiments import ExperimentsDialog
from tui_trainer.ui.screens.settings import SettingsDialog


async def test_settings_are_shown_changed_and_undone() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        await pilot.press("E")
        await until(pilot, lambda: "cosine schedule" in text_of(app), "the settings are shown")
        assert isinstance(app.screen, SettingsDialog)
        assert "6 parameters frozen, ctrl+z undoes the last of 1 change" in text_of(app)
        await pilot.press(*"rl=3e-4", "enter")
        await settle(pilot)
        assert "there is no setting 'rl'" in text_of(app)
        assert session.sent == []
        await pilot.press("ctrl+u", *"lr=fast", "enter")
        await settle(pilot)
        assert "lr cannot be 'fast'" in text_of(app)
        await pilot.press("up", "home", "enter")
        await settle(pilot)
        assert "lr=0.0006" in text_of(app)
        await pilot.press(*"3e-4", "enter")
        await frame(pilot)
        assert session.sent == [ChangeSettings((SettingChange("lr", 3e-4),))]
        await until(
            pilot,
            lambda: session.inspected == [ReadSettings()] * 2,
            "the settings are read again after the change",
        )
        await pilot.press(*"clip=0.5", "ctrl+o")
        await until(pilot, lambda: "instead of 0.8133" in text_of(app), "what if is answered")
        assert isinstance(app.screen, ExperimentsDialog)
        assert "◆ clip=0.5 0.4" in text_of(app)
        await pilot.press("escape", "ctrl+b")
        await settle(pilot)
        assert session.sent[-1] == Branch((SettingChange("clip", 0.5),))
        for key in ("ctrl+u", *"lr=1", "ctrl+b"):  # as fast as a terminal or ssh may send them
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        await until(pilot, lambda: session.sent[-1] == Branch((SettingChange("lr", 1.0),)), "lr=1")
        await pilot.press("ctrl+u", "ctrl+o")
        await until(pilot, lambda: "type a change first" in text_of(app), "why not")
        await pilot.press("ctrl+z")
        await frame(pilot)
        assert session.sent[-1] == UndoSettings()
        await pilot.press("escape")
        await settle(pilot)
        assert not isinstance(app.screen, SettingsDialog)


async def test_a_run_that_answers_nothing_leaves_the_dialog_usable() -> None:
    session = fake_gpt(steps=20)
    session.hold_answers = True
    app = app_on("dashboard", session)
    async with app.run_test(size=(40, 12)) as pilot:
        await frame(pilot)
        await pilot.press("E", *"clip=off", "enter")
        await settle(pilot)
        assert session.sent == [ChangeSettings((SettingChange("clip", float("inf")),))]
