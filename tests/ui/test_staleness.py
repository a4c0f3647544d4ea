"""Where values are not of the newest step the screens say so, and how much measuring costs where
that is more than it may."""

from __future__ import annotations

import msgspec
import pytest

from tests.ui.fake import FakeSession, fake_empty, fake_gpt
from tests.ui.screens import SIZES, app_on, frame, settle, text_of
from tui_trainer.protocol import schema
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.base import staleness

CADENCES = {
    schema.GRAD_NORM: (1, 1),
    schema.ATTENTION: (32, 1),
    schema.UPDATE_RATIO: (320, 10),
    schema.WEIGHT_NORM: (10, 10),
    schema.ATTENTION_HEADS: (4, 1),
    schema.ATTENTION_SPECTRUM: (8, 8),
}
"""Now, and naturally."""


def stretched(cost_share: float = 0.0072) -> FakeSession:
    session = fake_gpt(700)
    assert session.run is not None
    info = session.run.info
    declared = []
    for table in info.tables:
        every, natural = CADENCES.get(table.name, (table.every, 0))
        declared.append(msgspec.structs.replace(table, every=every, natural=natural))
    for table in declared:
        session.history.declare(table)
    session.run.info = msgspec.structs.replace(info, tables=tuple(declared), budget=0.01)
    session.status = msgspec.structs.replace(session.status, cost_share=cost_share)
    return session


async def rows_of(mode: str, session: FakeSession, size: tuple[int, int], *keys: str) -> list[str]:
    app = app_on(mode, session)
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        await pilot.press(*keys)
        await frame(pilot)
        return text_of(app).splitlines()


async def test_the_dashboard_says_how_often_attention_is_measured() -> None:
    rows = await rows_of("dashboard", stretched(), (120, 40))
    assert next(row for row in rows if "Attention  Wq" in row).rstrip().endswith("every 32 steps")
    rows = await rows_of("dashboard", fake_gpt(700), (120, 40))
    assert "every" not in next(row for row in rows if "Attention  Wq" in row)


@pytest.mark.parametrize("size", SIZES)
async def test_the_attention_screen_says_it_of_the_statistic_and_of_the_heads(
    size: tuple[int, int],
) -> None:
    rows = await rows_of("attention", stretched(), size)
    assert next(row for row in rows if "healthy" in row).rstrip().endswith("every 32 steps")
    heads = [row for row in rows if "heads every 4 steps" in row]
    assert len(heads) == (size[1] > 24)


async def test_a_long_explanation_gives_way_to_the_age() -> None:
    rows = await rows_of("attention", stretched(), (80, 24), *"mmmm")
    healthy = next(row for row in rows if "healthy" in row)
    assert "…" in healthy
    assert healthy.rstrip().endswith("every 32 steps")


async def test_the_table_of_parameters_says_it_of_each_column_in_sight() -> None:
    summary = (await rows_of("parameters", stretched(), (120, 40)))[2]
    assert summary.rstrip().endswith("update every 320 steps, ‖w‖ every 10 steps")
    summary = (await rows_of("parameters", stretched(), (80, 24)))[2]
    assert summary.rstrip().endswith("update every 320 steps")
    assert "‖w‖" not in summary


async def test_the_help_lists_what_is_stretched_now() -> None:
    rows = await rows_of("help", stretched(), (80, 24), "slash", *"less often", "enter")
    wanted = [" ".join(row.split()) for row in rows]
    assert "update_ratio every 320 steps instead of every 10 steps" in wanted
    assert "attention every 32 steps instead of every step" in wanted
    assert "attention_heads every 4 steps instead of every step" in wanted
    assert not any("weight_norm" in row for row in wanted)
    rows = await rows_of("help", fake_gpt(700), (80, 24), "slash", *"less often", "enter")
    assert any("every quantity" in row for row in rows)


async def test_the_help_follows_the_cadences() -> None:
    session = stretched()
    app = app_on("help", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"less often", "enter")
        assert session.run is not None
        info = session.run.info
        every = tuple(5 if t.name == schema.ATTENTION else t.every for t in info.tables)
        session.run.info = info.with_cadences(every)
        session.advance(1)
        await frame(pilot)
        assert "every 5 steps instead of every step" in text_of(app)


def test_an_age_is_in_steps_where_it_is_longer_than_a_cadence() -> None:
    session = stretched()
    histories = session.history.tables_named(schema.WEIGHT_NORM)
    assert staleness(session.poll(), histories) == "every 10 steps"
    histories[0].cut(histories[0].rows - 3)
    assert staleness(session.poll(), histories) == "30 steps ago"
    assert staleness(session.poll(), session.history.tables_named(schema.GRAD_NORM)) == ""


def style_of(app: TuiTrainerApp, text: str) -> object:
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            if text in segment.text:
                return segment.style.color if segment.style else None
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("size", "share", "wanted"),
    [
        ((80, 24), 0.0204, "overhead 2.04 %"),
        ((120, 40), 0.0204, "overhead 2.04 % (budget 1 %)"),
        ((120, 40), 0.0702, "overhead 7.02 % (budget 1 %)"),
        ((120, 40), 0.0102, "overhead 1.02 % (budget 1 %)"),
        ((120, 40), 0.0072, "overhead 0.72 % (budget 1 %)"),
    ],
)
async def test_the_header_warns_of_a_cost_over_the_budget(
    size: tuple[int, int], share: float, wanted: str
) -> None:
    app = app_on("dashboard", stretched(share))
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        line = text_of(app).splitlines()[0]
        assert f"{wanted} ·" in line
        shown = style_of(app, "overhead")
        assert (shown == app.palette.dim.color) == (share < 0.05)
        assert (shown == app.palette.warning.color) == (share > 0.05)


async def test_the_width_of_the_overhead_does_not_depend_on_its_digits() -> None:
    session = fake_gpt(20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        for share, shown in ((0.0302, "3.02 %"), (0.03, "3.00 %"), (0.1, "10.0 %")):
            session.status = msgspec.structs.replace(session.status, cost_share=share)
            session._changed()
            await frame(pilot)
            assert f"overhead {shown}" in text_of(app).splitlines()[0]


async def test_a_gap_is_between_the_state_and_what_the_run_waits_for() -> None:
    session = fake_empty()
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert "starting  importing torch" in text_of(app).splitlines()[0]
