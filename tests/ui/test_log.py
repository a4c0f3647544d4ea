from __future__ import annotations

import pytest

from tests.ui.fake import FakeSession, fake_empty, fake_gpt, fake_non_finite
from tests.ui.screens import app_on, frame, settle, text_of
from tui_trainer.protocol.events import Clip, LogLine, Notice
from tui_trainer.protocol.text import strip_escapes, truncate, wrap
from tui_trainer.ui.panels.log import MAX_ENTRIES, LogModel, LogView

pytestmark = pytest.mark.usefixtures("utc")


def line(number: int, when: float, text: str = "text", stream: str = "stdout") -> LogLine:
    return LogLine(number, when, number, stream, text)


def notice(number: int, when: float, level: str = "info") -> Notice:
    return Notice(number, 1, when, "state", "something", level)


def test_lines_and_events_are_merged_in_time() -> None:
    log = LogModel()
    assert log.update([line(0, 1.0), line(1, 3.0)], [notice(0, 2.0)], None) == 0
    assert [entry.kind for entry in log.shown] == ["stdout", "events", "stdout"]


def test_a_late_event_is_put_in_its_place() -> None:
    log = LogModel()
    log.update([line(0, 1.0), line(1, 3.0)], [], None)
    assert log.update([line(0, 1.0), line(1, 3.0)], [notice(0, 2.0)], None) == 1
    assert [entry.time for entry in log.shown] == [1.0, 2.0, 3.0]


def test_nothing_is_taken_twice() -> None:
    log = LogModel()
    log.update([line(0, 1.0)], [notice(0, 2.0)], None)
    assert log.update([line(0, 1.0)], [notice(0, 2.0)], None) is None
    assert len(log.entries) == 2


def test_a_tail_that_has_moved_on_is_joined_by_its_ids() -> None:
    log = LogModel()
    log.update([line(number, number) for number in range(5)], [], None)
    log.update([line(number, number) for number in range(3, 8)], [], None)
    assert [entry.id for entry in log.entries] == list(range(8))


def test_memory_is_bounded() -> None:
    log = LogModel()
    for start in range(0, 3 * MAX_ENTRIES, 500):
        log.update([line(number, number) for number in range(start, start + 500)], [], None)
    assert MAX_ENTRIES <= len(log.entries) <= MAX_ENTRIES * 9 // 8
    assert log.shown[-1].id == 3 * MAX_ENTRIES - 1
    assert log.shown[0] is log.entries[0]


def test_clips_are_shown_when_asked_for() -> None:
    log = LogModel()
    log.update([line(0, 1.0)], [Clip(0, 7, 2.0, 1.0, 4.0, 0.25)], None)
    assert [entry.kind for entry in log.shown] == ["stdout"]
    log.filter(kinds=log.kinds | {"clips"})
    assert "scaled by 0.25" in log.shown[-1].text


def test_filter_by_text_and_level() -> None:
    log = LogModel()
    log.update([line(0, 1.0, "Loss 3"), line(1, 2.0, "else")], [notice(0, 3.0, "error")], None)
    log.filter(text="LOSS")
    assert [entry.text for entry in log.shown] == ["Loss 3"]
    log.filter(text="", warnings_only=True)
    assert [entry.level for entry in log.shown] == ["error"]


def test_find_goes_round() -> None:
    log = LogModel()
    log.update([line(n, n, "hit" if n in (2, 6) else "miss") for n in range(8)], [], None)
    assert log.find("HIT", 2) == 6
    assert log.find("hit", 6) == 2
    assert log.find("hit", 6, backwards=True) == 2
    assert log.find("absent", 0) is None


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r55%\r100%", "100%"),
        ("a\tb", "a   b"),
        ("\x1b]0;title\x07text", "text"),
        ("bell\x07", "bell·"),
        ("\x9b2J", "·2J"),
        ("done\r\n", "done"),
    ],
)
def test_output_cannot_disturb_the_screen(raw: str, shown: str) -> None:
    assert strip_escapes(raw) == shown


def test_huge_lines_are_cut_with_an_ellipsis() -> None:
    assert truncate("x" * 10_000, 20) == "x" * 19 + "…"
    assert truncate("日本語日本語", 7) == "日本語…"
    assert all(len(row) <= 30 for row in wrap("word " * 100, 30))


