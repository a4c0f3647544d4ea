"""What the tests of the screens share: an app over a fake run, and what is on its screen."""

from __future__ import annotations

import time
from collections.abc import Callable

from textual.pilot import Pilot

from tests.ui.fake import FakeSession
from tui_trainer.ui.app import TuiTrainerApp

SIZES = ((80, 24), (120, 40), (200, 60))


def app_on(mode: str, session: FakeSession | None, *, ascii: bool = False) -> TuiTrainerApp:
    """The app with this screen in front."""
    return TuiTrainerApp(session, start_mode=mode, ascii=ascii)


def text_of(app: TuiTrainerApp) -> str:
    """All rows of the screen as plain text."""
    rows = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in rows)


async def settle(pilot: Pilot[int]) -> None:
    """Until everything that was asked for has been drawn."""
    for _ in range(3):
        await pilot.pause()


async def until(pilot: Pilot[int], holds: Callable[[], object], what: str) -> None:
    """Let the app run until `holds()` is true."""
    deadline = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        await pilot.pause(0.02)


async def frame(pilot: Pilot[int]) -> None:
    """Draw what the session has now."""
    assert isinstance(pilot.app, TuiTrainerApp)
    pilot.app.draw_frame()
    await settle(pilot)
