"""The transport line of a recording: where the cursor is, how fast it plays, what lies where."""

from __future__ import annotations

from collections.abc import Sequence

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Size
from textual.message import Message

from tui_trainer.client.api import Snapshot
from tui_trainer.client.replay import ReplaySession
from tui_trainer.protocol import formatting as f
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.widgets.lines import Row

MARKED = (("clip", "clip"), ("spike", "warning"), ("mark", "accent"), ("nonfinite", "error"))
"""What is marked on the track, and its style; the later covers the earlier."""


class TransportLine(Panel):
    """`▶ 4×  ──╵────●──◆──×──  step 1,240/2,000  0:42/3:05`; a click or a drag on the track seeks.

    The track is as long as what was recorded; of a living run its end moves on.
    """

    DEFAULT_CSS = "TransportLine { height: 1; width: 1fr; }"

    class Moved(Message):
        """The cursor was moved, or playing was started or stopped, with the mouse."""

    def __init__(self, replay: ReplaySession) -> None:
        super().__init__()
        self.replay = replay
        self._track = (0, 1)
        """First cell of the track, and its cells."""
        self._marks: tuple[tuple[int, int], dict[int, str]] = ((-1, -1), {})
        self._dragging = False

    def show(self, snapshot: Snapshot) -> None:
        """Take the snapshot and redraw what it changed."""
        self.snapshot = snapshot
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        left, right = self._left(), self._right(size.width)
        used = sum(len(segment.text) for segment in [*left, *right])
        start = sum(len(segment.text) for segment in left)
        self._track = (start, max(1, size.width - used))
        return [[*left, *self._cells(self._track[1]), *right]]

    def _left(self) -> Row:
        replay, palette, glyphs = self.replay, self.palette, self.glyphs
        if replay.follows:
            return [Segment(f" {glyphs.running} follows ", palette.good)]
        sign = glyphs.current if replay.playing else glyphs.paused
        style = palette.good if replay.playing else palette.warning
        return [
            Segment(f" {sign} ", style),
            Segment(f"{factor_text(replay.factor) + glyphs.times:<6} ", palette.text),
        ]

    def _right(self, width: int) -> Row:
        replay, palette = self.replay, self.palette
        last = f"{replay.last_step:,}"
        step = f" step {replay.cursor:>{len(last)},}"
        row: Row = [Segment(step, palette.strong), Segment(f"/{last} ", palette.dim)]
        if width >= 70:
            whole = replay.history.timeline.elapsed_s(replay.last_step)
            wide = 5 if whole < 3600 else 8
            here = f.duration(replay.history.timeline.elapsed_s(replay.cursor), wide)
            row += (
                Segment(f" {here}", palette.text),
                Segment(f"/{f.duration(whole, wide).strip()} ", palette.dim),
            )
        return row

    def _cells(self, cells: int) -> Row:
        replay, palette, glyphs = self.replay, self.palette, self.glyphs
        signs = {
            "clip": glyphs.mark,
            "spike": glyphs.ascending,
            "mark": glyphs.point,
            "nonfinite": glyphs.failed,
        }
        styles = {kind: getattr(palette, style) for kind, style in MARKED}
        here = self.cell_of(replay.cursor)
        marks = self._marked(cells)
        row: Row = []
        for cell in range(cells):
            kind = marks.get(cell, "")
            if cell == here:
                sign, style = glyphs.running, palette.accent + Style(bold=True)
            elif kind:
                sign, style = signs[kind], styles[kind]
            else:
                done = cell < here
                sign = glyphs.bar if done else glyphs.track
                style = palette.accent if done else palette.faint
            row.append(Segment(sign, style))
        return row

    def _marked(self, cells: int) -> dict[int, str]:
        """Cell to what happened there; looked up again when the run or the line has grown."""
        replay = self.replay
        key = (replay.last_step, cells)
        if self._marks[0] != key:
            found: dict[int, str] = {}
            for kind, _ in MARKED:
                if kind == "spike":
                    steps = [spike.step for spike in replay.spikes()[:1]]
                    places = [self.cell_of(step) for step in steps]
                else:
                    places = replay.moments.places(kind, replay.last_step, cells)
                found.update(dict.fromkeys(places, kind))
            self._marks = (key, found)
        return self._marks[1]

    def cell_of(self, step: int) -> int:
        """The cell of the track that a step lies in."""
        cells = self._track[1]
        return min(step * cells // (self.replay.last_step + 1), cells - 1)

    def step_at(self, x: int) -> int:
        """The step that a column of the line stands for; both ends can be reached."""
        start, cells = self._track
        at = min(max(x - start, 0), cells - 1)
        return round(at * self.replay.last_step / max(1, cells - 1))

    # ------------------------------------------------------------ the mouse

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """On the sign: play or stand. On the track: seek, and go on while the button is down."""
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
        """Drag the cursor."""
        if self._dragging:
            self.replay.seek(self.step_at(event.x))
            self.post_message(self.Moved())

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """Let go."""
        if self._dragging:
            self._dragging = False
            self.release_mouse()


def factor_text(factor: float) -> str:
    """`0.25`, `1`, `64`, `3.7`."""
    return f"{factor:.2f}".rstrip("0").rstrip(".") if factor < 10 else f"{factor:.0f}"
