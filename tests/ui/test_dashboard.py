from __future__ import annotations

import msgspec
import numpy as np
import pytest
from textual import events

from tests.ui import fake
from tests.ui.fake import FakeSession
from tests.ui.fake_run import describe, synthesise, with_unseen
from tests.ui.screens import frame, settle, until
from tui_trainer.protocol import PHASES, actions, schema
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.attention.overview import LayersTable, TrendChart
from tui_trainer.ui.panels.clipping import ClippingPanel
from tui_trainer.ui.panels.gradients import GradientsPanel
from tui_trainer.ui.panels.header import Banner, HeaderLine, ProgressLine
from tui_trainer.ui.panels.loss import LossPanel
from tui_trainer.ui.panels.phases import PhaseStrip
from tui_trainer.ui.panels.update_ratios import UpdatesPanel
from tui_trainer.ui.screens.dialogs import NumberPrompt, QuitDialog
from tui_trainer.ui.widgets.lines import LineView

SIZES = [(80, 24), (120, 40), (200, 60)]


def app_of(session: FakeSession | None, **options: object) -> TuiTrainerApp:
    return TuiTrainerApp(session, **options)


def screen_text(app: TuiTrainerApp) -> str:
    """All that is on the screen, as text."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


def drawn(app: TuiTrainerApp, kind: type[LineView]) -> str:
    widget = app.screen.query(kind).first()
    return "\n".join("".join(segment.text for segment in row) for row in widget._rows)


async def test_pause_stands_still_and_steps_are_counted():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("space")
        await pilot.pause()
        assert session.sent == [actions.Pause()]
        assert "paused" in drawn(pilot.app, HeaderLine)
        assert "300/2,000" in drawn(pilot.app, ProgressLine)
        await pilot.press("s", "s", "s")
        await pilot.pause()
        assert session.status.step == 303
        assert "303/2,000" in drawn(pilot.app, ProgressLine)
        await pilot.press("space")
        await pilot.pause()
        assert "running" in drawn(pilot.app, HeaderLine)


async def test_p_walks_through_the_phases_in_order_and_shows_what_each_produced():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("space")
        for phase in PHASES:
            await pilot.press("p")
            await pilot.pause()
            assert session.status.phase == phase
            assert f"after {phase}" in drawn(pilot.app, PhaseStrip)
        assert session.status.step == 301


async def test_time_between_the_phases_stands_below_them():
    run = synthesise(describe())
    between = np.array([6.0, np.nan, 0.5, 2.5])
    run.values[run.table(schema.PHASE_MS)][:] = [*np.full(len(PHASES), 2.0), *between]
    async with app_of(FakeSession(run, 300)).run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        last = drawn(pilot.app, PhaseStrip).splitlines()[-1]
        assert "eval 6.0 ms" in last
        assert "tracing 0.50 ms" in last
        assert "other 2.5 ms" in last
        assert "checkpoint" not in last


async def test_fresh_gradients_stand_in_the_table_after_backward():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        before = drawn(pilot.app, GradientsPanel)
        await pilot.press("space", *"ppppp")
        await pilot.pause()
        assert "this step" in drawn(pilot.app, GradientsPanel)
        assert drawn(pilot.app, GradientsPanel) != before
        await pilot.press("space")
        await pilot.pause()
        assert "this step" not in drawn(pilot.app, GradientsPanel)


async def test_a_refused_command_shows_the_reason_and_changes_nothing():
    session = fake.fake_gpt(300)
    session.refuse = "another viewer holds control"
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("s")
        await pilot.pause()
        assert any("another viewer" in note.message for note in pilot.app._notifications)
        assert session.status.step == 300


async def test_n_asks_for_a_count_and_throttle_for_a_speed():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("n")
        assert isinstance(pilot.app.screen, NumberPrompt)
        await pilot.press("2", "5", "enter")
        await pilot.pause()
        assert session.sent[-1] == actions.Step(25)
        assert session.status.step == 325
        await pilot.press("t", "4", "enter")
        await pilot.pause()
        assert session.sent[-1] == actions.Throttle(4.0)
        await pilot.press("t", "ctrl+u", "enter")
        await pilot.pause()
        assert session.sent[-1] == actions.Throttle(None)
        await pilot.press("n", "escape")
        await pilot.pause()
        assert session.sent[-1] == actions.Throttle(None)


async def test_a_note_at_this_step():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("a", *"odd", "enter")
        await pilot.pause()
        assert session.sent == [actions.Mark("odd")]
        await pilot.press("a", "enter")
        await pilot.pause()
        assert session.sent == [actions.Mark("odd")]


async def test_run_to_the_end_of_the_epoch():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("e")
        await pilot.pause()
        assert session.sent == [actions.RunToEpochEnd()]
        assert "600" in drawn(pilot.app, HeaderLine)


async def test_filter_sort_and_fold():
    async with app_of(fake.fake_gpt(300)).run_test(size=(120, 40)) as pilot:
        table = pilot.app.screen.query_one(GradientsPanel)
        await pilot.press("slash", *"mlp")
        await pilot.pause()
        assert len(table.order) == 8
        await pilot.press("enter", "o")
        await pilot.pause()
        norms = [table._norms[row] for row in table.order]
        assert table.sort_key == "norm"
        assert len(norms) == 8
        await pilot.press("o")
        names = [table.name_tree.names[row] for row in table.order]
        assert names == sorted(names)
        await pilot.press("escape", "o")
        await pilot.pause()
        assert table.sort_key == "model"
        rows = len(table.order)
        await pilot.press("home", "down", "down", "enter")
        await pilot.pause()
        assert len(table.order) < rows


async def test_log_scale_window_and_trend_keys():
    async with app_of(fake.fake_gpt(1500)).run_test(size=(120, 40)) as pilot:
        assert "whole run" in drawn(pilot.app, LossPanel)
        await pilot.press("l", "w")
        await pilot.pause()
        assert "log · last 1,000" in drawn(pilot.app, LossPanel)
        await pilot.press("L", "m")
        await pilot.pause()
        assert drawn(pilot.app, TrendChart).startswith("cos")
        assert "log" in drawn(pilot.app, ClippingPanel).splitlines()[0]


@pytest.mark.parametrize(
    "make",
    [fake.fake_empty, fake.fake_one_point, fake.fake_non_finite, fake.fake_extremes, fake.fake_vit],
)
@pytest.mark.slow
async def test_every_state_is_drawn_at_every_size(make):
    session = make()
    async with app_of(session).run_test(size=SIZES[0]) as pilot:
        for size in SIZES:  # sorted and scaled otherwise at each
            session.send(actions.Resume())
            await pilot.resize_terminal(*size)
            await pilot.press("l", "L", "space", "p", "o", "w", "m", "l", "L")
            await pilot.pause()
            assert "####" not in screen_text(pilot.app)
            if size[0] == 80:
                for _ in range(4):
                    await pilot.press("right")
                    await pilot.pause()
                    assert "####" not in screen_text(pilot.app)


async def test_before_the_first_data_empty_panels_show_the_awaited_data():
    session = fake.fake_empty()
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        text = screen_text(pilot.app)
        for title in ("Loss", "Gradients", "Clipping", "Attention"):
            assert title in text
        assert "importing torch" in text


async def test_without_any_session_keys_are_safe():
    async with app_of(None).run_test(size=(120, 40)) as pilot:
        await pilot.press("space", "s", "p", "e", "o", "l", "w", "m", "slash", "x", "escape")
        await pilot.pause()
        assert "Loss" in screen_text(pilot.app)


async def test_unseen_quantities_are_reported():
    session = fake.fake_gpt(0)
    info = with_unseen(session.run.info, clip="this script never clips", loss="no loss seen")
    session.run.info = info
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        text = screen_text(pilot.app)
        assert "this script never clips" in text
        assert "no loss seen" in text


async def test_script_has_no_empty_panels_before_it_is_known_what_it_does():
    """Its learning rate and updates stand where clipping and attention would be; they appear once
    the script clips and has attention layers."""
    session = fake.fake_gpt(0)
    known = session.run.info
    session.run.info = msgspec.structs.replace(known, task="script", attention=())
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        text = screen_text(pilot.app)
        for title in (" Loss ", " Gradient norm ", " Learning rate ", " Gradients ", " Updates "):
            assert title in text
        assert "Clipping" not in text
        assert "Attention  Wq" not in text
        session.run.info = msgspec.structs.replace(known, task="script")
        session.advance(30)
        await frame(pilot)
        text = screen_text(pilot.app)
        assert " Clipping " in text
        assert " Attention  Wq" in text


async def test_not_a_number_is_marked():
    async with app_of(fake.fake_non_finite(201)).run_test(size=(120, 40)) as pilot:
        assert "nan" in drawn(pilot.app, LossPanel).splitlines()[0]
        assert "×" in drawn(pilot.app, LossPanel).splitlines()[-1]
        assert "nan" in drawn(pilot.app, GradientsPanel)


async def test_panels_fold_into_tabs_and_unfold_on_resize():
    async with app_of(fake.fake_gpt(300)).run_test(size=(80, 24)) as pilot:
        screen = pilot.app.screen
        shown = lambda: [  # noqa: E731
            kind.__name__
            for kind in (LossPanel, GradientsPanel, ClippingPanel, UpdatesPanel, LayersTable)
            if screen.query(kind).first().is_on_screen
        ]
        await pilot.pause()
        assert shown() == ["LossPanel"]
        for name in ("GradientsPanel", "ClippingPanel", "UpdatesPanel", "LayersTable"):
            await pilot.press("right")
            await pilot.pause()
            assert shown() == [name]
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: len(shown()) == 4, "four panels")
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: shown() == ["LayersTable"], "one panel")


async def test_a_too_small_terminal_shows_a_message_and_recovers():
    async with app_of(fake.fake_gpt(300)).run_test(size=(120, 40)) as pilot:
        await pilot.resize_terminal(20, 5)
        await pilot.pause()
        assert screen_text(pilot.app).split("\n")[0].strip() == "needs at least 40×10"
        assert "Loss" not in screen_text(pilot.app)
        await pilot.press("s", "q", "escape")
        await pilot.resize_terminal(120, 40)
        await pilot.pause()
        assert "Loss" in screen_text(pilot.app)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.end("crashed", "RuntimeError: shapes", "see the log"), "RuntimeError: shapes"),
        (lambda s: s.end("finished", "all steps made"), "finished after 300 steps"),
        (lambda s: s.lose_link(), "connection lost"),
    ],
)
async def test_the_end_and_a_lost_link_keep_the_history(change, expected):
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        assert not pilot.app.screen.query_one(Banner).display
        change(session)
        pilot.app.draw_frame()
        await until(pilot, lambda: expected in drawn(pilot.app, Banner), f"{expected} is shown")
        assert "train" in drawn(pilot.app, LossPanel)


async def test_quit_asks_detaches_and_stops():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("q")
        assert isinstance(pilot.app.screen, QuitDialog)
        await pilot.press("escape")
        assert not isinstance(pilot.app.screen, QuitDialog)
        await pilot.press("x", "c")
        await pilot.pause()
        assert session.sent == [actions.Stop(checkpoint=True)]
    assert session.closed
    assert pilot.app.return_code == 0


async def test_quit_detaches_without_a_word_to_the_run():
    session = fake.fake_gpt(300)
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("q", "enter")
        await pilot.pause()
    assert session.sent == []
    assert session.closed


async def test_quit_after_the_end_just_quits():
    session = fake.fake_gpt(300)
    session.end("finished", "all steps made")
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("q")
        await pilot.pause()
        assert not pilot.app.is_running or pilot.app.return_code == 0


async def test_steering_keys_are_dim_once_the_run_has_ended():
    session = fake.fake_gpt(300)
    session.end("crashed", "boom")
    async with app_of(session).run_test(size=(120, 40)) as pilot:
        await pilot.press("s", "space")
        await pilot.pause()
        assert session.sent == []


async def test_an_unchanged_frame_draws_nothing():
    session = fake.fake_gpt(300)
    async with app_of(session, frames_per_second=0.01).run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        calls = []
        for panel in pilot.app.screen.query(LineView):
            panel.update_rows = lambda panel=panel: calls.append(panel)
        pilot.app.draw_frame()
        assert calls == []
        session.advance(1)
        pilot.app.draw_frame()
        assert calls


async def test_only_what_changed_is_refreshed():
    session = fake.fake_gpt(300)
    async with app_of(session, frames_per_second=0.01).run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        refreshed = []
        header = pilot.app.screen.query_one(HeaderLine)
        progress = pilot.app.screen.query_one(ProgressLine)
        header.refresh = lambda *regions, **_: refreshed.append(("header", regions))
        progress.refresh = lambda *regions, **_: refreshed.append(("progress", regions))
        session.advance(1)
        pilot.app.draw_frame()
        assert [name for name, _ in refreshed] == ["progress"]
        cells = sum(region.width for region in refreshed[0][1])
        assert cells < 60


@pytest.mark.slow
async def test_ten_thousand_parameters_build_only_visible_rows():
    async with app_of(fake.fake_large(10_000, 20)).run_test(size=(120, 40)) as pilot:
        table = pilot.app.screen.query_one(GradientsPanel)
        built = []
        cells = table.cells
        table.cells = lambda row, *rest: built.append(row) or cells(row, *rest)
        await pilot.press("end")
        await pilot.pause()
        assert table.cursor == len(table.order) - 1
        assert 0 < len(built) <= 4 * table.page
        await pilot.press("slash", *"1234")
        await pilot.pause()
        assert 0 < len(table.order) < 100


async def test_mouse_wheel_and_clicks():
    async with app_of(fake.fake_gpt(300)).run_test(size=(120, 40)) as pilot:
        table = pilot.app.screen.query_one(GradientsPanel)
        await pilot.click(GradientsPanel, offset=(4, 5))
        await pilot.pause()
        assert table.cursor == 3
        await pilot.click(GradientsPanel, offset=(40, 1))
        await pilot.pause()
        assert table.sort_key == "norm"
        top = table.top
        await pilot._post_mouse_events([events.MouseScrollDown], table)
        await pilot.pause()
        assert table.top > top


def backgrounds(app: TuiTrainerApp) -> set[str]:
    return {
        segment.style.bgcolor.name
        for strip in app.screen._compositor.render_strips()
        for segment in strip
        if segment.style and segment.style.bgcolor
    }


async def test_a_change_of_theme_recolours_everything():
    async with app_of(fake.fake_gpt(300)).run_test(size=(120, 40)) as pilot:
        pilot.app.theme = "tui-trainer-light"
        await pilot.pause()
        assert "#11151c" not in backgrounds(pilot.app)


async def test_a_change_of_theme_recolours_the_screens_behind():
    async with app_of(fake.fake_gpt(300)).run_test(size=(120, 40)) as pilot:
        assert "#11151c" in backgrounds(pilot.app)
        await pilot.press("3")
        await pilot.pause()
        pilot.app.theme = "tui-trainer-light"
        await pilot.pause()
        await pilot.press("1")
        await pilot.pause()
        await until(pilot, lambda: pilot.app.current_mode == "dashboard", "the dashboard")
        await settle(pilot)
        assert "#11151c" not in backgrounds(pilot.app)


async def test_ascii_mode_draws_nothing_but_ascii():
    app = app_of(fake.fake_gpt(300), ascii=True)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("space", "p", "n")
        await pilot.pause()
        assert screen_text(app).isascii()
