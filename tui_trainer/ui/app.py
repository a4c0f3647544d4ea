"""The app: holds the session, pulls one snapshot a frame, and hands it to the screen in front."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from rich.color import ColorSystem
from rich.console import Console
from textual import events
from textual.app import App
from textual.binding import Binding, BindingType
from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.driver import Driver
from textual.filter import LineFilter
from textual.screen import ModalScreen
from textual.theme import BUILTIN_THEMES
from textual.timer import Timer

from tui_trainer.client.api import Session, Snapshot
from tui_trainer.client.launch import OnLaunch
from tui_trainer.protocol import messages
from tui_trainer.protocol.messages import TAKE_CONTROL_TEXT, Ack, Action, Notice
from tui_trainer.ui import textual_hacks, theme
from tui_trainer.ui.frames import FAST, SLOW, FrameScheduler, TerminalLink
from tui_trainer.ui.glyphs import ASCII, UNICODE, AsciiFilter, Glyphs
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.screens.dialogs import QuitDialog
from tui_trainer.ui.screens.registry import PLACES
from tui_trainer.ui.widgets import chart

# ---- drawing
# The half of the app that draws: pulls a snapshot a frame and hands it to the screens, no oftener
# than the pace allows and never while the terminal takes nothing.


TICKS_PER_SECOND = 4.0
"""How often it is looked whether a frame is due."""
HELD_WRITES = 3
"""Pieces of output that may wait for the terminal before drawing stops: a frame is three."""


class DrawingApp(App[int]):
    """Base of the app: what is on its screens, and what it says to the run, is for others."""

    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, session: Session | None, link: TerminalLink) -> None:
        super().__init__()
        self.session = session
        self.snapshot = Snapshot()
        self.link = link
        self.pace = FrameScheduler(link)
        self._rate = 0.0
        """Polls a second that the session was told."""
        self._drawn_version = -1
        self._wake_scheduled = False
        self._switching: ExitStack | None = None
        self._held: ExitStack | None = None
        """While the terminal takes nothing, nothing is drawn."""

    # ------------------------------------------------------------ the session

    def begin_frames(self) -> None:
        """Once the first screen is up."""
        self._loop = asyncio.get_running_loop()
        self.pace.touched(self._now())
        self.set_interval(1 / max(self.link.frames_per_second, TICKS_PER_SECOND), self._tick)
        if self.session is not None:
            self.attach(self.session)

    def attach(self, session: Session) -> None:
        """Show this run from now on."""
        if self.session is not None and self.session is not session:
            self.session.on_arrival(None)
            self.session.close()
        self.session = session
        self._drawn_version = -1
        self._rate = 0.0
        self._set_rate()
        session.on_arrival(self._arrived)
        self._watch_topics()
        self.frame()

    def on_unmount(self) -> None:
        """End the link; the run goes on."""
        if self.session is not None:
            self.session.on_arrival(None)
            self.session.close()

    # ------------------------------------------------------------ frames

    def _tick(self) -> None:
        """Draw if a frame is due and the terminal has taken the one before."""
        behind = textual_hacks.waiting(self._driver)
        if behind:
            self.pace.waits()
        if behind >= HELD_WRITES and self._held is None:
            self._held = ExitStack()
            self._held.enter_context(self.batch_update())
        elif not behind and self._held is not None:
            self._held.close()  # what changed meanwhile is drawn in one piece
            self._held = None
        self._set_rate()
        if not behind and self._due() <= 0.002:
            self.frame()

    def _due(self) -> float:
        return self.pace.due(self._now(), textual_hacks.written(self._driver))

    def _set_rate(self) -> None:
        rate = self.pace.polls_per_second(self._now())
        if self.session is not None and rate != self._rate:
            self._rate = rate
            self.session.set_rate(rate)

    async def on_event(self, event: events.Event) -> None:
        """Every key and click on its way in: somebody is there."""
        if isinstance(event, events.Key | events.MouseDown | events.MouseScrollDown | events.Paste):
            self.pace.touched(self._now())
            self._set_rate()
        await super().on_event(event)

    def frame(self) -> None:
        """Pull, and draw if anything is new."""
        self._wake_scheduled = False
        if self.session is None:
            return
        snapshot = self.session.poll()
        if snapshot.version == self._drawn_version:
            return
        self.pace.drawn(self._now(), textual_hacks.written(self._driver))
        self._drawn_version = snapshot.version
        self.draw(snapshot)

    def draw(self, snapshot: Snapshot) -> None:
        """Hand the picture to the screens that are open."""
        self.snapshot = snapshot
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen) and screen.is_mounted:
                screen.show(snapshot)

    def redraw(self) -> None:
        """Draw the present picture again, for a change that is not the run's."""
        self.draw(self.snapshot)

    def shown_again(self, screen: RunScreen) -> None:
        """A screen came to the front: it is given the present picture."""
        self._watch_topics()
        if screen.is_mounted:
            screen.show(self.snapshot)
            self._draw_again()

    def _arrived(self) -> None:
        """From any thread: something new is there. Frames are never closer than the frame rate."""
        if self._loop is not None and not self._wake_scheduled and not self._loop.is_closed():
            self._wake_scheduled = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False
        if self.session is not None:
            now, drawn = self.session.poll(), self.snapshot
            if (now.link.state, now.status.state) != (drawn.link.state, drawn.status.state):
                self.pace.at_once()  # a link that was lost for a moment is said to have been
        self.call_next(self._tick)  # not due yet: a later tick takes it

    def _now(self) -> float:
        return self._loop.time() if self._loop is not None else 0.0

    def _watch_topics(self) -> None:
        if self.session is not None:
            screens = [s for s in self.screen_stack if isinstance(s, RunScreen)]
            self.session.watch(frozenset().union(*(screen.topics for screen in screens)))

    # ------------------------------------------------------------ from one screen to another

    def delay_update(self, delay: float = 0.05) -> None:
        """Draw nothing while one screen makes room for another: for `delay` seconds, as Textual has
        it, or until the other has been given the present picture, which is sooner."""
        self._draw_again()
        self._switching = ExitStack()
        self._switching.enter_context(self.batch_update())
        self.set_timer(delay, self._draw_again, name="delay_update")

    def _draw_again(self) -> None:
        if self._switching is not None:
            self._switching.close()
            self._switching = None
            self.screen.refresh()


