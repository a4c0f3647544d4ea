"""The dialog of the timeline."""

from __future__ import annotations

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of, until
from tui_trainer.protocol.actions import Back, KeepSnapshots, Step
from tui_trainer.ui.screens.timeline import TimelineDialog


async def test_the_timeline_goes_to_any_step() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        await pilot.press("comma")
        await settle(pilot)
        assert session.sent == [Back()]
        await pilot.press("T")
        await until(pilot, lambda: "4 snapshots, 42.0 MB of 512.0 MB" in text_of(app), "it is read")
        assert isinstance(app.screen, TimelineDialog)
        assert "16    snapshot, checkpoint" in text_of(app)
        assert "12    snapshot, lr=0.0003 clip=0.5" in text_of(app)
        await pilot.press("down", "down", "enter")
        await settle(pilot)
        assert session.sent[-1] == Back(12)
        await pilot.press("left", "right")
        await settle(pilot)
        assert session.sent[-2:] == [Back(), Step(1)]
        await pilot.press("tab", *"7", "enter", *"256MB", "enter", *"much", "enter")
        await settle(pilot)
        assert session.sent[-2:] == [Back(7), KeepSnapshots(256 << 20)]
        assert "'much' is not an amount of memory" in text_of(app)
        await pilot.press("escape")
        await settle(pilot)
        assert not isinstance(app.screen, TimelineDialog)
