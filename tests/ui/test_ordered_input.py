"""Input fields: keys that arrive in one piece take effect in the order in which they were typed."""

from __future__ import annotations

import pytest
from textual import events
from textual.keys import _character_to_key
from textual.widgets import Input

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, until
from tui_trainer.ui.screens import ScreenMode


@pytest.mark.parametrize(
    ("screen", "key"),
    [
        ("dashboard", "slash"),
        ("parameters", "slash"),
        ("log", "slash"),
        ("dashboard", "E"),
        ("dashboard", "T"),
        ("dashboard", "X"),
        ("dashboard", "b"),
        ("dashboard", "a"),
    ],
)
async def test_a_line_is_cleared_before_what_follows_is_typed(screen: ScreenMode, key: str) -> None:
    app = app_on(screen, fake_gpt(steps=20))
    async with app.run_test(size=(100, 30)) as pilot:
        await frame(pilot)
        await pilot.press(key)
        await settle(pilot)
        if key == "T":  # its list has the focus
            app.screen.query_one(Input).focus()
        await until(pilot, lambda: isinstance(app.focused, Input), "the field has the focus")
        field = app.focused
        assert isinstance(field, Input)
        for typed in (*"old text", "ctrl+u", *"loss", "home", "delete", *"c", "end", *"es"):
            name = _character_to_key(typed) if len(typed) == 1 else typed
            app.post_message(events.Key(name, typed if len(typed) == 1 else None))
        await until(pilot, lambda: field.value == "cosses", "every key has its effect")
