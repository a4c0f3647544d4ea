"""The line on the data: images, batches per epoch and updates are on a screen at every size."""

from __future__ import annotations

import msgspec
import pytest

from tests.ui.fake import FakeSession, fake_empty, fake_gpt, fake_vit
from tests.ui.screens import app_on, frame, settle, text_of
from tui_trainer.protocol.schema import Scalar
from tui_trainer.ui.panels.header import FactsLine, shown_facts

FACES: dict[str, Scalar] = {
    "data": "/data/casia-webface",
    "images": 494_149,
    "batches per epoch": 3_860,
    "updates": 154_400,
    "classes": 10_572,
    "device": "cuda",
    "threads": 4,
}
FACTS = "images 494,149 · batches per epoch 3,860 · updates 154,400"


def on_faces() -> FakeSession:
    session = fake_vit()
    describe(session, facts=FACES)
    return session


def describe(session: FakeSession, **changes: object) -> None:
    assert session.run is not None
    session.run.info = msgspec.structs.replace(session.run.info, **changes)
    session.advance(1)


@pytest.mark.parametrize(
    ("mode", "size"),
    [("dashboard", (120, 40)), ("dashboard", (200, 60)), ("log", (80, 24)), ("log", (120, 40))],
)
@pytest.mark.slow
async def test_the_arithmetic_of_an_epoch_is_on_screen(mode: str, size: tuple[int, int]) -> None:
    session = on_faces()
    app = app_on(mode, session)
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        assert FACTS in text_of(app)
        places = [widget.region for widget in app.screen.walk_children()]
        session.advance(1)
        await frame(pilot)
        assert places == [widget.region for widget in app.screen.walk_children()]


@pytest.mark.parametrize("size", [(80, 24), (120, 30)])
async def test_the_dashboard_has_no_facts_line_without_room(size: tuple[int, int]) -> None:
    app = app_on("dashboard", on_faces())
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        assert "494,149" not in text_of(app)


async def test_whole_facts_are_left_out_where_they_do_not_fit() -> None:
    app = app_on("log", on_faces())
    async with app.run_test(size=(48, 24)) as pilot:
        await settle(pilot)
        (line,) = (row for row in text_of(app).splitlines() if "494,149" in row)
        assert line.strip() == "images 494,149 · batches per epoch 3,860"


def test_counts_come_before_texts_and_header_facts_are_left_out() -> None:
    session = on_faces()
    assert session.run is not None
    names = [name for name, _ in shown_facts(session.run.info)]
    assert names == ["images", "batches per epoch", "updates", "classes", "data"]


async def test_a_script_has_no_such_line_and_a_task_has_its_room_from_the_start() -> None:
    session = fake_gpt()
    describe(session, task="script", facts={})
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        line = app.screen.query_one(FactsLine)
        assert not line.has_class("-known")
        session.status = msgspec.structs.replace(session.status, state="starting")
        describe(session, task="vit")
        await frame(pilot)
        assert line.has_class("-known")
        assert line.region.height == 1


async def test_no_facts_before_the_run_is_known() -> None:
    app = app_on("log", fake_empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert not app.screen.query_one(FactsLine).has_class("-known")
