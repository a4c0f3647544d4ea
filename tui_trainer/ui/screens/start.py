"""What `tui-trainer` alone opens: choose a task or a script, change what should differ, Enter."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Static

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import options_of
from tui_trainer.config.resolve import default_preset
from tui_trainer.session.api import Session, Snapshot
from tui_trainer.ui.launch import LaunchError, LaunchRequest
from tui_trainer.ui.panels.choice import Choice, Toggle
from tui_trainer.ui.panels.form import Fold, FormRow, open_faulty
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.screens.start_model import (
    SCRIPT,
    SCRIPT_SUMMARY,
    Launcher,
    TaskForm,
    blamed,
    preset_value,
    request_for,
    script_request,
    written,
)
from tui_trainer.ui.screens.start_rows import preset_row, script_rows, task_rows
from tui_trainer.ui.widgets.keys import KeyLine

WIDE = 110
"""From this width on the folded groups stand beside the common options, unfolded."""


class StartScreen(RunScreen):
    """The form. Nothing typed is lost when a start fails or another task is looked at."""

    CSS = """
    StartScreen #title { height: 1; padding: 0 1; }
    StartScreen #what { height: auto; padding: 1 1 0 1; }
    StartScreen #form { padding: 1 1 0 1; height: 1fr; overflow-y: auto;
        scrollbar-size-vertical: 1; }
    StartScreen #presets { height: auto; }
    StartScreen #columns { height: auto; }
    StartScreen #common { height: auto; }
    StartScreen #folded { height: auto; margin-top: 1; }
    StartScreen .group { height: auto; padding-left: 2; }
    StartScreen #summary { padding-left: 20; color: $text-muted; }
    StartScreen #fault { display: none; height: auto; padding: 0 1; color: $text-error; }
    StartScreen.-faulty #fault { display: block; }
    StartScreen #help { height: 1; padding: 0 1; color: $text-muted; }
    StartScreen.-beside #columns { layout: grid; grid-size: 2; grid-columns: 1fr 1fr;
        grid-rows: auto; grid-gutter: 0 4; height: auto; }
    StartScreen.-beside #folded { margin-top: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "start", "Start", id="start.start", priority=True,
                tooltip="Start the training with what the form says"),
        Binding("down", "app.focus_next", "Next field", id="start.next", key_display="↓",
                tooltip="Go to the next field (tab too)"),
        Binding("up", "app.focus_previous", "Previous field", id="start.previous", show=False,
                tooltip="Go to the field before (shift+tab too)"),
        Binding("ctrl+r", "reset", "Reset", id="start.reset",
                tooltip="Put every field back to what the preset says"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._chosen = ""
        self._preset: dict[str, str] = {}
        self._preset_by_hand: set[str] = set()
        """Tasks whose preset the person chose: it no longer follows the data."""
        self._entered: dict[str, dict[str, str]] = {}
        self._starting = False

    # ------------------------------------------------------------ the form

    @property
    def tasks(self) -> tuple[TaskForm, ...]:
        """The tasks on offer."""
        launcher = self.trainer.on_launch
        return launcher.tasks if isinstance(launcher, Launcher) else ()

    @property
    def form(self) -> TaskForm | None:
        """The chosen task; None for a script."""
        return next((task for task in self.tasks if task.name == self._chosen), None)

    def compose(self) -> ComposeResult:
        """Title, task, form, help, keys."""
        names = [*(task.name for task in self.tasks), SCRIPT]
        self._chosen = names[0]
        yield Static(
            "[b $accent]tui-trainer[/] [$text-muted]· the debugger for neural-network training[/]",
            id="title",
        )
        with Vertical(id="what"):
            yield FormRow("train", Choice(names, names[0], id="task"), help="What to train")
            yield Static("", id="summary", markup=False)
            yield Vertical(id="presets")
        yield Vertical(id="form")
        yield Static("", id="fault", markup=False)
        yield Static("", id="help", markup=False)
        yield KeyLine()

    async def on_mount(self) -> None:
        """The first task's form."""
        await self._show_task()
        self.query_one("#task").focus()

    async def _show_task(self) -> None:
        task = self.form
        summary = task.summary if task else SCRIPT_SUMMARY
        self.query_one("#summary", Static).update(summary)
        if task:
            preset = self._preset.setdefault(task.name, next(iter(task.presets), ""))
            rows = task_rows(task, preset, unfolded=self._beside())
        else:
            rows = script_rows()
        body, presets = (
            self.query_one("#form", Vertical),
            self.query_one("#presets", Vertical),
        )
        with self.app.batch_update():
            await presets.remove_children()
            if task and task.presets:
                await presets.mount(preset_row(task, self._preset[task.name]))
            await body.remove_children()
            await body.mount(*rows)
        self._fill()
        self._say_fault(None)

    def _fill(self) -> None:
        """Put in what was typed before, else what the preset says."""
        entered = self._entered.get(self._chosen, {})
        task = self.form
        known = {option.name: option for option in options_of(task.config)} if task else {}
        for row in self.query(FormRow):
            if row.option_name in ("train", "preset"):
                continue
            default = "off" if row.option_name == "start paused" else ""
            if task and row.option_name in known:
                option = known[row.option_name]
                default = written(preset_value(task, self._preset.get(task.name, ""), option))
            row.set_value(entered.get(row.option_name, default), default)

    def _beside(self) -> bool:
        return self.app.size.width >= WIDE

    # ------------------------------------------------------------ what the person does

    @on(Choice.Changed, "#task")
    async def choose_task(self, event: Choice.Changed) -> None:
        """Another form; what was typed in this one is kept."""
        self._remember()
        self._chosen = event.value
        await self._show_task()

    @on(Choice.Changed, "#preset")
    def choose_preset(self, event: Choice.Changed) -> None:
        """Other defaults; what was changed by hand stays changed."""
        self._preset_by_hand.add(self._chosen)
        self._use_preset(event.value)
        self._say_fault(None)

    def _use_preset(self, preset: str) -> None:
        self._remember()
        self._preset[self._chosen] = preset
        self._fill()

    def _follow_data(self) -> None:
        """Where no preset was chosen by hand it is the one that the command line would take."""
        task = self.form
        if task is None or task.name in self._preset_by_hand:
            return
        data = next((row.value for row in self.query(FormRow) if row.option_name == "data"), "")
        preset = default_preset(task, data.strip())
        if preset != self._preset.get(task.name, ""):
            self.query_one("#preset", Choice).value = preset
            self._use_preset(preset)

    def _remember(self) -> None:
        self._entered[self._chosen] = {
            row.option_name: row.value
            for row in self.query(FormRow)
            if row.option_name not in ("train", "preset") and row.changed
        }

    def on_form_row_changed(self, event: FormRow.Changed) -> None:
        """Something was typed: an old complaint no longer holds."""
        event.stop()
        self._follow_data()
        self._say_fault(None)

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Say what the field is."""
        self.call_after_refresh(self.query_one(KeyLine).show)
        for node in event.widget.ancestors_with_self:
            if isinstance(node, FormRow | Fold):
                self.query_one("#help", Static).update(node.help)
                return

    def on_resize(self, event: events.Resize) -> None:
        """Two columns where there is room."""
        self.set_class(self._beside(), "-beside")

    def action_reset(self) -> None:
        """Forget the changes."""
        self._entered.pop(self._chosen, None)
        for row in self.query(FormRow):
            row.fault(None)
        self._fill()
        self._follow_data()
        self._say_fault(None)

    def action_start(self) -> None:
        """Check the form; start if nothing is wrong."""
        if self._starting:
            return
        self._follow_data()  # Enter may overtake the news of the last letter typed
        request, errors = self._request()
        for row in self.query(FormRow):
            row.fault(errors.get(row.option_name))
        if request is None:
            self._blame(errors)
            return
        if self.trainer.on_launch is None:
            self._say_fault(ConfigurationError("nothing can be started from here"))
            return
        self._say_fault(None)
        self._set_starting(True)
        self.run_worker(partial(self._launch, request), thread=True, exclusive=True)

    def _request(self) -> tuple[LaunchRequest | None, dict[str, ConfigurationError]]:
        entered = {row.option_name: row.value for row in self.query(FormRow)}
        paused = self.query_one("#paused", Toggle).value == "on"
        task = self.form
        if task is None:
            return script_request(entered["script"], entered["arguments"], paused)
        return request_for(task, self._preset.get(task.name, ""), entered, paused)

    def _blame(self, errors: dict[str, ConfigurationError]) -> None:
        first = open_faulty(self.query(FormRow), self.query(Fold))
        if first is not None:
            self.call_after_refresh(self._go_to, first)  # once its group is laid out
        shown = {row.option_name for row in self.query(FormRow)}
        for name, error in errors.items():
            if name not in shown:
                self._say_fault(error)

    def _go_to(self, row: FormRow) -> None:
        row.editor.focus(scroll_visible=False)
        row.scroll_visible(animate=False)  # with what is said below it

    # ------------------------------------------------------------ starting

    def _launch(self, request: LaunchRequest) -> None:
        """On a worker thread: the run process takes a moment to start."""
        assert self.trainer.on_launch is not None
        try:
            session = self.trainer.on_launch(request)
        except (LaunchError, ConfigurationError) as error:
            told = ConfigurationError(error.args[0], error.hint)
            self.app.call_from_thread(self._failed, told)
        except Exception as error:  # said on the form: what was typed must not be lost
            told = ConfigurationError(f"{type(error).__name__}: {error}")
            self.app.call_from_thread(self._failed, told)
        else:
            self.app.call_from_thread(self._launched, session)

    def _launched(self, session: Session) -> None:
        self._set_starting(False)
        self.trainer.attach(session)
        self.trainer.action_go("dashboard")

    def _failed(self, error: ConfigurationError) -> None:
        self._set_starting(False)
        name = blamed(self.form, error) if self.form else ""
        rows = [row for row in self.query(FormRow) if row.option_name == name]
        for row in rows:
            row.fault(error)
        if rows:
            self._blame({name: error})
        else:
            self._say_fault(error)

    def _set_starting(self, starting: bool) -> None:
        self._starting = starting
        self.query_one("#help", Static).update("starting …" if starting else "")

    def _say_fault(self, error: ConfigurationError | None) -> None:
        self.set_class(error is not None, "-faulty")
        if error is not None:
            hint = f"\n  {error.hint}" if error.hint else ""
            self.query_one("#fault", Static).update(f"✗ {error.message}{hint}")

    def show(self, snapshot: Snapshot) -> None:
        """No run is shown here."""