# ---- commands
# The half of the app that speaks to the run: commands, their answers, and leaving.


SAID_S = 4.0
"""How long the answer to a command stays in the header, in seconds."""


class CommandingApp(DrawingApp):
    """Base of the app: what is on its screens is the app's."""

    ends_with_app = False
    """Whether the run is trained by this process, so that leaving ends it."""
    said = ""
    """What the last command did, for a moment."""
    _forget: Timer | None = None
    _leaving = False
    """The user asked to stop and leave: the app goes when the run has ended."""

    def draw(self, snapshot: Snapshot) -> None:
        """Hand the picture to the screens that are open, and say what it changes for the user."""
        self.tell_of_control(snapshot)
        super().draw(snapshot)
        if self._leaving and snapshot.status.ended:
            self.exit(0)

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
        # The session has the answer's status among what arrived, in its order: drawn from here it
        # could overwrite a newer one.
        self.frame()

    def tell_of_control(self, seen: Snapshot) -> None:
        """Say when somebody else begins to steer the run that was steered from here."""
        mine, holder = seen.link.viewer_id, seen.status.controller
        if mine is None or holder in (None, mine) or self.snapshot.status.controller != mine:
            return
        taken = (e for e in reversed(seen.events) if isinstance(e, Notice) and e.kind == "command")
        who = (
            next((event.who for event in taken if event.text == TAKE_CONTROL_TEXT), "")
            or "another viewer"
        )
        self.notify(
            f"{who} has taken control\nctrl+t takes it back", severity="warning", markup=False
        )

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

    # ------------------------------------------------------------ leaving

    async def action_quit(self) -> None:
        """Ask what becomes of the run; without a living one, just leave."""
        status, link = self.snapshot.status, self.snapshot.link
        if isinstance(self.screen, ModalScreen):
            self.exit(0)  # asked for twice
        elif self.session is None or status.ended or link.state in ("closed", "replay"):
            self.exit(0)
        elif link.read_only or link.state != "live":
            self.exit(0)  # nothing to decide: the run goes on without us
        else:
            self.push_screen(QuitDialog(self.ends_with_app), self._leave)

    def _leave(self, choice: str | None) -> None:
        if choice == "detach":
            self.exit(0)
        elif choice in ("stop", "checkpoint"):
            self._leaving = True
            self.command(messages.Stop(checkpoint=choice == "checkpoint"))


# ---- palette
# The command palette: every action by name, with what it does.
#
# Made from the bindings of the screen in front, so an action that has a key is here by itself; the
# few that have none are listed below. The app names it in `COMMANDS`.


KEYLESS: tuple[tuple[str, str, messages.Action], ...] = (
    ("Full speed", "Lift the limit on steps a second", messages.Throttle(None)),
    ("Write a checkpoint", "At the next step boundary; training goes on", messages.Checkpoint()),
    ("Take control", "Become the viewer that may command; others watch", messages.TakeControl()),
    ("Stop the run", "Finish the running step, then end", messages.Stop()),
    ("Stop with a checkpoint", "Finish the step, write a checkpoint, end", messages.Stop(True)),
)
"""Commands to the run that have no key of their own: name, help, action."""

Command = tuple[str, str, Callable[[], object]]


