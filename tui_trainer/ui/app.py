"""The app: holds the session, pulls one snapshot a frame, and hands it to the screen in front."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.color import ColorSystem
from rich.console import Console
from textual.app import App
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.filter import LineFilter
from textual.theme import BUILTIN_THEMES

from tui_trainer.session.api import Session
from tui_trainer.ui import output, theme
from tui_trainer.ui.commands import CommandingApp
from tui_trainer.ui.glyphs import ASCII, UNICODE, AsciiFilter, Glyphs
from tui_trainer.ui.launch import OnLaunch
from tui_trainer.ui.pace import FAST, SLOW
from tui_trainer.ui.palette import ActionProvider
from tui_trainer.ui.screens.registry import PLACES
from tui_trainer.ui.widgets import plot


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
        if not plot.ready():
            plot.load()
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
        return output.metered(super().get_driver_class())

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
