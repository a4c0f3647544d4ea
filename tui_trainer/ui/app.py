"""The app: polls the session once a frame and hands the snapshot to the screen in front. The keys
that control the run are `CONTROL_BINDINGS` in `ui/screens/base.py`."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from rich.console import Console
from textual import events
from textual.app import App
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.filter import LineFilter
from textual.screen import Screen
from textual.timer import Timer

from tui_trainer.client.api import OnLaunch, Session, Snapshot
from tui_trainer.learn.demos import find_demo
from tui_trainer.learn.page import load_progress
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.inspection import Inspected, InspectionRequest, TensorRef
from tui_trainer.protocol.messages import BreakpointStop
from tui_trainer.ui import textual_hacks, theme
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.frames import FrameScheduler, OutputBacklog, terminal_link
from tui_trainer.ui.glyphs import ASCII, UNICODE, AsciiFilter, Glyphs
from tui_trainer.ui.guide import GuidedRuns
from tui_trainer.ui.leaving import Leaving
from tui_trainer.ui.lessons import lessons_for
from tui_trainer.ui.related_runs import RelatedRuns
from tui_trainer.ui.run_commands import RunCommands
from tui_trainer.ui.screens import SCREENS, ScreenMode
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.screens.dialogs import SnapshotDialog

if TYPE_CHECKING:
    from tui_trainer.ui.screens import AppContext
    from tui_trainer.ui.terminal_images import PixelSupport

FIRST_MESSAGE_S = 30.0
MIN_TICKS_PER_SECOND = 4.0
"""Lowest rate at which the app checks whether a frame is due."""
DUE_TOLERANCE_S = 0.002
FIND_RELATED_S, REFRESH_RELATED_S = 20.0, 2.0
"""Intervals at which to look for other runs of the same tree, and to read those that train."""
STATUS_MESSAGE_S = 4.0
"""How long the answer to a command stays in the header."""


class TuiTrainerApp(App[int]):
    """Shows one run; returns the exit code of the command."""

    TITLE = "tui-trainer"
    HOME_MODE: ClassVar[ScreenMode] = "dashboard"
    """The screen to which the others return. An app with another home than the dashboard offers
    only its home and the help."""

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
        start_mode: ScreenMode = "dashboard",
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
        `message`: shown for a while after the start. `demo`: the guided run to introduce. `pixels`:
        how the terminal draws pictures with real pixels; None: with characters.
        `frames_per_second` overrides the rate of the link, for tests.
        """
        # Set first: Textual's constructor calls `get_driver_class`.
        self._asks_background = (
            asks_background and os.environ.get("TERM", "") not in theme.NO_QUERIES
        )
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
        self.status_message = ""
        self.help_for: ScreenMode = start_mode if start_mode != "help" else "dashboard"
        self.learn_from: ScreenMode | Literal[""] = ""
        self.lesson = lesson
        self._message = message
        self.guided_runs = GuidedRuns(self)
        self.leaving = Leaving(self, ends_with_app)
        self.related_runs = RelatedRuns(self.schedule, self._related_changed)
        self.run_commands = RunCommands(
            self,
            accepted=self.show_status_message,
            refused=self.leaving.stop_refused,
            redraw=self.draw_frame,
        )
        self.backlog = OutputBacklog(self, self._tick)
        self._demo = demo
        self.language = load_progress().shown_language
        self.pixels = pixels
        self.lessons: tuple[str, ...] = ()
        self._start_mode = start_mode
        self._ascii_filter = AsciiFilter() if ascii else None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._polls_per_second = 0.0
        self._drawn_version = -1
        self._wake_scheduled = False
        self._message_timer: Timer | None = None
        self._screen_switch: ExitStack | None = None
        """The batch that suppresses drawing while one screen replaces another."""
        if slow_link:
            self.animation_level = "none"
            textual_hacks.use_256_colors(self.console)
        for entry in SCREENS:
            self.add_mode(entry.mode, entry.factory())
        for own_theme in theme.THEMES:
            self.register_theme(own_theme)
        if self.theme == theme_name:
            # Textual has taken the name from $TEXTUAL_THEME before the theme was registered.
            self.set_reactive(App.theme, "textual-dark")
        self.theme = theme_name
        self._remembers_theme = False
        """Whether to save the theme when it changes: only changes by the user are saved."""

    # ------------------------------------------------------------ start and end

    def on_mount(self) -> None:
        """Paint the first screen at once; everything else follows."""
        self.theme_changed_signal.subscribe(self, lambda _: self._update_palette())
        self._update_palette()
        self.switch_mode(self._start_mode)
        self.screen.call_after_refresh(self._load_others)
        self._event_loop = asyncio.get_running_loop()
        if self._asks_background and not self.is_headless:
            self.write_to_terminal(textual_hacks.BACKGROUND_QUERY)
        self._remembers_theme = not self.is_headless
        self.frame_scheduler.input_received(self._now())
        ticks_per_second = max(self.link.frames_per_second, MIN_TICKS_PER_SECOND)
        self.set_interval(1 / ticks_per_second, self._tick)
        self.set_interval(REFRESH_RELATED_S, self.related_runs.refresh)
        self.set_interval(FIND_RELATED_S, self.related_runs.find)
        if self.session is not None:
            self.attach(self.session)
        if self._demo:
            self.guided_runs.introduce(find_demo(self._demo))

    def _load_others(self) -> None:
        """Import the other screens after the first paint, which an importing thread would delay."""
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
            # Modules and widgets live until the app ends. Unless frozen, they are traversed by
            # every full collection, which delays a frame by 40 ms.
            gc.freeze()

    def attach(self, session: Session) -> None:
        """Show the run of `session`, the only one until the app ends."""
        assert self.session in (None, session)
        self.session = session
        self._drawn_version = -1
        self._polls_per_second = 0.0
        self._update_poll_rate()
        session.on_arrival(self._data_arrived)
        self._watch_topics()
        self.draw_frame()

    def on_unmount(self) -> None:
        """Disconnect; the run continues."""
        self.related_runs.close()
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
        pending = self.backlog.update()
        if pending:
            self.frame_scheduler.back_off()
        self._update_poll_rate()
        if not pending and self._seconds_until_due() <= DUE_TOLERANCE_S:
            self.backlog.frame_started()
            self.draw_frame()
        elif pending and self.frame_scheduler.requested:
            self.backlog.check_soon()

    def draw_frame(self) -> None:
        """Poll the session, and draw if anything has changed."""
        self._wake_scheduled = False
        if self.session is None:
            return
        snapshot = self.session.poll()
        if snapshot.version == self._drawn_version:
            return
        self.frame_scheduler.frame_started(self._now(), self.backlog.bytes_written)
        self._drawn_version = snapshot.version
        self.draw(snapshot)

    def draw(self, snapshot: Snapshot) -> None:
        """Show `snapshot` on the open screens."""
        if self.session is not None:
            self.related_runs.follow(self.snapshot, snapshot)
        snapshot = replace(snapshot, related=self.related_runs.runs)
        self.run_commands.notify_control_taken(self.snapshot, snapshot)
        before, self.snapshot = self.snapshot, snapshot
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen | SnapshotDialog) and screen.is_mounted:
                screen.show(snapshot)
        self._select_stopped_parameter(before.status.stopped_at)
        self.leaving.drawn()
        self.guided_runs.drawn()

    def _select_stopped_parameter(self, before: BreakpointStop | None) -> None:
        """Put the cursor on the parameter at which a breakpoint has just stopped the run."""
        stop = self.snapshot.status.stopped_at
        if stop is None or stop == before or not stop.parameter:
            return
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen):
                screen.select(stop.parameter)

    def _related_changed(self) -> None:
        """Draw the same snapshot again in the next frame."""
        self._drawn_version = -1

    def redraw(self) -> None:
        """Draw the current snapshot again, after a change in the app."""
        self.draw(self.snapshot)

    def _seconds_until_due(self) -> float:
        return self.frame_scheduler.seconds_until_due(self._now(), self.backlog.bytes_written)

    def _update_poll_rate(self) -> None:
        rate = self.frame_scheduler.polls_per_second(self._now())
        if self.session is not None and rate != self._polls_per_second:
            self._polls_per_second = rate
            self.session.set_rate(rate)

    def _data_arrived(self) -> None:
        """Called by the session, on any thread."""
        if not self._wake_scheduled:
            self._wake_scheduled = True
            self.schedule(self._wake)

    def schedule(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call `callback` on the event loop, from any thread, without waiting for the call."""
        loop = self._event_loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.call_next, callback, *arguments)

    def _wake(self) -> None:
        self._wake_scheduled = False
        if self.session is not None:
            new, drawn = self.session.poll(), self.snapshot
            if (new.link.state, new.status.state) != (drawn.link.state, drawn.status.state):
                self.frame_scheduler.request_frame()  # a link lost for a moment must be seen
        self._tick()  # when no frame is due yet, a later tick draws it

    def _now(self) -> float:
        return self._event_loop.time() if self._event_loop is not None else 0.0

    async def on_event(self, event: events.Event) -> None:
        """Note that the user is active, then handle the event as usual."""
        if isinstance(event, events.Key | events.MouseDown | events.MouseScrollDown | events.Paste):
            self.frame_scheduler.input_received(self._now())
            self._update_poll_rate()
        await super().on_event(event)

    # ------------------------------------------------------------ screens

    def action_go(self, mode: ScreenMode) -> None:
        """Switch to another screen."""
        if mode == "dashboard":
            mode = self.HOME_MODE
        current = cast(ScreenMode, self.current_mode)
        if mode == "help" and current != "help":
            self.help_for = current
            self.lessons = lessons_for(self.screen, self.snapshot.status)
        if mode == "learn":
            origin = self.help_for if current == "help" else current
            self.learn_from = self.learn_from if origin == "learn" else origin
        if mode != current:
            self.switch_mode(mode)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer the start screen only while no run is open."""
        if action == "go" and self.HOME_MODE != "dashboard":
            return parameters[0] in ("help", self.HOME_MODE)
        if action == "go" and parameters == ("start",):
            return self.on_launch is not None and self.session is None
        if action == "cure":
            return self.guided_runs.offers_cure()
        return True

    @property
    def guided_run_finishes(self) -> bool:
        """Whether a guided run continues to its end to be compared."""
        return self.guided_runs.finishing

    @property
    def cure_label(self) -> str:
        """The label of the key `C`, which depends on the stage of the guided run."""
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
            drawn = self._drawn_version
            self.draw_frame()  # the newest values at once: the next frame has nothing to change
            if self._drawn_version == drawn:
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
        self.run_commands.send(action)

    def inspect(
        self,
        request: InspectionRequest,
        answered: Callable[[Inspected], None],
        replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """Request an inspection. Calls `answered` on the event loop, or `replaced` when another
        request replaces this one."""
        self.run_commands.inspect(request, answered, replaced)

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

    # ------------------------------------------------------------ leaving

    async def action_quit(self) -> None:
        """Ask whether to detach or stop; leave at once where there is nothing to decide."""
        self.leaving.quit()

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
        if theme.is_light(*background):
            self.schedule(self._use_light_theme)

    def _use_light_theme(self) -> None:
        if self.theme == theme.DARK.name:
            self._remembers_theme = False
            self.theme = theme.LIGHT.name
            self.call_later(self._remember_from_now_on)

    def _remember_from_now_on(self) -> None:
        self._remembers_theme = not self.is_headless

    def _update_palette(self) -> None:
        self.palette = theme.palette(self.theme_variables, self.native_ansi_color)
        if self._remembers_theme:
            theme.remember_theme(self.theme)
        self.redraw()


def _ask_for_pixels() -> tuple[PixelSupport | None, str]:
    """The terminal's support for pixels, or None and the reason why it has none."""
    from tui_trainer.ui.terminal_images import HINT, ask_terminal

    support = ask_terminal()
    if support.placeholders and Console(force_terminal=True).color_system != "truecolor":
        support = replace(support, kitty=False)  # the image id is a 24-bit colour
    return (support, "") if support.in_app else (None, f"No pixels: {support.missing}. {HINT}")


def run_app(
    session: Session | None,
    *,
    ascii: bool = False,
    start_mode: ScreenMode = "dashboard",
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
    support, message = _ask_for_pixels() if pixels else (None, "")
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
        **theme.initial_theme(),
    ).run_until_exit()


if TYPE_CHECKING:

    def _is_app_context(app: TuiTrainerApp) -> AppContext:
        return app
