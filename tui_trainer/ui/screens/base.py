"""Base classes of the screens: `RunScreen` shows snapshots, `ControlScreen` adds the keys that
control the run, `DetailScreen` a header and the line of keys; the panels of a `FoldingScreen`
become tabs where there is little room."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.geometry import Size
from textual.screen import Screen
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import actions
from tui_trainer.ui import textual_hacks
from tui_trainer.ui.guide import GuideLine
from tui_trainer.ui.panels.findings import FindingLine
from tui_trainer.ui.panels.header import HeaderLine
from tui_trainer.ui.screens import AppContext, app_context
from tui_trainer.ui.screens.dialogs import NumberPrompt, TextPrompt
from tui_trainer.ui.screens.screen_tabs import ScreenTabs
from tui_trainer.ui.widgets.key_line import KeyLine, TooSmall
from tui_trainer.ui.widgets.tabs import TabLine

MIN_SIZE = (40, 10)
"""Columns and rows below which a screen only says that the terminal is too small."""


CONTROL_BINDINGS = (
    Binding("space", "pause", "Pause/resume", key_display="space", id="run.pause",
            tooltip="Pause at the next phase boundary, or resume; after the end, what next"),
    Binding("s", "step", "Step", id="run.step", tooltip="One optimizer step, then pause"),
    Binding("p", "phase", "Phase", id="run.phase",
            tooltip="To the next phase boundary, then pause"),
    Binding("n", "steps", "N steps", id="run.steps", tooltip="A number of steps, then pause"),
    Binding("b", "breakpoints", "Breakpoints", id="run.breakpoints",
            tooltip="Pause when a condition is met, such as loss > 5"),
    Binding("e", "epoch", "Epoch", id="run.epoch", tooltip="To the end of the epoch, then pause"),
    Binding("E", "settings", "Edit settings", key_display="E", show=False, id="run.settings",
            tooltip="Change the learning rate or another setting while it trains, or undo that"),
    Binding("comma", "step_back", "One step back", key_display=",", show=False, id="run.back",
            tooltip="Go back to the end of the previous step, where snapshots are kept"),
    Binding("T", "timeline", "Timeline", key_display="T", show=False, id="run.timeline",
            tooltip="Snapshots, checkpoints and changes of settings: go to any step"),
    Binding("X", "experiments", "Experiments", key_display="X", show=False, id="run.experiments",
            tooltip="What if a setting were another, which learning rate, the loss along a "
            "direction; the run is restored afterwards"),
    Binding("t", "throttle", "Throttle", id="run.throttle",
            tooltip="Limit the steps per second, to watch them"),
    Binding("ctrl+t", "take_control", "Take control", show=False, id="run.take_control",
            tooltip="Control the run from this screen; the viewer that had control only watches"),
    Binding("a", "mark", "Annotate", show=False, id="run.mark",
            tooltip="Add a note at this step: in the log, on the charts, in the replay"),
)  # fmt: skip
RANK_BINDING = Binding(
    "R", "rank", "Rank", key_display="R", id="run.rank", show=False,
    tooltip="Inspect the tensors of the next rank, in a run with several processes",
)  # fmt: skip
"""The binding of the screens that inspect tensors."""
MAX_STEPS = 10**15
"""Largest number of steps that is sent; it fits the message."""
NOT_IN_REPLAY = (
    "phase",
    "mark",
    "throttle",
    "take_control",
    "breakpoints",
    "settings",
    "step_back",
    "timeline",
    "experiments",
)
CONTROL_ACTIONS = frozenset(binding.action for binding in CONTROL_BINDINGS)


class RunScreen(Screen[Any]):
    """A screen that shows a run."""

    topics: frozenset[str] = frozenset()
    """On-request tables that the run measures while the screen is shown."""
    wanted = ""
    """Name to select once the screen is mounted."""

    def __init__(self) -> None:
        super().__init__()
        self._styled_for = self._style_conditions()
        """`_style_conditions` when another screen came to the front."""
        if self.context.link.cell_updates:
            textual_hacks.use_cell_compositor(self)
        # Textual would set these classes once the screen is mounted, and compute all styles again.
        width, height = self.app.size
        for breakpoints, cells in (
            (self.app.HORIZONTAL_BREAKPOINTS, width),
            (self.app.VERTICAL_BREAKPOINTS, height),
        ):
            reached = [name for least, name in breakpoints or () if cells >= least]
            self.add_class(*reached[-1:], update=False)

    @property
    def context(self) -> AppContext:
        """The app."""
        return app_context(self)

    def show(self, snapshot: Snapshot) -> None:
        """Draw `snapshot`. Called on the event loop, only when something has changed."""
        raise NotImplementedError

    def select(self, name: str) -> None:
        """Put the cursor on a parameter, or on a layer, where the screen lists such things."""

    def on_screen_resume(self, event: events.ScreenResume) -> None:
        """Draw what has arrived while another screen was in front."""
        event.refresh_styles = self._styled_for != self._style_conditions()
        self.context.screen_resumed(self)

    def on_screen_suspend(self) -> None:
        """Note what the styles depend on, which may change while another screen is in front."""
        self._styled_for = self._style_conditions()

    def _style_conditions(self) -> tuple[object, ...]:
        """What styles depend on besides the widgets of this screen: the app's classes, which name
        the theme, and whether the terminal has the focus. Textual would compute the styles of every
        screen that comes to the front again, which takes a sixth of the time of a switch."""
        return (self.app.classes, self.app.app_focus)


def pause_label(snapshot: Snapshot) -> str:
    """What the pause key does now."""
    if snapshot.link.state == "replay":
        return "Play" if snapshot.status.state != "running" else "Pause"
    if snapshot.status.ended:
        return "What next"
    return "Resume" if snapshot.status.state == "paused" else "Pause"


class ControlScreen(RunScreen):
    """A screen from which the run can be controlled: its bindings include `CONTROL_BINDINGS`."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim the keys while no run can be controlled; hide those that recordings do not have."""
        if action not in CONTROL_ACTIONS:
            return True
        snapshot = self.context.snapshot
        status, link = snapshot.status, snapshot.link
        if link.state == "replay":
            if action in NOT_IN_REPLAY:
                return False
        elif status.ended:
            return action == "pause"
        elif link.state != "live" or link.read_only or status.ended or status.state == "stopping":
            return None
        if action == "epoch":  # the key shows the reason why there are none
            info = snapshot.info
            known = info is not None and (info.steps_per_epoch or "epochs" in info.unseen)
            return True if known else None
        return True

    def action_pause(self) -> None:
        snapshot = self.context.snapshot
        status = snapshot.status
        if status.ended and snapshot.link.state != "replay":
            self.context.leaving.ask_next()
            return
        paused = status.state == "paused" or status.ended  # a replay may start again at its end
        self.context.command(actions.Resume() if paused else actions.Pause())

    def action_step(self) -> None:
        self.context.command(actions.Step(1))

    def action_phase(self) -> None:
        self.context.command(actions.StepPhase())

    def action_epoch(self) -> None:
        self.context.command(actions.RunToEpochEnd())

    def action_take_control(self) -> None:
        self.context.command(actions.TakeControl())

    def action_steps(self) -> None:
        """Ask for a number of steps and run them."""

        def run(count: float | None) -> None:
            if count is not None:
                self.context.command(actions.Step(int(min(count, MAX_STEPS))))

        prompt = NumberPrompt("Steps to run, then pause", "10", whole=True)
        self.app.push_screen(prompt, run)

    def action_breakpoints(self) -> None:
        """List the breakpoints, add and change them."""
        from tui_trainer.ui.screens.breakpoints import BreakpointsDialog

        self.app.push_screen(BreakpointsDialog())

    def action_step_back(self) -> None:
        self.context.command(actions.Back())

    def action_timeline(self) -> None:
        """Show the steps that the training can go back to."""
        from tui_trainer.ui.screens.timeline import TimelineDialog

        self.app.push_screen(TimelineDialog())

    def action_experiments(self) -> None:
        """Experiment with the run, and restore everything."""
        from tui_trainer.ui.screens.experiments import ExperimentsDialog

        self.app.push_screen(ExperimentsDialog())

    def action_settings(self) -> None:
        """Show the settings of the training, and change them."""
        from tui_trainer.ui.screens.settings import SettingsDialog

        self.app.push_screen(SettingsDialog())

    def action_mark(self) -> None:
        """Ask for a note and add it at the current step."""

        def mark(text: str | None) -> None:
            if text is not None:
                self.context.command(actions.Mark(text))

        self.app.push_screen(TextPrompt("Note at this step"), mark)

    def action_throttle(self) -> None:
        """Ask for a speed limit; an empty answer removes it."""
        current = self.context.snapshot.status.throttle

        def limit(rate: float | None) -> None:
            if rate is not None:
                self.context.command(actions.Throttle(rate if rate > 0 else None))

        prompt = NumberPrompt(
            "Steps per second, at most (empty: full speed)",
            f"{current:g}" if current else "",
            empty=0.0,
        )
        self.app.push_screen(prompt, limit)


