"""What `tui-trainer` alone opens: choose a task or a script, change what should differ, Enter."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Input, Static

from tui_trainer.client.api import OnLaunch, Session, Snapshot
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import Option, options_of, parse
from tui_trainer.config.training import GROUPS, ConfigurableTask, default_preset, resolve
from tui_trainer.protocol.schema import Scalar
from tui_trainer.runs.launch import LaunchError, LaunchRequest
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.widgets.form import (
    Choice,
    FoldRow,
    FormRow,
    Toggle,
    fixed_row,
    open_faulty,
    row_for,
)
from tui_trainer.ui.widgets.keys import KeyLine

# ---- start_model
# What the start screen is given of the tasks, and what it hands back: plain values, no torch.
#
# The ui may not import the tasks, so the command line hands it their definitions: a
# `TaskDefinition`
# is a `TaskForm` as it is, and a `Launcher` goes with them.


SCRIPT = "script"
SCRIPT_SUMMARY = "any PyTorch script, unmodified, under the same tracer"
COMMON = ("data", "steps", "epochs", "batch_size", "learning_rate", "optimizer", "device", "seed")
"""What people change most: on the form at once; the rest is folded by group."""


class TaskForm(ConfigurableTask, Protocol):
    """A task as the start screen shows it; `tasks.definition.TaskDefinition` is one."""

    @property
    def summary(self) -> str:
        """One line on what it trains."""


@dataclass(frozen=True)
class Launcher:
    """What the command line gives the app as `on_launch`: the tasks to offer, and what starts them.

    run_app(None, start_mode="start", on_launch=Launcher(tuple(definitions), start))
    """

    tasks: tuple[TaskForm, ...]
    """In the order in which they are offered; the script comes after them by itself."""
    start: OnLaunch
    """Raises LaunchError or ConfigurationError: shown on the form, at the field it speaks of."""

    def __call__(self, request: LaunchRequest) -> Session:
        """Start what was asked for."""
        return self.start(request)


def common_options(form: TaskForm) -> tuple[Option, ...]:
    """The options that are visible at once, in the order of `COMMON`."""
    known = {option.name: option for option in options_of(form.config)}
    return tuple(known[name] for name in COMMON if name in known)


def folded_options(form: TaskForm) -> dict[str, tuple[Option, ...]]:
    """The other options by group, in the order in which people see the groups."""
    groups: dict[str, list[Option]] = {}
    for option in options_of(form.config):
        if option.name not in COMMON:
            groups.setdefault(option.group, []).append(option)
    ordered = sorted(groups, key=lambda name: GROUPS.index(name) if name in GROUPS else len(GROUPS))
    return {name: tuple(groups[name]) for name in ordered}


def preset_value(form: TaskForm, preset: str, option: Option) -> Scalar:
    """What `option` is when only the preset is chosen."""
    return form.presets.get(preset, {}).get(option.name, option.default)


def value_text(value: Scalar) -> str:
    """How a value stands in its input field: what is typed back gives the same value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).replace("\n", "\\n")


def typed_value(option: Option, text: str | bool) -> str | bool:
    """What was typed; `\\n` is a line break in texts that may hold one, such as a prompt."""
    if isinstance(text, str) and "\n" in str(option.default):
        return text.replace("\\n", "\n")
    return text


def request_for(
    form: TaskForm, preset: str, entered: Mapping[str, str | bool], start_paused: bool = False
) -> tuple[LaunchRequest | None, dict[str, ConfigurationError]]:
    """The request that the form stands for, or what is wrong by field ("" for no one field)."""
    overrides: dict[str, Scalar] = {}
    errors: dict[str, ConfigurationError] = {}
    for option in options_of(form.config):
        if option.name not in entered:
            continue
        try:
            value = parse(option, typed_value(option, entered[option.name]))
        except ConfigurationError as error:
            errors[option.name] = error
            continue
        if value != preset_value(form, preset, option):
            overrides[option.name] = value
    if errors:
        return None, errors
    overrides = _one_length(form, preset, overrides)
    try:
        resolve(form, preset, overrides)
    except ConfigurationError as error:
        return None, {faulty_option(form, error): error}
    settings: dict[str, Scalar] = {"preset": preset} if preset else {}
    return LaunchRequest(form.name, {**settings, **overrides}, paused=start_paused), {}


