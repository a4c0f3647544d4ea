"""The app for `tui-trainer replay`: the same screens over a recorded run, with keys that move
through its time, and a line that shows the position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from textual import events
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.geometry import Size
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.client.replay import ReplaySession
from tui_trainer.protocol import formatting
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.textual_hacks import bindings_of
from tui_trainer.ui.theme import initial_theme
from tui_trainer.ui.widgets.key_line import KeyLine
from tui_trainer.ui.widgets.lines import Row

MarkKind = Literal["clip", "spike", "mark", "nonfinite"]
MARK_STYLES: dict[MarkKind, str] = {
    "clip": "clip",
    "spike": "warning",
    "mark": "accent",
    "nonfinite": "error",
}
"""Styles of the marks on the track. Of two marks in one cell, the one listed later is shown."""
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
        """The mark in each cell of the track that has one."""
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
            total_s = replay.history.step_times.elapsed_s(replay.last_step)
            time_width = 5 if total_s < 3600 else 8
            elapsed_s = replay.history.step_times.elapsed_s(replay.cursor)
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
        """The marks of the track; found again when the recording or the size has changed."""
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


SPEED_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Playback speeds, as multiples of the recorded one."""
SCREENS_WITH_OWN_ARROWS = ("help", "start", "compare")
"""Screens on which the arrow keys do not move through time."""
KINDS = {"clip": "clip event", "nonfinite": "non-finite value", "mark": "mark", "spike": "spike"}

TRANSPORT_BINDINGS = (
    Binding("left", "seek_by(-1)", "Step back", show=False, priority=True, id="replay.back",
            tooltip="One step back in time"),
    Binding("right", "seek_by(1)", "Step forward", show=False, priority=True, id="replay.on",
            tooltip="One step forward in time"),
    Binding("shift+left", "seek_by(-10)", "10 back", show=False, priority=True,
            id="replay.back_10", tooltip="Ten steps back"),
    Binding("shift+right", "seek_by(10)", "10 forward", show=False, priority=True,
            id="replay.on_10", tooltip="Ten steps forward"),
    Binding("home", "seek_to(0)", "Beginning", show=False, priority=True, id="replay.first",
            tooltip="The beginning of the run"),
    Binding("end", "seek_to(1)", "End", show=False, priority=True, id="replay.last",
            tooltip="The end; new steps of a live run are followed"),
    Binding("less_than_sign,comma", "faster(-1)", "Slower", key_display="<", show=False,
            id="replay.slower", tooltip="Play at half the speed (down to 0.25×)"),
    Binding("greater_than_sign,full_stop", "faster(1)", "Faster", key_display=">", show=False,
            id="replay.faster", tooltip="Play at twice the speed (up to 64×)"),
    Binding("c", "jump('clip')", "Clip", id="replay.clip", tooltip="To the next clip event"),
    Binding("C", "jump('clip', True)", "Previous clip", show=False, id="replay.clip_before",
            tooltip="To the previous clip event"),
    Binding("i", "jump('nonfinite')", "nan/inf", id="replay.nonfinite",
            tooltip="To the next non-finite value"),
    Binding("I", "jump('nonfinite', True)", "Previous nan/inf", show=False,
            id="replay.nonfinite_before", tooltip="To the previous non-finite value"),
    Binding("z", "jump('spike')", "Spike", id="replay.spike",
            tooltip="To the worst spike of the loss; again: to the next worst, ten in all"),
    Binding("Z", "jump('spike', True)", "Worse spike", show=False, id="replay.spike_before",
            tooltip="Back to the spike that was worse"),
    Binding("b", "jump('mark')", "Mark", id="replay.mark", tooltip="To the next note of a user"),
    Binding("B", "jump('mark', True)", "Previous mark", show=False, id="replay.mark_before",
            tooltip="To the previous note of a user"),
    Binding("ctrl+left", "of_screen('left')", "Screen's left", show=False, id="replay.screen_left",
            tooltip="What the left arrow does on this screen over a live run"),
    Binding("ctrl+right", "of_screen('right')", "Screen's right", show=False,
            id="replay.screen_right",
            tooltip="What the right arrow does on this screen over a live run"),
)  # fmt: skip
_ARROW_ACTIONS = ("seek_by", "seek_to", "of_screen")


