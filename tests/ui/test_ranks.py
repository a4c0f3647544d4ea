"""The screen of the processes of a run."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.ui.fake import fake_gpt
from tests.ui.fake_tensors import WEIGHT
from tests.ui.screens import SIZES, app_on, frame, text_of, until
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.actions import Pause
from tui_trainer.protocol.autograd import DescribeGraph
from tui_trainer.protocol.inspection import OfRank, Summarize, TensorRef
from tui_trainer.protocol.schema import ProcessInfo, Table
from tui_trainer.ui.screens.ranks import RanksChart, RanksTable

REASON = "killed by signal 9 (SIGKILL), possibly out of memory"


@pytest.mark.parametrize("size", SIZES)
async def test_remarks_are_shown_in_full_at_every_size(size):
    session = fake_gpt(20)
    processes = (ProcessInfo(0, state="running"), ProcessInfo(1, state="killed", reason=REASON))
    session.run.info = msgspec.structs.replace(session.run.info, processes=processes)
    session._changed()
    app = app_on("ranks", session)
    async with app.run_test(size=size) as pilot:
        await frame(pilot)
        assert text_of(app).count(REASON) == 1


def row_of(rank, loss):
    row = np.full(len(schema.RANK_COLUMNS), absent(Absent.NOT_MEASURED), np.float32)
    row[schema.RANK_INDEX["loss"]] = loss
    row[schema.RANK_INDEX["step_ms"]] = 10.0 + rank
    row[schema.RANK_INDEX["grad_norm_preclip"]] = 30.0 if rank == 2 else 1.0
    return row


@pytest.mark.parametrize(("size", "charts"), [((80, 24), 1), ((120, 40), 2), ((200, 60), 3)])
async def test_charts_have_the_line_of_the_rank_under_the_cursor(size, charts):
    session = fake_gpt(20)
    processes = tuple(ProcessInfo(rank, state="running") for rank in range(3))
    number = len(session.run.info.tables)
    series = [
        session.history.declare(Table(number + rank, schema.RANKS, schema.RANK_COLUMNS, rank=rank))
        for rank in range(3)
    ]
    for rank, each in enumerate(series):
        for step in range(1, 21):
            each.append(step, row_of(rank, rank + 1.0))
    session.run.info = msgspec.structs.replace(session.run.info, processes=processes)
    session._changed()
    app = app_on("ranks", session)
    async with app.run_test(size=size) as pilot:
        await frame(pilot)
        assert len([c for c in app.screen.query(RanksChart) if c.display]) == charts
        assert "rank 0    1.000" in text_of(app)
        color = app.screen.query_one(RanksTable).palette.warning.color
        strips = app.screen._compositor.render_strips()
        pieces = [piece for strip in strips for piece in strip if piece.style.color == color]
        warned = [piece.text.strip() for piece in pieces]
        assert [text for text in warned if text.startswith("30")] == ["30.00"]
        await pilot.press("down", "down")
        await frame(pilot)
        assert "rank 2    3.000" in text_of(app)


async def test_the_tensors_of_any_rank_are_looked_into():
    session = fake_gpt(20)
    processes = tuple(ProcessInfo(rank, state="running") for rank in (0, 1, 3))
    session.run.info = msgspec.structs.replace(session.run.info, processes=processes)
    session._changed()
    session.send(Pause())
    app = app_on("ranks", session)
    app.inspected = TensorRef(WEIGHT)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("down", "i")
        await until(pilot, lambda: app.current_mode == "inspect", "the inspector")
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        assert isinstance(session.inspected[-1], OfRank)
        assert session.inspected[-1].rank == 1
        for rank in (3, 0):
            before = len(session.inspected)
            await pilot.press("R")
            await until(pilot, lambda n=before: len(session.inspected) > n, "a request")
            await until(pilot, lambda: app.screen.summary is not None, "an answer")
            assert app.inspected_rank == rank
        assert isinstance(session.inspected[-1], Summarize)
        app.inspected_rank = 1
        await pilot.press("g")
        await until(pilot, lambda: app.current_mode == "autograd", "the graph")
        await until(pilot, lambda: app.screen.graph is not None, "an answer")
        assert session.inspected[-1] == OfRank(1, DescribeGraph())