class DetailScreen(ControlScreen):
    """A screen with a header above its body and a line of keys below."""

    def compose(self) -> ComposeResult:
        yield TooSmall(*MIN_SIZE)
        yield HeaderLine()
        yield ScreenTabs()
        yield FindingLine()
        yield GuideLine()
        yield from self.body()
        yield KeyLine()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Hide the key for the next rank in a run of one process."""
        if action == "rank":
            return len(self._ranks()) > 1
        return super().check_action(action, parameters)

    def _ranks(self) -> list[int]:
        """The ranks whose tensors can be inspected."""
        info = self.context.snapshot.info
        running = (each for each in info.processes if each.state == "running") if info else ()
        return sorted({0, *(each.rank for each in running)})

    def action_rank(self) -> None:
        """Inspect the tensors of the next process."""
        ranks = self._ranks()
        later = [rank for rank in ranks if rank > self.context.inspected_rank]
        self.context.inspected_rank = later[0] if later else ranks[0]
        self.show(self.context.snapshot)

    def body(self) -> Iterable[Widget]:
        """The widgets between the header and the keys."""
        raise NotImplementedError

    def show(self, snapshot: Snapshot) -> None:
        self.query_one(HeaderLine).show(snapshot)
        self.query_one(ScreenTabs).show(snapshot)
        self.query_one(FindingLine).show(snapshot)
        self.query_one(GuideLine).show(snapshot)
        self.show_body(snapshot)
        self.show_keys()

    def show_body(self, snapshot: Snapshot) -> None:
        raise NotImplementedError

    def show_keys(self) -> None:
        """Update the line of keys: those that cannot be used now are dimmed."""
        keys = self.query_one(KeyLine)
        keys.labels["run.pause"] = pause_label(self.context.snapshot)
        keys.labels["demo.cure"] = self.context.cure_label
        keys.update_rows()

    def on_descendant_focus(self) -> None:
        """Show the keys of the widget that has the focus now."""
        self.call_after_refresh(self.show_keys)

    def on_resize(self, event: events.Resize) -> None:
        """Hide the body where there is no room for it."""
        width, height = event.size
        self.set_class(width < MIN_SIZE[0] or height < MIN_SIZE[1], "-too-small")


class FoldingScreen(RunScreen):
    """Shows all panels at once, or one at a time with tabs where not all of them fit."""

    DEFAULT_CSS = """
    FoldingScreen TabLine { display: none; }
    FoldingScreen.-folded TabLine { display: block; }
    """
    tabs: ClassVar[tuple[str, ...]]
    full_size: ClassVar[tuple[int, int]] = (100, 30)
    """Columns and rows from which all panels are shown at once."""

    def __init__(self) -> None:
        super().__init__()
        self._folded = False
        self._tab = 0
        self._fold(self.app.size)

    def show_panels(self) -> None:
        """Show the panel of the tab, or all panels."""
        raise NotImplementedError

    def on_resize(self, event: events.Resize) -> None:
        """Choose between all panels and tabs."""
        self._fold(event.size)
        self._show_tab()

    def _fold(self, size: Size) -> None:
        width, height = size
        self._folded = width < self.full_size[0] or height < self.full_size[1]
        self.set_class(width < MIN_SIZE[0] or height < MIN_SIZE[1], "-too-small")
        self.set_class(self._folded, "-folded")

    def choose_tab(self, number: int) -> None:
        self._tab = number
        self._show_tab()

    def _show_tab(self) -> None:
        self.show_panels()
        self.query_one(TabLine).choose(self._tab)
        self.call_after_refresh(lambda: self.show(self.context.snapshot))

    def action_tab(self, by: int) -> None:
        """Show the next or previous panel."""
        if self._folded:
            self.choose_tab((self._tab + by) % len(self.tabs))

    def on_tab_line_chosen(self, message: TabLine.Chosen) -> None:
        self.choose_tab(message.number)
