"""The dialog of the breakpoints, and the screen while the run is paused at one."""

from __future__ import annotations

from textual import events
from textual.keys import _character_to_key

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of
from tui_trainer.protocol.actions import AddBreakpoint, ChangeBreakpoint, DeleteBreakpoint
from tui_trainer.protocol.messages import BreakpointStop
from tui_trainer.ui.panels.gradients import GradientsPanel
from tui_trainer.ui.screens.breakpoints import BreakpointsDialog


async def test_breakpoints_are_added_switched_and_deleted() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        await pilot.press("b")
        await settle(pilot)
        assert isinstance(app.screen, BreakpointsDialog)
        await pilot.press(*"losss > 3")
        await pilot.press("enter")
        await settle(pilot)
        shown = text_of(app)
        assert "there is no quantity losss" in shown
        assert "^^^^^" in shown
        assert "did you mean loss?" in shown
        assert session.sent == []
        await pilot.press("ctrl+u", *"clip.sca")
        await settle(pilot)
        await pilot.press("right", *" < 0.1", "enter")
        await frame(pilot)
        assert session.sent == [AddBreakpoint("clip.scale < 0.1")]
        assert "clip.scale < 0.1   0 hits" in text_of(app)
        await pilot.press("up", "space")
        await frame(pilot)
        assert session.sent[-1] == ChangeBreakpoint(1, enabled=False)
        assert "0 hits, off" in text_of(app)
        await pilot.press("i")
        await settle(pilot)
        assert "Ignore how many hits of clip.scale < 0.1" in text_of(app)
        await pilot.press(*"12", "enter")
        await frame(pilot)
        assert session.sent[-1] == ChangeBreakpoint(1, ignore=12)
        assert "0 hits, off, ignores 12 more" in text_of(app)
        await pilot.press("i", "ctrl+u", "enter")
        await frame(pilot)
        assert session.sent[-1] == ChangeBreakpoint(1, ignore=0)
        await pilot.press("d")
        await frame(pilot)
        assert session.sent[-1] == DeleteBreakpoint(1)
        assert "hits" not in text_of(app)
        await pilot.press("escape")
        await settle(pilot)
        assert not isinstance(app.screen, BreakpointsDialog)


async def test_the_header_says_why_the_run_is_paused_and_the_cursor_is_on_the_culprit() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    name = "blocks.2.attention.W_key.weight"
    async with app.run_test(size=(160, 50)) as pilot:
        await frame(pilot)
        stop = BreakpointStop(2, "grad_norm(any) > 3", 20, "backward", f"grad_norm of {name} 3.2",
                              name, "grad_norm")  # fmt: skip
        session._status(state="paused", phase="backward", reason=stop.reason, stopped_at=stop)
        session._changed()
        await frame(pilot)
        first = text_of(app).splitlines()[0]
        assert "paused   at breakpoint 2: grad_norm(any) > 3 (grad_norm of" in first
        panel = app.screen.query_one(GradientsPanel)
        assert panel.current_row == panel.name_tree.names.index(name)


async def test_a_small_terminal_shows_the_tab_of_the_culprit() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    name = "blocks.2.attention.W_key.weight"
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        panel = app.screen.query_one(GradientsPanel)
        assert not panel.display
        stop = BreakpointStop(
            1, "nonfinite", 20, "step", f"gradient nan in {name}", name, "grad_norm"
        )
        session._status(state="paused", phase="step", reason=stop.reason, stopped_at=stop)
        session._changed()
        await frame(pilot)
        await settle(pilot)
        assert panel.display
        assert panel.current_row == panel.name_tree.names.index(name)


async def test_keys_that_come_in_one_piece_take_effect_in_their_order() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        await pilot.press("b")
        await settle(pilot)
        await pilot.press(*"loss >> 1", "enter")
        await settle(pilot)
        for key in ("ctrl+u", *"loss>5", "enter"):
            name = _character_to_key(key) if len(key) == 1 else key
            app.post_message(events.Key(name, key if len(key) == 1 else None))
        await frame(pilot)
        await settle(pilot)
        assert session.sent == [AddBreakpoint("loss>5")]
