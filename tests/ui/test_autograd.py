"""The screen of the autograd graph: what it asks for and when, and how one moves in it."""

from __future__ import annotations

import pytest

from tests.ui.fake import FakeSession, fake_empty, fake_gpt
from tests.ui.screens import SIZES, app_on, frame, settle, text_of, until
from tui_trainer.protocol.actions import Pause
from tui_trainer.protocol.autograd import DescribeGraph
from tui_trainer.protocol.inspection import NOT_CAPTURED, Inspected, TensorRef
from tui_trainer.ui.app import TuiTrainerApp


def paused_app() -> tuple[TuiTrainerApp, FakeSession]:
    session = fake_gpt()
    session.send(Pause())
    return app_on("autograd", session), session


def asked(session: FakeSession) -> int:
    return sum(isinstance(each, DescribeGraph) for each in session.inspected)


@pytest.mark.parametrize("size", [*SIZES, (40, 10)], ids=str)
async def test_the_graph_at_several_sizes(size):
    app, _ = paused_app()
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.screen.graph is not None, "a graph")
        await settle(pilot)
        shown = text_of(app)
        assert "Autograd graph" in shown
        assert "NllLoss" in shown
        if size[1] >= 24:
            assert "blocks" in shown
            assert "0 … 11 × 12  Block" in shown
        if size[0] >= 120:
            assert "26 operations" not in shown
            assert "27 operations" in shown


async def test_it_is_read_again_at_each_stop_only():
    app, session = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.graph is not None, "a graph")
        assert asked(session) == 1
        await frame(pilot)
        assert asked(session) == 1
        session.advance(1)
        await frame(pilot)
        await until(pilot, lambda: asked(session) == 2, "another request")
        await pilot.press("r")
        await until(pilot, lambda: asked(session) == 3, "a request for the key")


async def test_opening_searching_and_following():
    app, _ = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.graph is not None, "a graph")
        await settle(pilot)
        assert "Mm" not in text_of(app)
        table = app.screen.table
        for _ in range(12):
            if table.selected.kind == "repeat":
                break
            await pilot.press("down")
        assert table.selected.label == "0 … 11"
        await pilot.press("right")
        await settle(pilot)
        assert "Mm" in text_of(app)
        await pilot.press("left")
        await settle(pilot)
        assert "Mm" not in text_of(app)
        await pilot.press("u")
        await settle(pilot)
        assert "× 12" not in text_of(app)
        await pilot.press("slash", *"blocks.3 wei", "enter")
        await settle(pilot)
        assert [row.label for _, row in table._rows_shown] == [
            "loss", "Net", "blocks", "3", "weight"
        ]  # fmt: skip
        await pilot.press("end")
        await settle(pilot)
        assert "1 of 256 paths" in text_of(app)
        await pilot.press("i")
        await until(pilot, lambda: app.current_mode == "inspect", "the inspector")
        assert app.inspected == TensorRef("blocks.3.weight")
        await pilot.press("g")
        await until(pilot, lambda: app.current_mode == "autograd", "the graph again")


async def test_reasons_are_shown():
    app, session = paused_app()
    session.tensors.answer = lambda request, status: Inspected(
        1, "failed", message=NOT_CAPTURED, hint="step and ask again"
    )
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: NOT_CAPTURED in text_of(app), "the reason")
        assert "step and ask again" in text_of(app)
    app = app_on("autograd", fake_empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "Autograd graph" in text_of(app)


async def test_the_graph_is_written_to_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app, _ = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.graph is not None, "a graph")
        for ending, beginning in ((".svg", "<svg"), (".dot", "digraph"), (".json", '{"nodes":[')):
            path = tmp_path / f"graph{ending}"
            await pilot.press("w", *["backspace"] * 4, *ending, "enter")
            await until(
                pilot,
                lambda p=path: any(f"to {p.name}" in n.message for n in app._notifications),
                "the file is written",
            )
            assert path.read_text().startswith(beginning)
            assert "step 300" in path.read_text() or ending == ".json"
