"""The transport line of a replay: the position in the recording, the speed, and marks of what
happened where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from textual import events
from textual.geometry import Size
from textual.message import Message

from tui_trainer.client.replay import ReplaySession
from tui_trainer.protocol import formatting
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.widgets.lines import Row

MarkKind = Literal["clip", "spike", "mark", "nonfinite"]
MARK_STYLES: dict[MarkKind, str] = {
    "clip": "clip",
    "spike": "warning",
    "mark": "accent",
    "nonfinite": "error",
}
"""What is marked on the track; of two marks in one cell the later one here is shown."""
MIN_WIDTH_FOR_TIME = 70


class TransportLine(Panel):
    """`▶ 4×  ──╵────●──◆──×──  step 1,240/2,000  0:42/3:05`

    A click or a drag on the track seeks; a click left of it plays or pauses. The track is as long
    as the recording, which still grows if the run is live.
    """

    DEFAULT_CSS = "TransportLine { height: 1; width: 1fr; }"

    class Moved(Message):
        """The position was changed, or playing started or stopped, with the mouse."""

    def __init__(self, replay: ReplaySession) -> None:
        super().__init__()
        self.replay = replay
        self._track = (0, 1)
        """First cell of the track, and its number of cells."""
        self._marks: dict[int, MarkKind] = {}
        """Cell of the track to what happened there."""
        self._marks_of: tuple[int, int] | None = None
        """(last step, cells) that the marks were looked up for."""
        self._dragging = False

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        left, right = self._left(), self._right(size.width)
        start = sum(len(segment.text) for segment in left)
        used = start + sum(len(segment.text) for segment in right)
        self._track = (start, max(1, size.width - used))
        return [[*left, *self._track_cells(self._track[1]), *right]]

    def _left(self) -> Row:
        """Playing or paused, and the speed."""
        replay, glyphs = self.replay, self.glyphs
        if replay.follows:
            return self.styled([(f" {glyphs.running} following ", "good")])
        sign, style = (glyphs.current, "good") if replay.playing else (glyphs.paused, "warning")
        speed = f"{format_factor(replay.factor)}{glyphs.times}"
        return self.styled([(f" {sign} ", style), (f"{speed:<6} ", "text")])

    def _right(self, width: int) -> Row:
        """The step and the time."""
        replay = self.replay
        last = f"{replay.last_step:,}"
        spans = [(f" step {replay.cursor:>{len(last)},}", "strong"), (f"/{last} ", "dim")]
        if width >= MIN_WIDTH_FOR_TIME:
            total_s = replay.history.timeline.elapsed_s(replay.last_step)
            time_width = 5 if total_s < 3600 else 8
            elapsed_s = replay.history.timeline.elapsed_s(replay.cursor)
            elapsed = formatting.duration(elapsed_s, time_width)
            spans.append((f" {elapsed}", "text"))
            spans.append((f"/{formatting.duration(total_s, 0)} ", "dim"))
        return self.styled(spans)

    def _track_cells(self, cells: int) -> Row:
        glyphs = self.glyphs
        signs: dict[MarkKind, str] = {
            "clip": glyphs.mark,
            "spike": glyphs.ascending,
            "mark": glyphs.point,
            "nonfinite": glyphs.failed,
        }
        cursor = self.cell_of(self.replay.cursor)
        marks = self._find_marks(cells)
        spans = []
        for cell in range(cells):
            kind = marks.get(cell)
            if cell == cursor:
                spans.append((glyphs.running, "accent bold"))
            elif kind is not None:
                spans.append((signs[kind], MARK_STYLES[kind]))
            elif cell < cursor:
                spans.append((glyphs.bar, "accent"))
            else:
                spans.append((glyphs.track, "faint"))
        return self.styled(spans)

    def _find_marks(self, cells: int) -> dict[int, MarkKind]:
        """Looked up again when the recording has grown or the track has another length."""
        replay = self.replay
        if self._marks_of != (replay.last_step, cells):
            self._marks_of = (replay.last_step, cells)
            self._marks = {}
            for kind in MARK_STYLES:
                if kind == "spike":
                    found = [self.cell_of(spike.step) for spike in replay.spikes()[:1]]
                else:
                    found = replay.moments.places(kind, replay.last_step, cells)
                self._marks |= dict.fromkeys(found, kind)
        return self._marks

    def cell_of(self, step: int) -> int:
        """The cell of the track that a step lies in."""
        cells = self._track[1]
        return min(step * cells // (self.replay.last_step + 1), cells - 1)

    def step_at(self, x: int) -> int:
        """The step at a column of the line. Both ends of the recording can be reached."""
        start, cells = self._track
        cell = min(max(x - start, 0), cells - 1)
        return round(cell * self.replay.last_step / max(1, cells - 1))

    # ------------------------------------------------------------ the mouse

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Play or pause; on the track, seek and keep seeking while the button is down."""
        event.stop()
        start, cells = self._track
        if event.x < start:
            self.replay.stop_playing() if self.replay.playing else self.replay.play(
                self.replay.speed
            )
        elif event.x < start + cells:
            self._dragging = True
            self.capture_mouse()
            self.replay.seek(self.step_at(event.x))
        self.post_message(self.Moved())

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Seek while dragging."""
        if self._dragging:
            self.replay.seek(self.step_at(event.x))
            self.post_message(self.Moved())

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """Stop dragging."""
        if self._dragging:
            self._dragging = False
            self.release_mouse()


def format_factor(factor: float) -> str:
    """`0.25`, `1`, `3.7`, `64`: times the recorded speed."""
    return f"{factor:.2f}".rstrip("0").rstrip(".") if factor < 10 else f"{factor:.0f}"