class ReplayApp(TuiTrainerApp):
    """Shows one recorded run."""

    BINDINGS: ClassVar[list[BindingType]] = [*TuiTrainerApp.BINDINGS, *TRANSPORT_BINDINGS]

    def __init__(self, replay: ReplaySession, **options: Any) -> None:
        super().__init__(replay, **options)
        self.replay = replay
        self._spike = -1
        """Index of the last spike that was jumped to."""

    def on_mount(self) -> None:
        """Draw by the clock while the replay plays, since no arriving data triggers a frame.

        Textual calls the base class's handler as well.
        """
        self.set_interval(1 / max(1.0, self.link.frames_per_second), self._draw_if_playing)

    def _draw_if_playing(self) -> None:
        if self.replay.playing:
            self.draw_frame()

    def draw(self, snapshot: Snapshot) -> None:
        """Draw the screens and their transport lines."""
        super().draw(snapshot)
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen) and screen.is_mounted:
                self._show_transport(screen, snapshot)

    def screen_resumed(self, screen: Screen[Any]) -> None:
        """Draw a screen that came to the front, with its transport line."""
        super().screen_resumed(screen)
        if screen.is_mounted:
            self._show_transport(screen, self.snapshot)

    def _show_transport(self, screen: Screen[Any], snapshot: Snapshot) -> None:
        found = screen.query(TransportLine)
        if found:
            found.first().show(snapshot)
            return
        try:
            keys = screen.query_one(KeyLine)
        except NoMatches:
            return
        line = TransportLine(self.replay)
        line.snapshot = snapshot
        screen.mount(line, before=keys)

    def on_transport_line_moved(self) -> None:
        """Draw the step that the mouse went to."""
        self.draw_frame()

    # ------------------------------------------------------------ actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave the arrows and letters to dialogs, input fields and screens that need them."""
        if action in _ARROW_ACTIONS or action in ("jump", "faster"):
            typing = isinstance(self.screen, ModalScreen) or isinstance(self.focused, Input)
            own_arrows = self.current_mode in SCREENS_WITH_OWN_ARROWS
            if typing or (action in _ARROW_ACTIONS and own_arrows):
                return False
        return super().check_action(action, parameters)

    def action_seek_by(self, steps: int) -> None:
        """Pause and move the cursor by some steps."""
        self.replay.stop_playing()
        self.replay.seek(self.replay.cursor + steps)
        self.draw_frame()

    def action_seek_to(self, end: int) -> None:
        """Pause and move the cursor to the beginning (0) or the end (1)."""
        self.replay.stop_playing()
        self.replay.seek(self.replay.last_step if end else 0)
        self.draw_frame()

    def action_faster(self, by: int) -> None:
        """Choose the next higher (1) or lower (-1) speed."""
        now = self.replay.factor
        beyond = [n for n in SPEED_FACTORS if (n > now * 1.01 if by > 0 else n < now * 0.99)]
        if beyond:
            self.replay.factor = beyond[0] if by > 0 else beyond[-1]
        self.show_status_message(f"{format_factor(self.replay.factor)}× the recorded speed")
        self.draw_frame()

    def action_jump(self, kind: MarkKind, backwards: bool = False) -> None:
        """Jump to the next or previous event of a kind."""
        if kind == "spike":
            self._jump_to_spike(backwards)
            return
        step = self.replay.moments.next_event(kind, self.replay.cursor, backwards)
        if step is None:
            where = "before" if backwards else "after"
            self.show_status_message(f"no {KINDS[kind]} {where} this step")
            return
        self._jump(step, KINDS[kind])

    def _jump_to_spike(self, backwards: bool) -> None:
        spikes = self.replay.spikes()
        if not spikes:
            self.show_status_message("the loss has no spike")
            return
        self._spike = (self._spike + (-1 if backwards else 1)) % len(spikes)
        spike = spikes[self._spike]
        rank = "worst spike" if self._spike == 0 else f"spike {self._spike + 1} of {len(spikes)}"
        self._jump(spike.step, f"{rank}: loss {spike.loss:.4g}")

    def _jump(self, step: int, message: str) -> None:
        self.replay.stop_playing()
        self.replay.seek(step)
        self.draw_frame()
        self.show_status_message(message)

    async def action_of_screen(self, key: str) -> None:
        """Do what `key` does on the screen in front, or in the widget with the focus."""
        nodes = [self.focused, self.screen] if self.focused is not None else [self.screen]
        for node in nodes:
            for binding in bindings_of(node, key):
                await self.run_action(binding.action, node)
                return


def run_replay(replay: ReplaySession, *, ascii: bool = False, slow_link: bool = False) -> int:
    """Show a recorded run until the user leaves. Returns the exit code."""
    app = ReplayApp(replay, ascii=ascii, slow_link=slow_link, **initial_theme())
    return app.run_until_exit()