class ActionProvider(Provider):
    """Actions of the screen in front, the screens, commands to the run, and themes."""

    @property
    def _app(self) -> TuiTrainerApp:
        return cast("TuiTrainerApp", self.app)

    def commands(self) -> Iterator[Command]:
        """(name, help, what it calls) of everything that can be done now."""
        yield from self._bound()
        for place in PLACES:
            if self._app.check_action("go", (place.mode,)):
                go = partial(self._app.action_go, place.mode)
                yield f"Show {place.title.lower()}", f"{place.tooltip} (key {place.key})", go
        replayed = self._app.snapshot.link.state == "replay"
        if self._app.session is not None and not replayed and not self._app.snapshot.status.ended:
            for name, help, action in KEYLESS:
                yield name, help, partial(self._app.command, action)
        for name in sorted(self._app.available_themes):
            yield f"Theme {name}", "Colours of the screen", partial(self._set_theme, name)

    def _bound(self) -> Iterator[Command]:
        """What has a binding on the screen in front, unless it cannot be done now."""
        known: set[str] = set()
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if not active.enabled or binding.action in known or not binding.tooltip:
                continue
            if binding.action.startswith(("go(", "app.go(")):
                continue
            known.add(binding.action)
            name = (binding.description or binding.tooltip).replace("_", " ")
            key = self.app.get_key_display(binding)
            run = partial(self.app.run_action, binding.action, active.node)
            yield name[:1].upper() + name[1:], f"{binding.tooltip} (key {key})", run

    def _set_theme(self, name: str) -> None:
        self.app.theme = name

    async def discover(self) -> Hits:
        """Everything, before anything is typed; themes only when asked for."""
        for name, help, run in self.commands():
            if not name.startswith("Theme "):
                yield DiscoveryHit(name, run, help=help)

    async def search(self, query: str) -> Hits:
        """What matches, by name or by what it does."""
        matcher = self.matcher(query)
        for name, help, run in self.commands():
            score = max(matcher.match(name), 0.5 * matcher.match(help))
            if score > 0:
                yield Hit(score, matcher.highlight(name), run, help=help)


class TuiTrainerApp(CommandingApp):
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
        frames_per_second: float | None = None,
        theme_name: str = theme.DARK.name,
        slow_link: bool = False,
        ends_with_app: bool = False,
    ) -> None:
        """`slow_link`: send the terminal little. `ends_with_app`: the run is trained by this very
        process, so leaving ends it. `frames_per_second` overrules the pace, for tests."""
        link = SLOW if slow_link else FAST
        if frames_per_second is not None:
            link = replace(link, frames_per_second=frames_per_second)
        super().__init__(session, link)
        if slow_link:
            self.animation_level = "none"
            if self.console._color_system is ColorSystem.TRUECOLOR:  # half the bytes of a colour
                self.console._color_system = ColorSystem.EIGHT_BIT
        self.glyphs: Glyphs = ASCII if ascii else UNICODE
        self.palette: theme.Palette = theme.palette(self.theme_variables)
        self.on_launch = on_launch
        self.ends_with_app = ends_with_app
        self._start_mode = start_mode
        self._ascii_filter = AsciiFilter() if ascii else None
        for place in PLACES:
            self.add_mode(place.mode, place.factory())
        for ours in theme.THEMES:
            self.register_theme(ours)
        self.theme = theme_name

    # ------------------------------------------------------------ life

    def on_mount(self) -> None:
        """Paint the first screen at once; everything else comes when it comes."""
        self.theme_changed_signal.subscribe(self, lambda _: self._restyle())
        self._restyle()
        self.switch_mode(self._start_mode)
        self.run_worker(self._load_rest, thread=True, group="load")
        self.begin_frames()

    def _load_rest(self) -> None:
        """The plotting library and the other screens come after the first paint, off the event
        loop."""
        if not chart.ready():
            chart.load()
        self.call_from_thread(self.redraw)
        for place in PLACES:
            place.load()
        self.call_from_thread(self._loaded)

    def _loaded(self) -> None:
        gc.enable()  # whoever has started the app may have put it off until here
        if not self.is_headless:
            # What there is now stays: going through all of it again would hold up a frame now and
            # then for 40 ms, whenever the garbage collector makes a full round.
            gc.freeze()

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

    # ------------------------------------------------------------ look

    def get_driver_class(self) -> type[Driver]:
        """Textual's, with its output counted."""
        return textual_hacks.metered(super().get_driver_class())

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
    slow_link: bool = False,
    ends_with_app: bool = False,
) -> int:
    """Show `session` (or the start screen) until the user leaves; the terminal is restored on every
    exit. `slow_link`: send the terminal little; `ends_with_app`: leaving ends the run. Returns the
    exit code: 0, or 1 when the app itself failed."""
    app = TuiTrainerApp(
        session,
        ascii=ascii,
        start_mode=start_mode,
        on_launch=on_launch,
        theme_name=choose_theme(),
        slow_link=slow_link,
        ends_with_app=ends_with_app,
    )
    code: Any = app.run()
    return app.return_code or (code if isinstance(code, int) else 0)