def _one_length(form: TaskForm, preset: str, overrides: dict[str, Scalar]) -> dict[str, Scalar]:
    """A length emptied because the other one was given is no change of its own."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if overrides.get(name, "") is None and overrides.get(other) is not None:
            return {key: value for key, value in overrides.items() if key != name}
    return overrides


def faulty_option(form: TaskForm, error: ConfigurationError) -> str:
    """The field that an error of the whole configuration speaks of first; "" when of none."""
    flags = {option.flag: option.name for option in options_of(form.config)}
    for flag in re.findall(r"--[a-z0-9-]+", f"{error.message} {error.hint}"):
        if flag in flags:
            return flags[flag]
    return ""


def script_request(
    path: str, arguments: str, start_paused: bool = False
) -> tuple[LaunchRequest | None, dict[str, ConfigurationError]]:
    """The request to run a script, or what is wrong by field (`script`, `arguments`)."""
    wrong = _script_fault(path.strip())
    if wrong is not None:
        return None, {"script": wrong}
    try:
        words = tuple(shlex.split(arguments))
    except ValueError as error:
        hint = "quotes come in pairs, as in a shell"
        return None, {"arguments": ConfigurationError(f"cannot be read: {error}", hint)}
    file = str(Path(path.strip()).expanduser())
    return LaunchRequest(SCRIPT, script=file, arguments=words, paused=start_paused), {}


def _script_fault(path: str) -> ConfigurationError | None:
    file = Path(path).expanduser()
    if not path:
        return ConfigurationError("which script?", "the path of a Python file, such as train.py")
    if file.is_dir():
        return ConfigurationError(f"{path} is a folder", "give the Python file that trains")
    if not file.exists():
        return ConfigurationError(f"{path} does not exist", f"looked in {Path.cwd()}")
    return None


# ---- start_rows
# What the start screen's form is made of: the rows of a task, or those of a script.


def preset_row(task: TaskForm, preset: str) -> FormRow:
    """The choice of a preset."""
    chooser = Choice(tuple(task.presets), preset, id="preset")
    return FormRow("preset", chooser, help="A set of defaults: size, length, schedule")


def task_rows(task: TaskForm, preset: str, *, unfolded: bool) -> list[Widget]:
    """The common options, then the others under headings, open where there is room for them."""

    def row(option: Option) -> FormRow:
        return row_for(option, value_text(preset_value(task, preset, option)))

    common = [row(option) for option in common_options(task)]
    folded: list[Widget] = []
    for name, options in folded_options(task).items():
        rows = Vertical(*(row(option) for option in options), classes="group")
        fold = FoldRow(name, rows, len(options))
        fold.open = rows.display = unfolded
        folded += [fold, rows]
    sides = Vertical(*common, paused_row(), id="common"), Vertical(*folded, id="folded")
    return [Vertical(*sides, id="columns")]


def script_rows() -> list[Widget]:
    """A path and arguments."""
    path = Input(placeholder="train.py", compact=True, id="option-script", classes="-text")
    arguments = Input(placeholder="none", compact=True, id="option-arguments", classes="-text")
    return [
        FormRow(
            "script",
            fixed_row(path),
            help="The Python file that trains, as you would give it to python",
        ),
        FormRow("arguments", fixed_row(arguments), help="Its own arguments, quoted as in a shell"),
        paused_row(),
    ]


def paused_row() -> FormRow:
    """Whether to stop before the first phase."""
    toggle = Toggle(False, id="paused")
    return FormRow("start paused", toggle, help="Stop before the first phase, to step from there")


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
        launcher = self.context.on_launch
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
                default = value_text(preset_value(task, self._preset.get(task.name, ""), option))
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
        self.call_after_refresh(self.query_one(KeyLine).update_rows)
        for node in event.widget.ancestors_with_self:
            if isinstance(node, FormRow | FoldRow):
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
        if self.context.on_launch is None:
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
        first = open_faulty(self.query(FormRow), self.query(FoldRow))
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
        assert self.context.on_launch is not None
        try:
            session = self.context.on_launch(request)
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
        self.context.attach(session)
        self.context.action_go("dashboard")

    def _failed(self, error: ConfigurationError) -> None:
        self._set_starting(False)
        name = faulty_option(self.form, error) if self.form else ""
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
