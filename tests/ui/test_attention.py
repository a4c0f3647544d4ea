from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from rich.style import Style

from tests.ui.fake import FakeSession, fake_empty, fake_gpt, fake_large, fake_non_finite
from tests.ui.fake_run import describe, synthesise, with_unseen
from tests.ui.screens import app_on, settle, text_of
from tui_trainer.history.columns import STATISTICS
from tui_trainer.protocol import schema
from tui_trainer.ui.panels.attention.overview import LayersTable
from tui_trainer.ui.panels.attention.statistics import BY_KEY, SHOWN_STATISTICS
from tui_trainer.ui.panels.attention.tables import HeadsTable, StatisticTable
from tui_trainer.ui.widgets.table import TableColumn, VirtualTable


def first_row(
    table: VirtualTable, columns: Sequence[TableColumn] | None = None
) -> dict[str, tuple[str, Style | None]]:
    """Column key to text and style; by default of the columns in view."""
    shown = columns or table.visible_columns(table.view_size.width)[0]
    cells = table.cells(0, shown, [column.width or 12 for column in shown])
    return {c.key: (s.text.strip(), s.style) for c, s in zip(shown, cells, strict=True)}


def test_every_measured_statistic_is_on_offer() -> None:
    offered = {(s.table, s.column(part)) for s in SHOWN_STATISTICS for part in s.parts}
    measured = {
        (table, name)
        for table, names in STATISTICS.items()
        if table != schema.ATTENTION_HEADS
        for name in names
    }
    assert offered == measured


def test_explanations_fit_the_narrow_screen() -> None:
    for statistic in SHOWN_STATISTICS:
        assert len(statistic.meaning) <= 78
        assert len("healthy  " + statistic.healthy) <= 78


def test_columns_are_those_that_the_protocol_names() -> None:
    for statistic in SHOWN_STATISTICS:
        columns = schema.attention_columns(("a", "b"), STATISTICS[statistic.table])
        for part in statistic.parts:
            place = len(STATISTICS[statistic.table]) + statistic.index(part)
            assert columns[place].name == f"b.{statistic.column(part)}"