async def test_follows_and_stops_following_when_scrolled_up() -> None:
    session = fake_gpt()
    session.log += [line(n, 2e9 + n, f"line {n}") for n in range(10, 200)]
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "line 199" in text_of(app)
        await pilot.press("pageup")
        await settle(pilot)
        assert "line 199" not in text_of(app)
        add_line(session, "a new one")
        await frame(pilot)
        assert "a new one" not in text_of(app)
        await pilot.press("f")
        await settle(pilot)
        assert "a new one" in text_of(app)


def add_line(session: FakeSession, text: str) -> None:
    session.log.append(line(session.log[-1].id + 1, 3e9, text))
    session._changed()


async def test_filter_is_typed_and_cleared() -> None:
    app = app_on("log", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"note")
        await settle(pilot)
        assert "3 of 4 cores" in text_of(app)
        assert "training began" not in text_of(app)
        await pilot.press("escape")
        await settle(pilot)
        assert "training began" in text_of(app)


async def test_a_filter_that_hides_everything_says_so() -> None:
    app = app_on("log", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"zzzz", "enter")
        await settle(pilot)
        assert "lines are hidden" in text_of(app)


async def test_a_click_on_a_switch_shows_the_clips() -> None:
    app = app_on("log", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "scaled by" not in text_of(app)
        row = next(row for row in text_of(app).split("\n") if "clips" in row)
        await pilot.click("#toggles", offset=(row.index("clips"), 0))
        await settle(pilot)
        assert "scaled by" in text_of(app)
        view = app.screen.query_one(LogView)  # they are too many for it, and it shows the end
        assert view.vertical_scrollbar.position == view.scroll_y == view.max_scroll_y > 0


async def test_search_marks_and_moves() -> None:
    session = fake_gpt()
    session.log += [line(n, 2e9 + n, "needle" if n == 12 else "hay") for n in range(10, 99)]
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "needle" not in text_of(app)
        await pilot.press("ctrl+f", *"needle", "enter")
        await settle(pilot)
        assert "needle" in text_of(app)


async def test_long_lines_are_looked_at_further_right() -> None:
    session = fake_gpt()
    session.log.append(line(50, 3e9, "a" * 100 + "the end"))
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("z")  # no wrapping
        await settle(pilot)
        assert "the end" not in text_of(app)
        await pilot.press(*["right"] * 4)
        await settle(pilot)
        assert "the end" in text_of(app)


async def test_keys_steer_the_run_from_here_too() -> None:
    session = fake_gpt()
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("space")
        await settle(pilot)
        assert session.status.state == "paused"


async def test_says_what_it_waits_for() -> None:
    app = app_on("log", fake_empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "importing torch" in text_of(app)


async def test_non_finite_values_are_errors() -> None:
    app = app_on("log", fake_non_finite())
    async with app.run_test(size=(100, 24)) as pilot:
        await settle(pilot)
        await pilot.press("w")
        await settle(pilot)
        assert "loss became nan in" in text_of(app)


async def test_five_thousand_lines_draw_only_visible_ones() -> None:
    session = fake_gpt()
    session.log += [line(n, 2e9 + n, f"line {n}") for n in range(10, 5_010)]
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        view = app.screen.query_one(LogView)
        assert view.line_count() >= 4_990
        assert len(view._lines) < 100


async def test_a_long_line_is_read_whole_at_80_columns() -> None:
    session = fake_gpt(10)
    words = " ".join(f"word{number}" for number in range(40))
    session.log.append(LogLine(len(session.log), 2e9, 10, "stdout", f"{words} end-of-the-line"))
    session._changed()
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        assert "end-of-the-line" in text_of(app)
        await pilot.press("z")
        await frame(pilot)
        assert "end-of-the-line" not in text_of(app)
        await pilot.press("z")
        await frame(pilot)
        view = app.screen.query_one(LogView)
        assert view.line_count() > len(view.model.shown)
        await pilot.resize_terminal(200, 24)
        await frame(pilot)
        assert "end-of-the-line" in text_of(app)
