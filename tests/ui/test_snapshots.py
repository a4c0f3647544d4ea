"""The dashboard, held cell by cell; `pytest --snapshot-update` after a wanted change."""

from __future__ import annotations

import pytest

from tests.ui import fake
from tests.ui.pictures import Pictures
from tests.ui.screens import SIZES, settle
from tui_trainer.ui.app import TuiTrainerApp


def still(session, **options):
    """An app that draws only what it is asked to draw."""
    return TuiTrainerApp(session, frames_per_second=0.01, **options)


IN_THEME = {(80, 24): ("sixteen_colours", "ansi-dark"), (120, 40): ("light", "tui-trainer-light")}
"""Picture and theme at these sizes, besides the default theme."""


async def test_dashboard(snapshot, tmp_path):
    app = still(fake.fake_gpt(700))
    pictures = Pictures(snapshot, tmp_path)
    async with app.run_test(size=SIZES[0]) as pilot:
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await settle(pilot)
            pictures.compare_at(app, size)
            if size in IN_THEME:
                name, app.theme = IN_THEME[size]
                await settle(pilot)
                pictures.compare(app, name)
                app.theme = "tui-trainer"
    for size, (name, theme) in IN_THEME.items():
        app = still(fake.fake_gpt(700), theme_name=theme)  # opened in it, not switched to it
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            pictures.compare(app, name)
    app = still(fake.fake_gpt(700))
    async with app.run_test(size=SIZES[-1]) as pilot:
        await settle(pilot)
        pictures.compare_at(app, SIZES[-1])
    assert not pictures.differing


def test_dashboard_before_the_first_data(snap_compare):
    assert snap_compare(still(fake.fake_empty()), terminal_size=(120, 40))


def test_dashboard_paused_after_backward(snap_compare):
    session = fake.fake_gpt(700)
    for _ in range(5):
        session.phase()
    assert snap_compare(still(session), terminal_size=(120, 40))


def test_dashboard_not_a_number(snap_compare):
    assert snap_compare(still(fake.fake_non_finite()), terminal_size=(120, 40))


def test_dashboard_crashed(snap_compare):
    session = fake.fake_gpt(700)
    session.end("crashed", "RuntimeError: loss is nan", "try a lower learning rate")
    assert snap_compare(still(session), terminal_size=(80, 24))


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_dashboard_without_colour(snap_compare, size, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert snap_compare(still(fake.fake_gpt(700)), terminal_size=size)


def test_dashboard_in_ascii(snap_compare):
    assert snap_compare(still(fake.fake_gpt(700), ascii=True), terminal_size=(120, 40))
