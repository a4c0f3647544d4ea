from __future__ import annotations

from types import SimpleNamespace

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.events import Clip, Notice
from tui_trainer.ui import theme
from tui_trainer.ui.glyphs import ASCII, UNICODE
from tui_trainer.ui.panels.base import user_event_marks
from tui_trainer.ui.widgets.chart import Chart


def notice(number: int, step: int, kind: str) -> Notice:
    return Notice(number, step, 0.0, kind, "pause", who="me")


PALETTE = theme.palette(theme.DARK.to_color_system().generate())


def test_commands_and_marks_are_marks_on_the_axis() -> None:
    events = (
        notice(0, 0, "command"),
        Clip(1, 20, 0.0, 1.0, 2.0, 0.5),
        notice(2, 55, "mark"),
        notice(3, 60, "cadence"),
        notice(4, 99, "command"),
        notice(5, 100, "command"),
    )
    seen = Snapshot(events=events)
    for glyphs in (UNICODE, ASCII):
        view = SimpleNamespace(palette=PALETTE, glyphs=glyphs)
        (marks,) = layers = user_event_marks(view, seen, (0, 100), 80)  # type: ignore[arg-type]
        assert list(marks.columns) == [0, 44, 79]
        chart = Chart()
        width = 40 + 80 - chart.plot_width(80)
        axis = chart.rows(width, 4, (0, 100), layers, PALETTE, glyphs)[-1]
        styles = [s.style for s in axis for _ in s.text]
        assert styles.count(PALETTE.accent) == 3
        assert any(glyphs.user_event in segment.text for segment in axis)
    assert user_event_marks(view, seen, (200, 300), 80) == []  # type: ignore[arg-type]
