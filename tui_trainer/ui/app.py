"""The app: holds the session, pulls one snapshot a frame, and hands it to the screen in front."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from textual.app import App
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.screen import ModalScreen
from textual.theme import BUILTIN_THEMES
from textual.timer import Timer

from tui_trainer.protocol import messages
from tui_trainer.protocol.messages import Ack, Action
from tui_trainer.session.api import Session, Snapshot
from tui_trainer.ui import theme
from tui_trainer.ui.glyphs import ASCII, UNICODE, AsciiFilter, Glyphs
from tui_trainer.ui.launch import LaunchError, LaunchRequest, OnLaunch
from tui_trainer.ui.palette import ActionProvider
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.screens.dialogs import QuitDialog
from tui_trainer.ui.screens.registry import PLACES
from tui_trainer.ui.widgets import plot

FRAMES_PER_SECOND = 4.0
SAID_S = 4.0
"""How long the answer to a command stays in the header, in seconds."""


class TuiTrainerApp(App[int]):
    """Shows one run. Its exit code is that of the command."""

    TITLE = "tui-trainer"
    CSS_PATH = Path(__file__).with_name("app.tcss")
    ENABLE_COMMAND_PALETTE = True
    COMMANDS = App.COMMANDS | {ActionProvider}
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-narrow"),
        (100, "-medium"),
        (160, "-wide"),
    ]
    VERTICAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-short"),
        (32, "-tall"),
        (50, "-very-tall"),
    ]
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(
                place.key,
                f"go('{place.mode}')",
                place.title,
                id=f"go.{place.mode}",
                tooltip=place.tooltip,
                show=False,
            )
            for place in PLACES
        ),
        Binding(
            "question_mark",
            "go('help')",
            "Help",
            key_display="?",
            id="help",
            tooltip="Every key, and what the quantities mean",
        ),
        Binding("q,x", "quit", "Quit", id="quit", tooltip="Leave: detach from the run or stop it"),
        Binding("ctrl+c", "quit", "Quit", show=False, id="quit.ctrl_c", priority=True),
    ]

    def __init__(
        self,
        session: Session | None = None,
        *,
        ascii: bool = False,
        start_mode: str = "dashboard",
        on_launch: OnLaunch | None = None,
        frames_per_second: float = FRAMES_PER_SECOND,
        theme_name: str = theme.DARK.name,
    ) -> None:
        super().__init__()
        self.session = session
        self.glyphs: Glyphs = ASCII if ascii else UNICODE
        self.snapshot = Snapshot()
        self.palette: theme.Palette = theme.palette(self.theme_variables)
        self.on_launch = on_launch
        self.frames_per_second = frames_per_second
        self._start_mode = start_mode
        self._ascii_filter = AsciiFilter() if ascii else None
        self.said = ""
        """What the last command did, for a moment."""
        self._forget: Timer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving = False
        """The user asked to stop and leave: the app goes when the run has ended."""
        self._drawn_version = -1
        self._last_frame = 0.0
        self._wake_scheduled = False
        for place in PLACES:
            self.add_mode(place.mode, place.factory())
        for ours in theme.THEMES:
            self.register_theme(ours)
        self.theme = theme_name

    # ------------------------------------------------------------ life

    def on_mount(self) -> None:
        """Paint the first screen at once; everything else comes when it comes."""
        self._loop = asyncio.get_running_loop()
        self.theme_changed_signal.subscribe(self, lambda _: self._restyle())
        self._restyle()
        self.switch_mode(self._start_mode)
        self.set_interval(1 / self.frames_per_second, self.frame)
        self.run_worker(self._load_plot, thread=True, group="load")
        if self.session is not None:
            self.attach(self.session)

    def _load_plot(self) -> None:
        """The plotting library comes after the first paint, off the event loop."""
        if not plot.ready():
            plot.load()
            self.call_from_thread(self.redraw)

    def attach(self, session: Session) -> None:
        """Show this run from now on."""
        if self.session is not None and self.session is not session:
            self.session.on_arrival(None)
            self.session.close()
        self.session = session
        self._drawn_version = -1
        session.set_rate(self.frames_per_second)
        session.on_arrival(self._arrived)
        self._watch_topics()
        self.frame()

    def on_unmount(self) -> None:
        """End the link; the run goes on."""
        if self.session is not None:
            self.session.on_arrival(None)
            self.session.close()

    # ------------------------------------------------------------ frames

    def frame(self) -> None:
        """Pull, and draw if anything is new."""
        self._wake_scheduled = False
        self._last_frame = self._now()
        if self.session is None:
            return
        snapshot = self.session.poll()
        if snapshot.version == self._drawn_version:
            return
        self._drawn_version = snapshot.version
        self._show(snapshot)
        if self._leaving and snapshot.status.ended:
            self.exit(0)

    def _show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen) and screen.is_mounted:
                screen.show(snapshot)

    def redraw(self) -> None:
        """Draw the present picture again, for a change that is not the run's."""
        self._show(self.snapshot)

    def shown_again(self, screen: RunScreen) -> None:
        """A screen came to the front: it is given the present picture."""
        self._watch_topics()
        if screen.is_mounted:
            screen.show(self.snapshot)

    def _arrived(self) -> None:
        """From any thread: something new is there. Frames are never closer than the frame rate."""
        if self._loop is not None and not self._wake_scheduled and not self._loop.is_closed():
            self._wake_scheduled = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        due = self._last_frame + 1 / self.frames_per_second - self._now()
        if due <= 0.002:
            self.call_next(self.frame)
        else:
            self._wake_scheduled = False  # the timer's next tick takes it

    def _now(self) -> float:
        return self._loop.time() if self._loop is not None else 0.0

    def _watch_topics(self) -> None:
        if self.session is not None:
            screens = [s for s in self.screen_stack if isinstance(s, RunScreen)]
            self.session.watch(frozenset().union(*(screen.topics for screen in screens)))

    # ------------------------------------------------------------ commands

    def command(self, action: Action) -> None:
        """Send a command; its answer is shown the moment it comes, refused or not."""
        if self.session is None:
            self.notify("no run is open yet", severity="warning")
            return
        self.session.send(action).add_done_callback(partial(self._answered, action))

    def _answered(self, action: Action, answer: Future[Ack]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.call_next, self._acknowledge, action, answer)

    def _acknowledge(self, action: Action, answer: Future[Ack]) -> None:
        fault = answer.exception() if not answer.cancelled() else None
        if answer.cancelled() or fault is not None:
            self.notify(str(fault or "not sent"), title="not done", severity="error")
            return
        ack = answer.result()
        if not ack.ok:
            self._leaving = False
            text = f"{ack.message}\n{ack.hint}" if ack.hint else ack.message
            self.notify(text, title="not done", severity="warning", markup=False)
        elif ack.message:
            self.say(ack.message)
        if self.snapshot.status != ack.status:
            self._show(replace(self.snapshot, status=ack.status))
        self.frame()

    def say(self, message: str) -> None:
        """One short line about what was just done, shown in the header for a moment."""
        self.said = message
        if self._forget is not None:
            self._forget.stop()
        self._forget = self.set_timer(SAID_S, self._unsay)
        self.redraw()

    def _unsay(self) -> None:
        self.said = ""
        self.redraw()

    # ------------------------------------------------------------ actions

    def action_go(self, mode: str) -> None:
        """Show another screen."""
        if mode != self.current_mode:
            self.switch_mode(mode)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The start screen is there only while no run is."""
        if action == "go" and parameters == ("start",):
            return self.on_launch is not None and self.session is None
        return True

    def launch(self, request: LaunchRequest) -> None:
        """Start a training off the event loop, then show its dashboard."""
        self.run_worker(partial(self._launch, request), thread=True, exclusive=True, group="launch")

    def _launch(self, request: LaunchRequest) -> None:
        assert self.on_launch is not None
        try:
            session = self.on_launch(request)
        except LaunchError as fault:
            text = f"{fault}\n{fault.hint}" if fault.hint else str(fault)
            self.call_from_thread(self.notify, text, title="not started", severity="error")
        else:
            self.call_from_thread(self._launched, session)

    def _launched(self, session: Session) -> None:
        self.attach(session)
        self.action_go("dashboard")

    async def action_quit(self) -> None:
        """Ask what becomes of the run; without a living one, just leave."""
        status, link = self.snapshot.status, self.snapshot.link
        if isinstance(self.screen, ModalScreen):
            self.exit(0)  # asked for twice: the run goes on
        elif self.session is None or status.ended or link.state in ("closed", "replay"):
            self.exit(0)
        elif link.read_only or link.state != "live":
            self.exit(0)  # nothing to decide: the run goes on without us
        else:
            self.push_screen(QuitDialog(), self._leave)

    def _leave(self, choice: str | None) -> None:
        if choice == "detach":
            self.exit(0)
        elif choice in ("stop", "checkpoint"):
            self._leaving = True
            self.command(messages.Stop(checkpoint=choice == "checkpoint"))

    # ------------------------------------------------------------ look

    def get_line_filters(self) -> list[LineFilter]:
        """Textual's, and the translation to ASCII under `--ascii`."""
        filters = list(super().get_line_filters())
        return [*filters, self._ascii_filter] if self._ascii_filter is not None else filters

    def _restyle(self) -> None:
        self.palette = theme.palette(self.theme_variables, self.native_ansi_color)
        self.redraw()


def choose_theme() -> str:
    """The theme asked for by `TEXTUAL_THEME`; else Textual's sixteen-colour one where the terminal
    has no more, and ours everywhere else."""
    asked = os.environ.get("TEXTUAL_THEME", "")
    if asked in {*BUILTIN_THEMES, *(ours.name for ours in theme.THEMES)}:
        return asked
    sixteen = Console(force_terminal=True).color_system == "standard"
    return "ansi-dark" if sixteen else theme.DARK.name


def run_app(
    session: Session | None,
    *,
    ascii: bool = False,
    start_mode: str = "dashboard",
    on_launch: OnLaunch | None = None,
) -> int:
    """Show `session` (or the start screen) until the user leaves; the terminal is restored on every
    exit. Returns the exit code: 0, or 1 when the app itself failed."""
    app = TuiTrainerApp(
        session,
        ascii=ascii,
        start_mode=start_mode,
        on_launch=on_launch,
        theme_name=choose_theme(),
    )
    code: Any = app.run()
    return app.return_code or (code if isinstance(code, int) else 0)
