from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.ui.fake import (
    FakeSession,
    fake_empty,
    fake_extremes,
    fake_gpt,
    fake_large,
    fake_non_finite,
)
from tests.ui.fake_run import describe, synthesise
from tests.ui.screens import app_on, frame, settle, text_of
from tui_trainer.protocol import schema
from tui_trainer.ui.panels.parameters import ParameterTable, ParameterValues
from tui_trainer.ui.widgets.table import RowIds


def values_of(session: object) -> ParameterValues:
    values = ParameterValues()
    values.update(session.poll())  # type: ignore[attr-defined]
    return values


def test_values_are_those_of_the_newest_rows() -> None:
    session = fake_gpt()
    values = values_of(session)
    history = session.history.table(schema.GRAD_NORM)
    assert history is not None
    newest = history.latest()
    assert newest is not None
    assert np.array_equal(values.newest[schema.GRAD_NORM], newest[1])


def test_shares_are_of_the_squared_norm() -> None:
    values = values_of(fake_gpt())
    norms = values.newest[schema.GRAD_NORM].astype(float)
    assert np.allclose(values.shares, norms**2 / (norms**2).sum(), rtol=1e-5)
    assert abs(values.shares.sum() - 1) < 1e-5


def test_trends_lose_no_spike() -> None:
    session = fake_gpt()
    values = values_of(session)
    high, bad = values.maxima(schema.GRAD_NORM, [3, 0], 10)
    _, rows = session.history.table(schema.GRAD_NORM).tail(300)  # type: ignore[union-attr]
    assert np.allclose(np.nanmax(high, axis=1), rows[:, [3, 0]].max(0))
    assert not bad.any()


def test_trends_mark_what_is_not_finite() -> None:
    values = values_of(fake_non_finite())
    _, bad = values.maxima(schema.GRAD_NORM, [0, 5], 10)
    assert bad[0].any()
    assert not bad[1].any()


async def test_every_sort_order_shows_every_parameter() -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(200, 60)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        for key in table.sort_keys[1:]:
            await pilot.press("o")
            await settle(pilot)
            assert table.sorted_by == key
            assert sorted(table.order.tolist()) == list(range(27))


async def test_sorted_by_norm_the_largest_is_first_and_reversed_the_smallest() -> None:
    session = fake_gpt()
    app = app_on("parameters", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        norms = table.values.newest[schema.GRAD_NORM]
        await pilot.press("o", "o")
        await settle(pilot)
        assert table.order[0] == norms.argmax()
        await pilot.press("r")
        await settle(pilot)
        assert table.order[0] == norms.argmin()


async def test_a_click_on_a_title_sorts_and_on_a_row_selects() -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        title = text_of(app).split("\n")[table.region.y]
        await pilot.click(ParameterTable, offset=(title.index("share"), 0))
        await settle(pilot)
        assert table.sorted_by == "share"
        await pilot.click(ParameterTable, offset=(3, 4))
        await settle(pilot)
        assert table.cursor == 3
        assert app.snapshot.info is not None
        assert table.current_row is not None
        selected = text_of(app).split("\n")[app.screen.query_one("#selected").region.y]
        assert app.snapshot.info.parameters[table.current_row].name in selected


async def test_norms_of_a_shard_are_marked() -> None:
    run = synthesise(describe())
    sharded = [msgspec.structs.replace(p, sharded=True) for p in run.info.parameters]
    run.info = msgspec.structs.replace(run.info, parameters=tuple(sharded))
    for session, marked in ((FakeSession(run, 20), True), (fake_gpt(20), False)):
        app = app_on("parameters", session)
        async with app.run_test(size=(80, 24)) as pilot:
            await settle(pilot)
            selected = text_of(app).split("\n")[app.screen.query_one("#selected").region.y]
            assert ("norms of rank 0's shard" in selected) is marked
            shares = app.screen.query_one(ParameterTable).values.shares
            assert np.isnan(shares).all() == marked


async def test_filter_keeps_what_has_all_words() -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"query 2")
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        assert [table.values.info.parameters[i].name for i in table.order] == [  # type: ignore[union-attr]
            "blocks.2.attention.W_query.weight"
        ]
        await pilot.press("escape")
        await settle(pilot)
        assert len(table.order) == 27


