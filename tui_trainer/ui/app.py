"""The app: polls the session once a frame and hands the snapshot to the screen in front."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from textual import events
from textual.app import App
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.filter import LineFilter
from textual.screen import ModalScreen, Screen
from textual.theme import BUILTIN_THEMES
from textual.timer import Timer

from tui_trainer.client.api import OnLaunch, Session, Snapshot
from tui_trainer.comparison.related_runs import RelatedRun, find_related, open_related
from tui_trainer.learn.demos import find_demo
from tui_trainer.learn.reading_progress import load_progress
from tui_trainer.protocol import actions
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.inspection import (
    Inspected,
    InspectionRequest,
    OfRank,
    RankRequest,
    TensorRef,
)
from tui_trainer.protocol.messages import Ack, BreakpointStop
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.ui import textual_hacks, theme
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.frames import FrameScheduler, terminal_link
from tui_trainer.ui.glyphs import ASCII, UNICODE, AsciiFilter, Glyphs
from tui_trainer.ui.guide import GuidedRuns
from tui_trainer.ui.lessons import lessons_for
from tui_trainer.ui.screens import SCREENS
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.screens.dialogs import QuitDialog, SnapshotDialog
from tui_trainer.ui.terminal_images import HINT, PixelSupport, ask_terminal

if TYPE_CHECKING:
    from tui_trainer.ui.screens import AppContext
    from tui_trainer.ui.screens.ended import NextStep

FIRST_MESSAGE_S = 30.0
MIN_TICKS_PER_SECOND = 4.0
"""How often to check whether a frame is due, at least."""
MAX_PENDING_WRITES = 3
"""Pieces of output that may wait for the terminal before drawing stops. A frame is about three."""
DRAIN_CHECK_S = 0.02
"""A requested frame that finds output waiting for the terminal looks again after this time."""
MAX_DRAIN_CHECKS = 12
"""For one frame; later ones are left to the ticks, in case the terminal reads nothing."""
DUE_TOLERANCE_S = 0.002
SHOWN_BY_STATE = (actions.Pause, actions.Resume)
"""Commands whose effect the header shows anyway: `paused  after forward`, `running`."""
NO_QUERIES = ("dumb", "linux")
"""Terminals that would print the question about their background."""
LIGHT_ANSI_COLORS = (7, *range(9, 16))
"""Background colours of $COLORFGBG that are light, as Vim takes them."""
FIND_RELATED_S, REFRESH_RELATED_S = 20.0, 2.0
"""How often to look for other runs of the same tree, and to read on in those that train."""
STATUS_MESSAGE_S = 4.0
"""How long the answer to a command stays in the header."""


class TuiTrainerApp(App[int]):
    """Shows one run; returns the exit code of the command."""

    TITLE = "tui-trainer"
    next_command: ClassVar[tuple[str, ...]] = ()
    """The command of `tui-trainer` that the user has chosen to run after the app has closed."""
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
                entry.key,
                f"go('{entry.mode}')",
                entry.title,
                id=f"go.{entry.mode}",
                tooltip=entry.tooltip,
                show=False,
            )
            for entry in SCREENS
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
        Binding(
            "C",
            "cure",
            "Cure",
            key_display="C",
            id="demo.cure",
            tooltip="In a guided run: make the cure; after the end, show both curves",
        ),
        Binding("ctrl+c", "quit", "Quit", show=False, id="quit.ctrl_c", priority=True),
    ]

    def __init__(
        self,
        session: Session | None = None,
        *,
        ascii: bool = False,
        start_mode: str = "dashboard",
        on_launch: OnLaunch | None = None,
        frames_per_second: float | None = None,
        theme_name: str = theme.DARK.name,
        slow_link: bool = False,
        ends_with_app: bool = False,
        asks_background: bool = False,
        lesson: str = "",
        message: str = "",
        demo: str = "",
        pixels: PixelSupport | None = None,
    ) -> None:
        """`slow_link`: send the terminal few bytes. `asks_background`: ask the terminal whether its
        background is light, and use the light theme there. `ends_with_app`: the run trains inside
        this process, so leaving ends it. `lesson`: the page that the screen `learn` opens.
        `message`: shown for a while at first. `demo`: the guided run to introduce. `pixels`: draw
        pictures with them.
        `frames_per_second` overrides that of the link, for tests.
        """
        # Textual's own constructor asks for the driver's class.
        self._asks_background = asks_background and os.environ.get("TERM", "") not in NO_QUERIES
        super().__init__()
        self.session = session
        self.snapshot = Snapshot()
        self.link = terminal_link(slow_link)
        if frames_per_second is not None:
            self.link = replace(self.link, frames_per_second=frames_per_second)
        self.frame_scheduler = FrameScheduler(self.link)
        self.glyphs: Glyphs = ASCII if ascii else UNICODE
        self.palette: theme.Palette = theme.palette(self.theme_variables)
        self.inspected: TensorRef | None = None
        self.inspected_rank = 0
        self.on_launch = on_launch
        self.ends_with_app = ends_with_app
        self.status_message = ""
        self.help_for = start_mode if start_mode != "help" else "dashboard"
        self.learn_from = ""
        self.lesson = lesson
        self._message = message
        self.guided_runs = GuidedRuns(self)
        self._demo = demo
        self.language = load_progress().shown_language
        self.pixels = pixels
        self.lessons: tuple[str, ...] = ()
        self._start_mode = start_mode
        self._ascii_filter = AsciiFilter() if ascii else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._polls_per_second = 0.0
        self._drawn_version = -1
        self._wake_scheduled = False
        self._drain_timer: Timer | None = None
        self._drain_checks = 0
        """Made since the last frame."""
        self._stopping = False
        """The user asked to stop the run and leave: the app exits once the run has ended."""
        self._message_timer: Timer | None = None
        self._related: tuple[RelatedRun, ...] = ()
        self._related_to = ""
        """Directory of the run whose relatives they are."""
        self._screen_switch: ExitStack | None = None
        """The batch that suppresses drawing while one screen replaces another."""
        self._terminal_stalled: ExitStack | None = None
        """The batch that suppresses drawing while the terminal reads nothing."""
        if slow_link:
            self.animation_level = "none"
            textual_hacks.use_256_colors(self.console)
        for entry in SCREENS:
            self.add_mode(entry.mode, entry.factory())
        for own_theme in theme.THEMES:
            self.register_theme(own_theme)
        self.theme = theme_name
        self._theme_to_remember = False
        """Whether a change of the theme is one that the user made."""

    # ------------------------------------------------------------ start and end

    def on_mount(self) -> None:
        """Paint the first screen at once; everything else follows."""
        self.theme_changed_signal.subscribe(self, lambda _: self._update_palette())
        self._update_palette()
        self.switch_mode(self._start_mode)
        self.screen.call_after_refresh(self._load_others)
        self._loop = asyncio.get_running_loop()
        if self._asks_background and not self.is_headless:
            self.write_to_terminal(textual_hacks.BACKGROUND_QUERY)
        self._theme_to_remember = not self.is_headless
        self.frame_scheduler.input_received(self._now())
        ticks_per_second = max(self.link.frames_per_second, MIN_TICKS_PER_SECOND)
        self.set_interval(1 / ticks_per_second, self._tick)
        self.set_interval(REFRESH_RELATED_S, self._refresh_related)
        self.set_interval(FIND_RELATED_S, self._find_related)
        if self.session is not None:
            self.attach(self.session)
        if self._demo:
            self.guided_runs.introduce(find_demo(self._demo))

    def _load_others(self) -> None:
        """The first paint is done, which a thread that imports would have delayed."""
        self.run_worker(self._load_rest, thread=True, group="load")

    def _load_rest(self) -> None:
        """Import the other screens, on a thread."""
        for entry in SCREENS:
            entry.load()
        self.call_from_thread(self._loaded)

    def _loaded(self) -> None:
        if self._message:
            self.notify(self._message, timeout=FIRST_MESSAGE_S, markup=False)
        gc.enable()  # the command line disables it until the first paint
        if not self.is_headless:
            # Modules and widgets live until the end. Without this every full collection would
            # traverse them, and hold up a frame for 40 ms.
            gc.freeze()

    def attach(self, session: Session) -> None:
        """Show the run of `session` from now on."""
        if self.session is not session:
            self._close_session()
            self.inspected_rank = 0
        self.session = session
        self._drawn_version = -1
        self._polls_per_second = 0.0
        self._update_poll_rate()
        session.on_arrival(self._data_arrived)
        self._watch_topics()
        self.draw_frame()

    def on_unmount(self) -> None:
        """Disconnect; the run continues."""
        self._related = open_related((), self._related)
        self._close_session()

    def _close_session(self) -> None:
        if self.session is not None:
            self.session.on_arrival(None)
            self.session.close()

    def run_until_exit(self) -> int:
        """Run the app; returns 0, or 1 when the app itself failed."""
        code = self.run()
        return self.return_code or code or 0

    # ------------------------------------------------------------ frames

    def _tick(self) -> None:
        """Draw if a frame is due and the terminal has read the one before."""
        pending = textual_hacks.pending_writes(textual_hacks.driver_of(self))
        if pending:
            self.frame_scheduler.back_off()
        if pending >= MAX_PENDING_WRITES and self._terminal_stalled is None:
            self._terminal_stalled = ExitStack()
            self._terminal_stalled.enter_context(self.batch_update())
        elif not pending and self._terminal_stalled is not None:
            self._terminal_stalled.close()
            self._terminal_stalled = None
            self._draw_suppressed()
        self._update_poll_rate()
        if not pending and self._seconds_until_due() <= DUE_TOLERANCE_S:
            self._drain_checks = 0
            self.draw_frame()
        elif pending and self.frame_scheduler.requested:
            self._check_again()

    def _draw_suppressed(self) -> None:
        """Draw what has changed while drawing was suppressed.

        The end of Textual's batch draws nothing: a changed widget waits for the next message to its
        screen, and there is none until something else changes, which in a paused run is never.
        """
        for screen in self.screen_stack:
            screen.check_idle()

    def _check_again(self) -> None:
        """Look soon whether the terminal has read its output, rather than at the next tick."""
        if self._drain_timer is None and self._drain_checks < MAX_DRAIN_CHECKS:
            self._drain_checks += 1
            self._drain_timer = self.set_timer(DRAIN_CHECK_S, self._check_drained)

    def _check_drained(self) -> None:
        self._drain_timer = None
        if textual_hacks.pending_writes(textual_hacks.driver_of(self)):
            self._check_again()
        else:
            self._tick()

    def draw_frame(self) -> None:
        """Poll the session, and draw if anything has changed."""
        self._wake_scheduled = False
        if self.session is None:
            return
        snapshot = self.session.poll()
        if snapshot.version == self._drawn_version:
            return
        written = textual_hacks.bytes_written(textual_hacks.driver_of(self))
        self.frame_scheduler.frame_started(self._now(), written)
        self._drawn_version = snapshot.version
        self.draw(snapshot)

    def draw(self, snapshot: Snapshot) -> None:
        """Show `snapshot` on the open screens."""
        self._look_for_branches(snapshot)
        snapshot = replace(snapshot, related=self._related)
        self._notify_control_taken(snapshot)
        before, self.snapshot = self.snapshot, snapshot
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen | SnapshotDialog) and screen.is_mounted:
                screen.show(snapshot)
        self._go_to_culprit(before.status.stopped_at)
        if self._stopping and snapshot.status.ended:
            self.exit(0)
        self.guided_runs.drawn()

    def _go_to_culprit(self, before: BreakpointStop | None) -> None:
        """Put the cursor on the parameter of a breakpoint that has just been reached."""
        stop = self.snapshot.status.stopped_at
        if stop is None or stop == before or not stop.parameter:
            return
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen):
                screen.select(stop.parameter)

    def _look_for_branches(self, new: Snapshot) -> None:
        """Look for the other runs of the tree when the run is known and when a branch is made."""
        info, known = new.info, self.snapshot
        if info is None or self.session is None:
            return
        fresh = new.events[-3:] if new.events is not known.events else ()
        made = any(isinstance(each, Notice) and each.kind == "branch" for each in fresh)
        if self._related_to != info.directory or made:
            self._related_to = info.directory
            self.call_later(self._find_related)

    def _find_related(self) -> None:
        info = self.snapshot.info
        if info is None:
            return

        def find() -> None:
            found = find_related(info)
            self.call_from_thread(self._show_related, found)

        self.run_worker(find, thread=True, group="related", exclusive=True, exit_on_error=False)

    def _show_related(self, found: Sequence[RunEntry]) -> None:
        if found or self._related:
            self._related = open_related(found, self._related)
            self.redraw()

    def _refresh_related(self) -> None:
        """Read on in branches that train."""
        changed = [run.refresh() for run in self._related if run.run.live]
        if any(changed):
            self.redraw()

    def redraw(self) -> None:
        """Draw the same snapshot again, after a change that is not the run's."""
        self.draw(self.snapshot)

    def _seconds_until_due(self) -> float:
        written = textual_hacks.bytes_written(textual_hacks.driver_of(self))
        return self.frame_scheduler.seconds_until_due(self._now(), written)

    def _update_poll_rate(self) -> None:
        rate = self.frame_scheduler.polls_per_second(self._now())
        if self.session is not None and rate != self._polls_per_second:
            self._polls_per_second = rate
            self.session.set_rate(rate)

    def _data_arrived(self) -> None:
        """Called by the session, on any thread."""
        if self._loop is not None and not self._wake_scheduled and not self._loop.is_closed():
            self._wake_scheduled = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False
        if self.session is not None:
            new, drawn = self.session.poll(), self.snapshot
            if (new.link.state, new.status.state) != (drawn.link.state, drawn.status.state):
                self.frame_scheduler.request_frame()  # a link lost for a moment must be seen
        self.call_next(self._tick)  # when no frame is due yet, a later tick draws it

    def _now(self) -> float:
        return self._loop.time() if self._loop is not None else 0.0

    async def on_event(self, event: events.Event) -> None:
        """Note that the user is active, then handle the event as usual."""
        if isinstance(event, events.Key | events.MouseDown | events.MouseScrollDown | events.Paste):
            self.frame_scheduler.input_received(self._now())
            self._update_poll_rate()
        await super().on_event(event)

    # ------------------------------------------------------------ screens

    def action_go(self, mode: str) -> None:
        """Switch to another screen."""
        if mode == "help" and self.current_mode != "help":
            self.help_for = self.current_mode
            self.lessons = lessons_for(self.screen, self.snapshot.status)
        if mode == "learn":
            origin = self.help_for if self.current_mode == "help" else self.current_mode
            self.learn_from = self.learn_from if origin == "learn" else origin
        if mode != self.current_mode:
            self.switch_mode(mode)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer the start screen only while no run is open."""
        if action == "go" and parameters == ("start",):
            return self.on_launch is not None and self.session is None
        if action == "cure":
            return self.guided_runs.offers_cure()
        return True

    @property
    def guided_run_finishes(self) -> bool:
        """Whether a guided run goes on to its end to be compared."""
        return self.guided_runs.finishing

    @property
    def cure_label(self) -> str:
        """What the key of a guided run does now."""
        return self.guided_runs.label()

    def action_cure(self) -> None:
        """Make the cure of a guided run; after its end, show both curves."""
        self.guided_runs.cure()

    def start_demo(self, name: str, introduced: bool = False) -> None:
        """Start a guided run; `introduced`: the user has read what it shows."""
        self.guided_runs.start(name, introduced)

    def screen_resumed(self, screen: Screen[Any]) -> None:
        """Draw a screen that came to the front, and watch the tables that it shows."""
        self._watch_topics()
        if isinstance(screen, RunScreen) and screen.is_mounted:
            screen.show(self.snapshot)
            if screen.wanted:
                screen.select(screen.wanted)
                screen.wanted = ""
            self._end_screen_switch()

    def delay_update(self, delay: float = 0.05) -> None:
        """Suppress drawing while one screen replaces another.

        Textual waits for the whole delay. Here drawing resumes as soon as the new screen has been
        given its snapshot.
        """
        self._end_screen_switch()
        self._screen_switch = ExitStack()
        self._screen_switch.enter_context(self.batch_update())
        self.set_timer(delay, self._end_screen_switch, name="delay_update")

    def _end_screen_switch(self) -> None:
        if self._screen_switch is not None:
            self._screen_switch.close()
            self._screen_switch = None
            self.screen.refresh()

    def _watch_topics(self) -> None:
        if self.session is not None:
            screens = [s for s in self.screen_stack if isinstance(s, RunScreen)]
            self.session.watch(frozenset().union(*(screen.topics for screen in screens)))

    # ------------------------------------------------------------ commands

    def command(self, action: Action) -> None:
        """Send a command to the run; its answer is shown when it arrives."""
        if self.session is None:
            self.notify("no run is open yet", severity="warning")
            return
        self.session.send(action).add_done_callback(partial(self._answered, action))

    def _answered(self, action: Action, answer: Future[Ack]) -> None:
        """Called by the session, on any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.call_next, self._show_answer, action, answer)

    def _show_answer(self, action: Action, answer: Future[Ack]) -> None:
        error = answer.exception() if not answer.cancelled() else None
        if answer.cancelled() or error is not None:
            text = str(error or "not sent")
            self.notify(text, title="command failed", severity="error", markup=False)
            return
        ack = answer.result()
        if not ack.ok:
            self._stopping = False
            text = f"{ack.message}\n{ack.hint}" if ack.hint else ack.message
            self.notify(text, title="command refused", severity="warning", markup=False)
        elif ack.message and not isinstance(action, SHOWN_BY_STATE):
            self.show_status_message(ack.message)
        # Not ack.status: the session delivers it in order with the others, and drawn from here it
        # could replace a newer one.
        self.draw_frame()

    def inspect(self, request: InspectionRequest, answered: Callable[[Inspected], None]) -> None:
        """Request an inspection; `answered` is called on the event loop, unless another request
        replaces this one."""
        if self.session is None:
            return
        if self.inspected_rank and isinstance(request, RankRequest):
            request = OfRank(self.inspected_rank, request)

        def arrived(future: Future[Inspected]) -> None:
            """Called by the session, on any thread."""
            loop = self._loop
            if not future.cancelled() and loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self.call_next, answered, future.result())

        self.session.inspect(request).add_done_callback(arrived)

    def write_to_terminal(self, data: str) -> None:
        """Write an escape sequence between two frames."""
        driver = textual_hacks.driver_of(self)
        if driver is not None:
            driver.write(data)

    def show_tensor(self, tensor: TensorRef) -> None:
        """Open a tensor in the inspector."""
        self.inspected = tensor
        self.action_go("inspect")

    def show_lesson(self, page: str) -> None:
        """Open a page of `tui-trainer learn`."""
        self.lesson = page
        self.action_go("learn")

    def show_status_message(self, message: str) -> None:
        """Show one short line in the header for a few seconds."""
        self.status_message = message
        if self._message_timer is not None:
            self._message_timer.stop()
        self._message_timer = self.set_timer(STATUS_MESSAGE_S, self._clear_status_message)
        self.redraw()

    def _clear_status_message(self) -> None:
        self.status_message = ""
        self.redraw()

    def _notify_control_taken(self, new: Snapshot) -> None:
        """Tell the user when another viewer takes control from this one."""
        own_id, controller = new.link.viewer_id, new.status.controller
        if own_id is None or controller in (None, own_id):
            return
        if self.snapshot.status.controller != own_id:
            return
        notices = (event for event in reversed(new.events) if isinstance(event, Notice))
        taken = (notice for notice in notices if notice.kind == "control")
        who = next((notice.who for notice in taken), "")
        self.notify(
            f"{who or 'another viewer'} has taken control\nctrl+t takes it back",
            severity="warning",
            markup=False,
        )

    # ------------------------------------------------------------ after the end

    def ask_next(self) -> None:
        """Offer what can be done with a run that has ended; what is chosen is run on leaving."""
        if self.snapshot.info is not None and not isinstance(self.screen, ModalScreen):
            self.run_worker(partial(self._find_next_steps, self.snapshot.info), thread=True)

    def _find_next_steps(self, info: RunInfo) -> None:
        from tui_trainer.ui.screens.ended import next_steps

        found = next_steps(info, replayed=self.snapshot.link.state == "replay")
        self.call_from_thread(self._offer_next_steps, found)

    def _offer_next_steps(self, found: list[NextStep]) -> None:
        from tui_trainer.ui.screens.ended import EndedDialog

        if found:
            self.push_screen(EndedDialog(found), self.leave_for)
        else:
            self.notify("the recording of this run is on another machine", severity="warning")

    def leave_for(self, command: tuple[str, ...] | None) -> None:
        """Leave, and run another command of `tui-trainer` then."""
        if command is not None:
            TuiTrainerApp.next_command = command
            self.exit(0)

    def leave_run_for(self, command: tuple[str, ...]) -> None:
        """The same, once the user has said what is to become of the run that is open."""
        if self._nothing_to_leave:
            self.leave_for(command)
        else:
            answered = partial(self._quit_answered, command)
            self.push_screen(QuitDialog(self.ends_with_app), answered)

    # ------------------------------------------------------------ quitting

    async def action_quit(self) -> None:
        """Ask whether to detach or stop; leave at once where there is nothing to decide."""
        if isinstance(self.screen, ModalScreen) or self._nothing_to_leave:
            self.exit(0)
        else:
            answered = partial(self._quit_answered, ())
            self.push_screen(QuitDialog(self.ends_with_app), answered)

    @property
    def _nothing_to_leave(self) -> bool:
        """Whether leaving decides nothing about a run."""
        status, link = self.snapshot.status, self.snapshot.link
        no_run = self.session is None or status.ended
        return no_run or link.state != "live" or link.read_only

    def _quit_answered(self, command: tuple[str, ...], choice: str | None) -> None:
        if choice is not None:
            TuiTrainerApp.next_command = command
        if choice == "detach":
            self.exit(0)
        elif choice in ("stop", "checkpoint"):
            self._stopping = True
            self.command(actions.Stop(checkpoint=choice == "checkpoint"))

    # ------------------------------------------------------------ appearance

    def get_driver_class(self) -> type[Driver]:
        """Textual's driver, with its output counted."""
        if self._asks_background:
            textual_hacks.take_background_replies(self._background_known)
        return textual_hacks.metered(super().get_driver_class())

    def get_line_filters(self) -> list[LineFilter]:
        """Textual's filters, and the translation to ASCII under `--ascii`."""
        filters = list(super().get_line_filters())
        return [*filters, self._ascii_filter] if self._ascii_filter is not None else filters

    def _background_known(self, background: tuple[float, float, float]) -> None:
        """Called on the thread that reads the terminal."""
        loop = self._loop
        if theme.is_light(*background) and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.call_next, self._use_light_theme)

    def _use_light_theme(self) -> None:
        if self.theme == theme.DARK.name:
            self._theme_to_remember = False
            self.theme = theme.LIGHT.name
            self.call_later(self._remember_from_now_on)

    def _remember_from_now_on(self) -> None:
        self._theme_to_remember = not self.is_headless

    def _update_palette(self) -> None:
        self.palette = theme.palette(self.theme_variables, self.native_ansi_color)
        if self._theme_to_remember:
            theme.remember_theme(self.theme)
        self.redraw()


