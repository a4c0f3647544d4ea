"""What is on the screen, cell by cell: text has at least 4.5:1 with its background, also in the
parts that Textual's own widgets draw."""

from __future__ import annotations

import pytest
from textual.color import Color

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, settle
from tests.ui.test_start import Started, app_with
from tui_trainer.ui import theme
from tui_trainer.ui.app import TuiTrainerApp

MARKS = range(0x2500, 0x2900)
"""Lines, blocks and braille are no text."""


def hard_to_read(app: TuiTrainerApp) -> list[tuple[str, float]]:
    """(text, contrast) of text below 4.5:1; where a dialog is open, only of the dialog."""
    dialogs = app.screen.query(".dialog, CommandPalette > Vertical")
    part = dialogs.first().region if dialogs else app.screen.region
    found = []
    for y, strip in enumerate(app.screen._compositor.render_strips()):
        if not part.y <= y < part.bottom:
            continue
        for segment in strip.crop(part.x, part.right):
            style, text = segment.style, segment.text.strip()
            if style is None or style.color is None or style.bgcolor is None:
                continue
            if all(ord(character) in MARKS for character in text if character != " "):
                continue
            ratio = theme.contrast(
                Color.from_rich_color(style.color), Color.from_rich_color(style.bgcolor)
            )
            if ratio < 4.49:
                found.append((text, ratio))
    return found


@pytest.mark.parametrize("name", [each.name for each in theme.THEMES])
async def test_text_of_every_screen_and_dialog_can_be_read(name):
    app = app_on("dashboard", fake_gpt(300))
    async with app.run_test(size=(120, 40)) as pilot:
        app.theme = name
        for keys in ("2", "3", "4", "5", "8", "0", "/", "escape", "1", "n", "escape", "b"):
            await pilot.press(keys)
            await settle(pilot)
            assert hard_to_read(app) == [], f"after {keys}"


@pytest.mark.parametrize("name", [each.name for each in theme.THEMES])
async def test_text_of_the_start_form_can_be_read(name):
    app = app_with(Started())
    async with app.run_test(size=(120, 40)) as pilot:
        app.theme = name
        await settle(pilot)
        assert hard_to_read(app) == []