async def test_a_filter_without_a_match_says_so() -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"zzz", "enter")
        await settle(pilot)
        assert "no name contains “zzz”" in text_of(app)


async def test_columns_without_room_are_reached_with_the_arrows() -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "dtype" not in text_of(app)
        await pilot.press(*["right"] * 7)
        await settle(pilot)
        assert "dtype" in text_of(app)
        assert "optimizer" in text_of(app)


@pytest.mark.slow
async def test_ten_thousand_parameters_scroll_sort_and_filter() -> None:
    session = fake_large(10_000)
    app = app_on("parameters", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        assert len(table.order) >= 9_999
        await pilot.press("end")
        await settle(pilot)
        assert "head.weight" in text_of(app)
        await pilot.press("o", "o", "slash", *"1665", "enter")
        await settle(pilot)
        assert 0 < len(table.order) < 20
        assert len(table._trends) < 40


async def test_the_cursor_stays_on_its_parameter_while_values_change() -> None:
    session = fake_gpt()
    app = app_on("parameters", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("o", "o", "down", "down")
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        before = table.current_row
        session.advance(50)
        app.screen._sorted_at = 0.0  # type: ignore[attr-defined]
        await frame(pilot)
        assert table.current_row == before


async def test_a_key_that_sorts_builds_the_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_on("parameters", fake_gpt())
    built = []
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        await pilot.press("end")  # so that the key scrolls
        await settle(pilot)
        rows = ParameterTable.rows
        monkeypatch.setattr(
            ParameterTable, "rows", lambda self, size: built.append(size) or rows(self, size)
        )
        app.screen.action_order(1)  # type: ignore[attr-defined]
        assert (table.cursor, table.top, len(built)) == (0, 0, 1)


async def test_non_finite_values_are_named_with_their_step() -> None:
    app = app_on("parameters", fake_non_finite(steps=203))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        assert "inf" in text_of(app)
        table = app.screen.query_one(ParameterTable)
        table.sorted_by, table.descending = "nonfinite", True
        table.rearrange()
        assert set(table.order[:3].tolist()) == {0, 1, 2}


async def test_extreme_values_fit_their_columns() -> None:
    for steps in (1, 1000, 1999):
        app = app_on("parameters", fake_extremes(steps=steps))
        async with app.run_test(size=(120, 40)) as pilot:
            await settle(pilot)
            assert "#####" not in text_of(app)


async def test_before_the_first_data_it_says_what_it_waits_for() -> None:
    app = app_on("parameters", fake_empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "importing torch" in text_of(app)
        await pilot.press("o", "r", "l", "right", "left", "slash", "a", "escape", "down", "end")
        await settle(pilot)


@pytest.mark.slow
async def test_other_sizes_are_drawn_without_fault() -> None:
    app = app_on("parameters", fake_gpt(steps=1))
    async with app.run_test(size=(120, 40)) as pilot:
        for size in ((20, 5), (40, 10), (300, 90), (80, 24)):
            await pilot.resize_terminal(*size)
            await settle(pilot)
        assert "Parameters" in text_of(app)


async def test_a_key_that_moves_the_cursor_draws_what_a_whole_build_would() -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(120, 24)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(ParameterTable)
        built = 0
        prepare = table.prepare

        def counted(visible: RowIds) -> None:
            nonlocal built
            built += 1
            prepare(visible)

        table.prepare = counted  # type: ignore[method-assign]
        for key in ("down", "down", "up", "o", "down", "r", "down", *["down"] * 30, "up", "home"):
            table.action_move({"down": 1, "up": -1}.get(key, 0))
            if key in ("o", "r", "home"):
                await pilot.press(key)
                await settle(pilot)
            drawn = list(table._rows)
            table.update_rows()
            assert drawn == table._rows, key
        built = 0
        table.action_move(1)
        assert built == 0, "a cursor that stays in view needs no cells"
        app.theme = "textual-light"
        await settle(pilot)
        table.action_move(1)
        assert built
