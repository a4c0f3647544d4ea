"""The app for `tui-trainer replay`: the same screens over a recorded run, with keys that move
through its time."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import ModalScreen, Screen
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.client.replay import ReplaySession
from tui_trainer.ui.app import TuiTrainerApp, choose_theme
from tui_trainer.ui.panels.transport import MarkKind, TransportLine, format_factor
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.textual_hacks import bindings_of
from tui_trainer.ui.widgets.keys import KeyLine

SPEED_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Playback speeds, as multiples of the recorded one."""
SCREENS_WITH_OWN_ARROWS = ("help", "start", "compare")
"""Screens on which the arrow keys do not move through time."""
KINDS = {"clip": "clip event", "nonfinite": "non-finite value", "mark": "mark", "spike": "spike"}

TRANSPORT_BINDINGS = (
    Binding("left", "seek_by(-1)", "Step back", show=False, priority=True, id="replay.back",
            tooltip="One step back in time"),
    Binding("right", "seek_by(1)", "Step on", show=False, priority=True, id="replay.on",
            tooltip="One step forward in time"),
    Binding("shift+left", "seek_by(-10)", "10 back", show=False, priority=True,
            id="replay.back_10", tooltip="Ten steps back"),
    Binding("shift+right", "seek_by(10)", "10 on", show=False, priority=True,
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
    Binding("C", "jump('clip', True)", "Clip before", show=False, id="replay.clip_before",
            tooltip="To the clip event before"),
    Binding("i", "jump('nonfinite')", "nan/inf", id="replay.nonfinite",
            tooltip="To the next non-finite value"),
    Binding("I", "jump('nonfinite', True)", "nan/inf before", show=False,
            id="replay.nonfinite_before", tooltip="To the non-finite value before"),
    Binding("z", "jump('spike')", "Spike", id="replay.spike",
            tooltip="To the worst spike of the loss; again: to the next worst, ten in all"),
    Binding("Z", "jump('spike', True)", "Worse spike", show=False, id="replay.spike_before",
            tooltip="Back to the spike that was worse"),
    Binding("b", "jump('mark')", "Mark", id="replay.mark", tooltip="To the next note of a user"),
    Binding("B", "jump('mark', True)", "Mark before", show=False, id="replay.mark_before",
            tooltip="To the note before"),
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
        """Index of the spike that was jumped to last."""

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
    app = ReplayApp(replay, ascii=ascii, slow_link=slow_link, theme_name=choose_theme())
    return app.run_until_exit()
