"""The line of screens: their keys and titles, the one in front, and the number of findings."""

from __future__ import annotations

import pytest

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, text_of
from tests.ui.test_findings import finding
from tui_trainer.ui.screens import SCREENS
from tui_trainer.ui.screens.screen_tabs import ScreenTabs


def line_of(app: object) -> str:
    return text_of(app).splitlines()[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["dashboard", "attention", "parameters", "samples", "log"])
async def test_every_screen_shows_the_keys_of_all(mode: str) -> None:
    app = app_on(mode, fake_gpt(300))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        line = line_of(app)
        for entry in SCREENS:
            if entry.mode not in ("help", "start", "ranks", "learn", "autograd"):
                assert f"{entry.key} {entry.title}" in line


async def test_titles_give_way_on_a_narrow_terminal() -> None:
    app = app_on("parameters", fake_gpt(300))
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        assert "1 Dash " in line_of(app)
        await pilot.resize_terminal(42, 12)
        await frame(pilot)
        assert "3 Params" in line_of(app)
        assert "Dash" not in line_of(app)
        assert " 1 " in line_of(app)


async def test_findings_are_counted() -> None:
    session = fake_gpt(300)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        assert "8 Findings  0 Inspect" in line_of(app)
        finding(session)
        finding(session, 1, level="error", title="nan or inf", onset=125)
        await frame(pilot)
        assert "8 Findings 2  0 Inspect" in line_of(app)


async def test_a_click_switches() -> None:
    app = app_on("dashboard", fake_gpt(300))
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        await pilot.click(ScreenTabs, offset=(line_of(app).index("3 Params") + 2, 0))
        await frame(pilot)
        assert app.current_mode == "parameters"
