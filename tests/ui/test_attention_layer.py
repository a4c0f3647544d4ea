"""The inspector of an attention layer: what it asks for and when, what it shows, and its keys."""

from __future__ import annotations

import itertools

import pytest

from tests.ui.fake import FakeSession, fake_gpt, fake_vit
from tests.ui.screens import SIZES, app_on, frame, settle, text_of, until
from tui_trainer.protocol.actions import Pause
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.inspection import NOT_CAPTURED, Inspected
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.glyphs import ASCII, UNICODE
from tui_trainer.ui.lessons import lessons_for
from tui_trainer.ui.panels.attention.query_table import QueryTable, fine_bar
from tui_trainer.ui.screens.attention import AttentionScreen
from tui_trainer.ui.screens.attention_layer import TABS, AttentionLayerScreen

LAYER = "blocks.1.attention"


def paused_app(
    session: FakeSession | None = None, *, images: bool = False, ascii: bool = False
) -> tuple[TuiTrainerApp, FakeSession]:
    session = session or fake_gpt()
    session.send(Pause())
    session.tensors.images = images
    return app_on("attention", session, ascii=ascii), session


def asked(session: FakeSession) -> list[ExamineAttention]:
    return [each for each in session.inspected if isinstance(each, ExamineAttention)]


async def opened(pilot, app: TuiTrainerApp) -> AttentionLayerScreen:
    """Enter on the second layer."""
    await settle(pilot)
    await pilot.press("down", "enter")
    await until(pilot, lambda: isinstance(app.screen, AttentionLayerScreen), "the screen")
    screen = app.screen
    assert isinstance(screen, AttentionLayerScreen)
    await until(pilot, lambda: screen.found is not None, "an answer")
    await settle(pilot)
    return screen


async def test_every_view_at_every_size():
    app, _ = paused_app()
    async with app.run_test(size=SIZES[0]) as pilot:
        screen = await opened(pilot, app)
        for size, tab in itertools.product((*SIZES, (40, 10)), TABS):
            if tab == TABS[0]:
                await pilot.resize_terminal(*size)
            assert screen.tab == tab
            await settle(pilot)
            shown = text_of(app)
            if size[0] >= 80:
                assert f"{LAYER}  head 0 of 4  query 47 of 48  a" in shown
                assert "checked  within" in shown
                for part in {
                    "map": ("Weights  queries 0–47  keys 0–47",),
                    "input": ("The yield statement is only used when⏎",),
                    "query": ("q·k", "angle", "score", "of 3.871 nats"),
                    "heads": ("cos qk", "Singular values", "Angles between the row spaces"),
                    "residual": ("token_embedding (start)", "head 3", "logit of the target ‘"),
                }[tab]:
                    assert part in shown
            await pilot.press("m")
            await until(pilot, lambda: screen.found is not None, "an answer")


async def test_keys_choose_the_head_the_query_the_example_and_the_layer():
    app, session = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        screen = await opened(pilot, app)
        await pilot.press("h", "h", "i", "left", "left")
        await settle(pilot)
        found = screen.found
        assert (found.head, found.sample, found.query) == (2, 1, 45)
        await pilot.press("right_square_bracket")
        await settle(pilot)
        assert (screen.found.layer, screen.found.head) == ("blocks.2.attention", 2)
        assert asked(session)[-1].query == 45
        keys = screen.query_one(QueryTable)
        assert keys.current_row == 45
        await pilot.press("up", "up", "enter")
        await settle(pilot)
        assert screen.found.query == 43
        await pilot.press("o")
        await settle(pilot)
        weights = [row.weight for row in keys._keys]
        assert keys.order[0] == weights.index(max(weights))
        await pilot.press("plus")
        await settle(pilot)
        assert screen.found.map.row_to - screen.found.map.row_from == 24
        await pilot.press("f", "y", *"7", "enter")
        await settle(pilot)
        assert screen.found.map.row_to == 48
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(app.screen, AttentionScreen)


async def test_only_what_a_view_needs_is_asked_for():
    app, session = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        screen = await opened(pilot, app)
        assert asked(session)[-1].window is not None
        assert (asked(session)[-1].weights, asked(session)[-1].residual) == (False, False)
        await pilot.press("m", "m", "m")
        await settle(pilot)
        assert screen.tab == "heads"
        assert (asked(session)[-1].weights, asked(session)[-1].window) == (True, None)
        await pilot.press("m")
        await settle(pilot)
        assert asked(session)[-1].residual
        before = len(session.inspected)
        for _ in range(3):
            await frame(pilot)
        assert len(session.inspected) == before
        session.advance(1)
        await frame(pilot)
        await until(pilot, lambda: len(session.inspected) > before, "another request")


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=str)
async def test_patches_of_an_image(size):
    app, _ = paused_app(fake_vit(), images=True)
    async with app.run_test(size=size) as pilot:
        screen = await opened(pilot, app)
        await pilot.press("m")
        await settle(pilot)
        shown = text_of(app)
        assert "query 16 of 17  row 3, col 3" in shown
        assert "Image  query patch 15" in shown
        assert "weight of the class token" in shown
        assert screen.found.grid.first == 1


async def test_in_ascii():
    app, _ = paused_app(ascii=True)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(pilot, app)
        for _ in TABS:
            await pilot.press("m")
            await settle(pilot)
        assert screen.found is not None
    assert fine_bar(1.0, UNICODE) == "█" * 12
    assert fine_bar(0.01, UNICODE) == "▏"
    assert fine_bar(0.5, ASCII) == "=" * 6


async def test_missing_answers_have_a_reason():
    app, session = paused_app()
    session.hold_answers = True
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: asked(session), "a request")
        session.held[-1].set_result(
            Inspected(1, "failed", message=NOT_CAPTURED, hint="step and ask again")
        )
        await until(pilot, lambda: NOT_CAPTURED in text_of(app), "the reason")
        assert "step and ask again" in text_of(app)
        session.end("finished", "all steps made")
        await frame(pilot)
        assert app.is_running


async def test_each_view_leads_to_the_page_about_it():
    app, session = paused_app()
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(pilot, app)
        for tab, page in (("map", "attention-scores"), ("heads", "qkv"),
                          ("residual", "residual-stream")):  # fmt: skip
            screen._choose(TABS.index(tab))
            await settle(pilot)
            names = lessons_for(screen, session.status)
            assert next(name for name in names if name != "updates") == page


async def test_a_run_that_is_running_is_asked_again_until_it_has_kept_a_batch():
    session = fake_gpt()
    session.hold_answers = True
    app = app_on("attention", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: asked(session), "a request")
        session.hold_answers = False
        session.held[-1].set_result(Inspected(1, "failed", message=NOT_CAPTURED))
        screen = app.screen
        assert isinstance(screen, AttentionLayerScreen)
        await until(pilot, lambda: screen.found is not None or _advanced(session), "an answer")
        assert screen.found is not None


def _advanced(session: FakeSession) -> bool:
    """Make a step, so that the screen is drawn again."""
    if session.status.step < 390:
        session.advance(1)
    return False