async def test_the_run_is_notified_of_watching_only_while_the_screen_is_shown() -> None:
    session = fake_gpt()
    app = app_on("attention", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        assert session.topics == {
            schema.ATTENTION_HEADS,
            schema.ATTENTION_SPECTRUM,
            schema.ATTENTION_HEALTH,
        }
        await pilot.press("5")
        await settle(pilot)
        assert session.topics == frozenset()


async def test_every_statistic_shows_its_newest_values() -> None:
    session = fake_gpt()
    app = app_on("attention", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        for statistic in SHOWN_STATISTICS:
            text = text_of(app)
            assert statistic.meaning in text
            history = session.history.table(statistic.table)
            assert history is not None
            value = history.latest()[1][statistic.index(statistic.parts[0])]  # type: ignore[index]
            row = next(line for line in text.split("\n") if line.strip().startswith("blocks.0"))
            shown = float(row.split()[1])
            assert np.isclose(shown, value, rtol=1e-2, atol=1e-3)
            await pilot.press("m")
            await settle(pilot)


async def test_the_heads_are_those_of_the_layer_under_the_cursor() -> None:
    session = fake_gpt()
    app = app_on("attention", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("down", "down")
        await settle(pilot)
        assert "blocks.2.attention" in text_of(app)
        heads = app.screen.query_one(HeadsTable)
        latest = session.history.table(schema.ATTENTION_HEADS).latest()  # type: ignore[union-attr]
        count = len(schema.HEAD_STATISTICS)
        expected = latest[1][8 * count : 12 * count]  # type: ignore[index]
        assert np.array_equal(heads._values.ravel(), expected)


async def test_heads_replace_the_layers_where_there_is_little_room() -> None:
    app = app_on("attention", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "‖W‖ q" not in text_of(app)
        await pilot.press("h")
        await settle(pilot)
        assert "drift v" in text_of(app)
        await pilot.press("escape")
        await settle(pilot)
        assert "blocks.3" in text_of(app)


async def test_the_chosen_tab_stays_in_sight_and_tabs_are_clicked() -> None:
    app = app_on("attention", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("M")
        await settle(pilot)
        assert " mean " in text_of(app).split("\n")[2]
        await pilot.press("m")
        await settle(pilot)
        line = text_of(app).split("\n")[2]
        await pilot.click("TabLine", offset=(line.index("norm") + 1, 0))
        await settle(pilot)
        assert "Frobenius" in text_of(app)


async def test_layers_sort_by_the_statistic() -> None:
    app = app_on("attention", fake_gpt())
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(StatisticTable)
        await pilot.press("o")
        await settle(pilot)
        assert table.order.tolist() == [3, 2, 1, 0]
        await pilot.press("slash", *"blocks.1", "enter")
        await settle(pilot)
        assert table.order.tolist() == [1]


async def test_a_comparison_without_meaning_is_na_with_its_reason() -> None:
    info = describe()
    first = msgspec.structs.replace(
        info.attention[0],
        kind="grouped",
        key_value_heads=2,
        note="K and V are smaller than Q",
        incomparable=("qk", "qv"),
    )
    run = synthesise(msgspec.structs.replace(info, attention=(first, *info.attention[1:])))
    values = run.values[run.table(schema.ATTENTION)]
    values[:, schema.ATTENTION_STATISTICS.index("cos_qk")] = np.nan
    app = app_on("attention", FakeSession(run, 300))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("m")
        await settle(pilot)
        text = text_of(app)
        assert "n/a: K and V are smaller than Q" in text
        assert "2 for keys and values" in text
        row = next(line for line in text.split("\n") if "blocks.0*" in line)
        assert "n/a" in row
        assert "nan" not in row


async def test_what_is_measured_of_a_layer_with_a_note_is_not_hidden_by_it() -> None:
    info = describe()
    note = "V has a different shape from Q and K: it cannot be compared with them"
    first = msgspec.structs.replace(info.attention[0], note=note, incomparable=("qv", "kv"))
    run = synthesise(msgspec.structs.replace(info, attention=(first, *info.attention[1:])))
    values, heads = (
        run.values[run.table(name)] for name in (schema.ATTENTION, schema.ATTENTION_HEADS)
    )
    for name in ("cos_qv", "cos_kv", "norm_q"):
        values[:, schema.ATTENTION_STATISTICS.index(name)] = np.nan
    for name in ("cos_qv", "drift_k"):
        heads[:, schema.HEAD_STATISTICS.index(name)] = np.nan
    app = app_on("attention", FakeSession(run, 300))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        table, heads_table = app.screen.query_one(StatisticTable), app.screen.query_one(HeadsTable)
        table.choose(BY_KEY["cos"])
        cosines = first_row(table)
        assert cosines["qv"] == cosines["kv"] == ("n/a", app.palette.dim)
        assert cosines["qk"][1] == app.palette.qk
        table.choose(BY_KEY["norm"])
        assert first_row(table)["q"] == ("nan", app.palette.error)
        heads = first_row(heads_table)
        assert heads["cos_qv"] == ("n/a", app.palette.dim)
        assert heads["drift_k"] == ("nan", app.palette.error)
    for size in ((80, 24), (120, 40)):
        app = app_on("dashboard", FakeSession(run, 300))
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            layers = app.screen.query_one(LayersTable)
            layers.show(app.snapshot)
            row = first_row(layers, columns=layers.columns)
            assert row["cos_qv"] == row["cos_kv"] == ("n/a", app.palette.dim)
            assert row["norm_q"] == ("nan", app.palette.error)


async def test_the_reason_for_unseen_attention_is_shown_in_full() -> None:
    run = synthesise(describe())
    health = run.table(schema.ATTENTION_HEALTH)
    run.steps[health], run.values[health] = run.steps[health][:0], run.values[health][:0]
    reason = (  # the longest that the probe gives
        "scaled_dot_product_attention is not called through torch.nn.functional: attention is "
        "computed in another way, or the function was imported by name"
    )
    hidden = synthesise(with_unseen(run.info, attention_health=reason))
    hidden.steps, hidden.values = run.steps, run.values
    for shown, why in ((run, ""), (hidden, reason)):
        app = app_on("attention", FakeSession(shown, 300))
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.press(*"m" * 9)
            for size in ((80, 24), (120, 40)):
                await pilot.resize_terminal(*size)
                await settle(pilot)
                text = " ".join(text_of(app).split())
                assert ("no value yet" in text) == (not why)
                for word in why.split():
                    assert word in text


async def test_a_measured_nan_is_shown() -> None:
    app = app_on("attention", fake_non_finite(steps=202))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("m", "m", "m")
        await settle(pilot)
        row = next(line for line in text_of(app).split("\n") if line.strip().startswith("blocks.0"))
        assert "nan" in row


async def test_says_why_there_is_nothing() -> None:
    run = synthesise(describe())
    run.info = msgspec.structs.replace(
        with_unseen(run.info, attention="this model has no attention"), attention=()
    )
    app = app_on("attention", FakeSession(run, 10))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "this model has no attention" in text_of(app)


async def test_before_the_first_data_every_key_is_safe() -> None:
    app = app_on("attention", fake_empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "importing torch" in text_of(app)
        await pilot.press("m", "M", "h", "h", "o", "l", "down", "end", "slash", "a", "escape")
        await settle(pilot)


@pytest.mark.slow
async def test_a_thousand_layers() -> None:
    app = app_on("attention", fake_large(6_000))
    async with app.run_test(size=(200, 60)) as pilot:
        await settle(pilot)
        await pilot.press("end")
        await settle(pilot)
        assert "blocks.998" in text_of(app)
        assert len(app.screen.query_one(StatisticTable)._trends) < 200


@pytest.mark.slow
async def test_other_sizes_are_drawn_without_fault() -> None:
    app = app_on("attention", fake_gpt(steps=1))
    async with app.run_test(size=(120, 40)) as pilot:
        for size in ((20, 5), (40, 10), (300, 90), (80, 24)):
            await pilot.resize_terminal(*size)
            await settle(pilot)
        assert "drift" in text_of(app)
