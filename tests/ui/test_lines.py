"""The base of the widgets that are drawn line by line."""

from __future__ import annotations

from rich.segment import Segment

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, settle, text_of
from tui_trainer.protocol.events import LogLine
from tui_trainer.ui.panels.log import LogView
from tui_trainer.ui.widgets.lines import _changed_stretches


def stretches(old: str, new: str) -> list[tuple[int, int]]:
    return _changed_stretches([Segment(old)], [Segment(new)], 20)


def test_only_the_cells_that_changed_are_refreshed() -> None:
    assert stretches("loss 1.234", "loss 1.239") == [(9, 1)]
    assert stretches("a         b", "x         y") == [(0, 1), (10, 1)]
    assert stretches("same", "same") == []
    assert stretches("longer", "long") == [(4, 2)]


def test_a_wide_character_takes_two_cells() -> None:
    assert stretches("日本 1", "日本 2") == [(5, 1)]
    assert stretches("日 1", "本 1") == [(0, 2)]
    assert stretches("e\u0301 1", "e\u0301 2") == [(2, 1)]


async def test_lines_are_laid_out_again_beside_a_scrollbar() -> None:
    session = fake_gpt()
    session.log += [LogLine(n, 2e9 + n, n, "stdout", "x" * 200) for n in range(10, 100)]
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("z")  # long lines are cut
        await settle(pilot)
        view = app.screen.query_one(LogView)
        assert view.show_vertical_scrollbar
        rows = text_of(app).split("\n")[view.region.y : view.region.bottom]
        assert all("x…" in row for row in rows)