def theme_options() -> dict[str, Any]:
    """The theme to start with, as options of the app: $TEXTUAL_THEME; else the one that was chosen
    last; else Textual's 16-colour theme on a terminal with 16 colours; else ours for a light or a
    dark background, as $COLORFGBG or the terminal says."""
    known = {*BUILTIN_THEMES, *(own_theme.name for own_theme in theme.THEMES)}
    for requested in (os.environ.get("TEXTUAL_THEME", ""), theme.remembered_theme()):
        if requested in known:
            return {"theme_name": requested}
    if Console(force_terminal=True).color_system == "standard":
        return {"theme_name": "ansi-dark"}
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    if background.isdigit():
        light = int(background) in LIGHT_ANSI_COLORS
        return {"theme_name": theme.LIGHT.name if light else theme.DARK.name}
    return {"theme_name": theme.DARK.name, "asks_background": True}


def _ask_for_pixels() -> PixelSupport:
    support = ask_terminal()
    if support.placeholders and Console(force_terminal=True).color_system != "truecolor":
        return replace(support, kitty=False)  # a picture's number is a colour of 24 bits
    return support


def run_app(
    session: Session | None,
    *,
    ascii: bool = False,
    start_mode: str = "dashboard",
    on_launch: OnLaunch | None = None,
    slow_link: bool = False,
    ends_with_app: bool = False,
    lesson: str = "",
    demo: str = "",
    pixels: bool = False,
) -> int:
    """Show `session` (or the start screen) until the user leaves, and restore the terminal.

    `slow_link`: send the terminal few bytes. `ends_with_app`: leaving ends the run. `pixels`: draw
    heat maps with real pixels where the terminal has them. Returns the exit code: 0, or 1 when the
    app itself failed.
    """
    message = ""
    support = _ask_for_pixels() if pixels else None
    if support is not None and not support.in_app:
        message = f"No pixels: {support.missing}. {HINT}"
        support = None
    return TuiTrainerApp(
        session,
        ascii=ascii,
        start_mode=start_mode,
        on_launch=on_launch,
        slow_link=slow_link,
        ends_with_app=ends_with_app,
        lesson=lesson,
        message=message,
        demo=demo,
        pixels=support,
        **theme_options(),
    ).run_until_exit()


if TYPE_CHECKING:

    def _is_app_context(app: TuiTrainerApp) -> AppContext:
        return app
