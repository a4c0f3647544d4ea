"""Attention layers of two optimizers: a GAN of two transformers, an encoder and its decoder."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from tests.ui.fake import FakeSession, fake_two_transformers
from tests.ui.fake_run import with_unseen
from tests.ui.screens import app_on, settle, text_of
from tui_trainer.cli.run_summary import _attention
from tui_trainer.history.columns import layers_in, location_of
from tui_trainer.protocol import formatting, schema
from tui_trainer.report.charts import _attention as charts_of
from tui_trainer.ui.panels.attention.overview import LayersTable, TrendChart
from tui_trainer.ui.panels.attention.statistics import BY_KEY, SHOWN_STATISTICS
from tui_trainer.ui.panels.attention.tables import HeadsTable, StatisticTable
from tui_trainer.ui.screens.dashboard import TAB_PANELS, DashboardScreen

SIZES = ((80, 24), (120, 40))
BOTH = pytest.mark.parametrize("size", SIZES)


def newest(session: FakeSession, table: str, layer: int, statistic: str) -> float:
    """Straight from the table of the optimizer that has the layer."""
    optimizer, number = ("AdamW", layer) if layer < 4 else ("adam", layer - 4)
    key = "" if optimizer == "AdamW" else optimizer
    found = [
        h
        for h in session.history.tables.values()
        if (h.table.name, h.table.optimizer) == (table, key)
    ]
    latest = found[0].latest()
    assert latest is not None
    path = f"{'generator.' if key else ''}blocks.{number}.attention"
    names = [column.name for column in found[0].table.columns]
    return float(latest[1][names.index(f"{path}.{statistic}")])


@BOTH
async def test_the_dashboard_shows_the_layers_of_both(size: tuple[int, int]) -> None:
    session = fake_two_transformers(60)
    app = app_on("dashboard", session)
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        assert isinstance(app.screen, DashboardScreen)
        if size == (80, 24):
            app.screen.action_tab(TAB_PANELS.index("attention"))
            await settle(pilot)
        table = app.screen.query_one(LayersTable)
        table.focus()
        await settle(pilot)
        assert len(table.order) == 7
        for layer in range(7):
            assert table.current_row == layer
            assert app.screen.query_one("#trend-0", TrendChart).layer_index == layer
            value = newest(session, schema.ATTENTION, layer, "cos_qk")
            assert formatting.signed(value, 6, 3) in text_of(app)
            cell = table._value(BY_KEY["cos"], "qk", layer)
            assert cell is not None
            assert cell.value == pytest.approx(value)
            await pilot.press("down")
            session.advance(1)
            app.draw_frame()
            await settle(pilot)
        trend = app.screen.query_one("#trend-0", TrendChart)._rows[0]
        assert "generator.blocks.2" in "".join(segment.text for segment in trend)


@BOTH
async def test_every_statistic_and_the_heads_of_the_layers_of_both(size: tuple[int, int]) -> None:
    session = fake_two_transformers()
    app = app_on("attention", session)
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        table, heads = app.screen.query_one(StatisticTable), app.screen.query_one(HeadsTable)
        for layer in range(7):
            assert table.current_row == layer
            for statistic in SHOWN_STATISTICS:
                for part in statistic.parts:
                    value = newest(session, statistic.table, layer, statistic.column(part))
                    assert table.value(statistic, layer, part) == pytest.approx(value)
            first = newest(session, schema.ATTENTION_HEADS, layer, "0.norm_q")
            assert heads._values[0, 0] == pytest.approx(first)
            await pilot.press("h")
            await settle(pilot)
            assert "‖W‖ q" in text_of(app)
            await pilot.press("h", "down")
            await settle(pilot)
        for _ in SHOWN_STATISTICS:
            shown = [layer for layer, _ in table._trends]
            assert not shown or max(shown) > 3
            assert "no value yet" not in text_of(app)
            await pilot.press("m")
            await settle(pilot)


async def test_unmeasured_quantities_are_reported_only_for_their_layers() -> None:
    session = fake_two_transformers()
    run = session.run
    assert run is not None
    late = next(t for t in run.info.tables if t.name == "attention_health" and t.optimizer)
    session.history.tables[late.id] = type(session.history.tables[late.id])(late)
    reason = "it computes attention by hand"
    run.info = with_unseen(run.info, **{"attention_health@adam": reason})
    app = app_on("attention", session)
    async with app.run_test(size=(200, 60)) as pilot:
        await settle(pilot)
        assert reason not in text_of(app)
        await pilot.press("end")
        await settle(pilot)
        assert reason in text_of(app)
        table = app.screen.query_one(StatisticTable)
        entropy = BY_KEY["entropy"]
        assert table.value(entropy, 6, "") is None
        assert table.value(entropy, 0, "") is not None


async def test_a_layer_whose_heads_are_not_known_has_none_on_their_way() -> None:
    session = fake_two_transformers()
    run = session.run
    assert run is not None
    other = msgspec.structs.replace(
        run.info.attention[-1], layer="other.attention", heads=None, key_value_heads=None
    )
    run.info = msgspec.structs.replace(run.info, attention=(*run.info.attention, other))
    app = app_on("attention", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        heads = app.screen.query_one(HeadsTable)
        assert len(heads.order) == 4
        await pilot.press("end")
        await settle(pilot)
        assert len(heads.order) == 0
        assert "the number of heads is not known" in text_of(app)
        assert "measured while" not in text_of(app)


def test_the_table_of_a_recreated_optimizer_comes_first_once_it_has_rows() -> None:
    session = fake_two_transformers(60)
    history = session.history
    first = history.table(schema.ATTENTION)
    assert first is not None
    redeclared = history.declare(
        msgspec.structs.replace(first.table, id=len(history.tables), optimizer="adamw#2")
    )
    layer = next(iter(layers_in(first)))
    before = location_of(history, schema.ATTENTION, layer)
    assert before is not None
    assert before.history is first
    redeclared.append(61, np.zeros(first.columns, np.float32))
    after = location_of(history, schema.ATTENTION, layer)
    assert after is not None
    assert after.history is redeclared


def test_the_picture_and_the_report_have_the_layers_of_both() -> None:
    session = fake_two_transformers(60)
    assert session.run is not None
    info, history = session.run.info, session.history
    seen = _attention(info, history, 60)
    assert [each.layer for each in seen] == [each.layer for each in info.attention]
    for number, each in enumerate(seen):
        value = newest(session, schema.ATTENTION, number, "drift_k")
        assert each.values["drift_k"] == pytest.approx(value)
    recorded = SimpleNamespace(
        history=history,
        info=info,
        last_step=60,
        first_step=1,
        window=lambda table, columns, buckets: table.window(columns, 1, 61, buckets),
    )
    drawn = list(charts_of(recorded))  # type: ignore[arg-type]
    assert len(drawn) == 14
    assert "generator.blocks.2.attention: drift" in drawn[-1].title
