"""Values outside their healthy band are coloured on every screen, and the band is in words."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.rows import step_row
from tests.ui.fake import FakeSession, fake_gpt, fake_non_finite
from tests.ui.fake_run import describe, synthesise
from tests.ui.screens import app_on, frame, text_of
from tui_trainer.history.healthy_ranges import limit_text
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import Skipped
from tui_trainer.protocol.messages import PhaseReport, Quantity
from tui_trainer.ui.app import TuiTrainerApp

LARGE, SMALL = 3, 5
"""Parameters whose updates are too large and too small."""


def run_of_unhealthy_updates(**unseen: str) -> FakeSession:
    run = synthesise(describe())
    values = run.values[run.table(schema.UPDATE_RATIO)]
    values[:, LARGE], values[:, SMALL] = 0.31, 2e-6
    run.info = msgspec.structs.replace(run.info, unseen={**run.info.unseen, **unseen})
    return FakeSession(run, 300)


def style_of(app: TuiTrainerApp, text: str) -> object:
    """The colour of the first place where `text` is on the screen."""
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            if text in segment.text:
                return segment.style.color
    raise AssertionError(f"{text!r} is not on the screen")


async def test_a_clipping_of_scaled_gradients_shows_both_norms_and_the_scale() -> None:
    run = synthesise(describe())
    norms = run.values[run.table(schema.STEP)]
    clips = run.values[run.table(schema.CLIP)]
    norms[:, 2] = 1.477
    clips[:] = (1.0, 96_821.0, 1.0, 1 / 96_821, 65_536.0)
    app = app_on("dashboard", FakeSession(run, 300))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        text = text_of(app)
    assert "norm   1.48  clip saw 96821  loss scale 65536" in text
    assert "healthy" not in next(line for line in text.split("\n") if "clip saw" in line)


async def test_parameters_colour_updates_and_say_why() -> None:
    session = run_of_unhealthy_updates()
    app = app_on("parameters", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert "2 updates outside 1e-4 to 0.1" in text_of(app)
        assert style_of(app, "3.10e-01") == app.palette.warning.color
        assert style_of(app, "2.00e-06") == app.palette.warning.color
        await pilot.press(*["down"] * LARGE)
        await frame(pilot)
        assert "update above the healthy 1e-4 to 0.1" in text_of(app)


async def test_a_run_without_attention_shows_its_updates_instead() -> None:
    session = run_of_unhealthy_updates(attention="no attention layer was found", clip="not clipped")
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        text = text_of(app)
        assert "moved most" in text
        assert "healthy 1e-4 to 0.1" in text
        assert style_of(app, "3.10e-01") == app.palette.warning.color
        assert "Learning rate" in text
        assert "Gradient norm" in text
        assert "dominated by" not in text
        assert not app.screen.query_one("#attention").display


async def test_a_run_with_attention_shows_updates_where_there_is_room() -> None:
    app = app_on("dashboard", fake_gpt(300))
    async with app.run_test(size=(200, 60)) as pilot:
        await frame(pilot)
        for panel in ("updates", "attention", "learning-rate"):
            assert app.screen.query_one(f"#{panel}").display
        await pilot.resize_terminal(120, 40)
        await frame(pilot)
        assert not app.screen.query_one("#updates").display
        assert app.screen.query_one("#attention").display


async def test_an_attention_value_outside_its_band_is_coloured() -> None:
    run = synthesise(describe())
    table = run.table(schema.ATTENTION)
    columns = [column.name for column in run.info.tables[table].columns]
    run.values[table][:, columns.index("blocks.0.attention.growth")] = 420
    app = app_on("attention", FakeSession(run, 300))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("m", "m", "m", "m", "m")  # growth
        await frame(pilot)
        assert "1 value outside" in text_of(app)
        assert style_of(app, "420") == app.palette.warning.color


async def test_the_state_is_red_while_the_loss_is_not_finite() -> None:
    session = fake_non_finite(201)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert "loss is nan" in text_of(app).splitlines()[0]
        assert style_of(app, "running") == app.palette.error.color
        session.advance(10)
        await frame(pilot)
        assert "loss is" not in text_of(app).splitlines()[0]
        assert style_of(app, "running") == app.palette.good.color


async def test_the_state_is_red_while_iterations_with_such_a_loss_are_skipped() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        row = step_row(np.nan, 1e-3, np.nan, 10.0).tobytes()
        table = session.run.table(schema.STEP)
        session.events.append(
            Skipped(len(session.events), 21, 0.0, "scaler", "skipped", rows=((table, row),))
        )
        session._changed()
        await frame(pilot)
        assert "loss is nan" in text_of(app).splitlines()[0]
        assert style_of(app, "running") == app.palette.error.color
        session.advance(1)
        await frame(pilot)
        assert style_of(app, "running") == app.palette.good.color


async def test_an_iteration_that_was_skipped_before_going_back_is_no_loss_of_now() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        row = step_row(np.nan, 1e-3, np.nan, 10.0).tobytes()
        rows = ((session.run.table(schema.STEP), row),)
        session.events.append(Skipped(len(session.events), 80, 0.0, "scaler", "skipped", rows=rows))
        session._changed()
        await frame(pilot)
        assert "loss is" not in text_of(app).splitlines()[0]


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1e-3, "moves each parameter a little"), (0.4, "updates above the healthy"), (np.nan, "")],
)
async def test_the_report_of_an_update_says_what_is(ratio: float, said: str) -> None:
    session = fake_gpt(300)
    session.phase()
    quantity = Quantity("update ratio of head.weight", float(ratio), "")
    session.report = PhaseReport(301, "step", 1.0, "step 301 is complete", (quantity,), ())
    app = app_on("dashboard", session)
    async with app.run_test(size=(160, 40)) as pilot:
        await frame(pilot)
        text = text_of(app)
        assert said in text
        assert ("a little" in text) == (ratio == 1e-3)


async def test_a_norm_and_a_scale_that_are_not_healthy_say_so() -> None:
    run = synthesise(describe())
    norms = run.values[run.table(schema.STEP)][:, schema.STEP_INDEX["grad_norm_preclip"]]
    clips = run.values[run.table(schema.CLIP)]
    before, scale = (
        [column.name for column in schema.CLIP_COLUMNS].index(name)
        for name in ("norm_before", "scale")
    )
    first = float(np.median(norms[: schema.FIRST_NORMS]))
    norms[299] = clips[299, before] = 1e3 * first
    norms[300] = clips[300, before] = first
    clips[300, scale] = 2e-3
    session = FakeSession(run, 300)
    app = app_on("dashboard", session)
    async with app.run_test(size=(200, 60)) as pilot:
        await frame(pilot)
        assert f"healthy up to {limit_text(100 * first)}" in text_of(app)
        session.advance(1)
        await frame(pilot)
        assert "healthy up to" not in text_of(app)
        assert "healthy from 0.01" in text_of(app)
        assert style_of(app, "from 0.01") == app.palette.warning.color
