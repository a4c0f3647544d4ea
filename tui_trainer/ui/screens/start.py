"""The screen of `tui-trainer` without arguments: a form to choose a task or a script and its
options.

The ui may not import the tasks, so the command line passes their definitions in: a
`TaskDefinition` satisfies `TaskForm`. The form returns plain values as well.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Collapsible, Input, Static

from tui_trainer.client.api import OnLaunch, Session, Snapshot
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import Option, options_of, parse, typed_value, value_text
from tui_trainer.config.training import GROUPS, ConfigurableTask, default_preset, resolve
from tui_trainer.protocol.schema import SCRIPT, Scalar
from tui_trainer.runs.launch import LaunchError, LaunchRequest
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.widgets.form import ChoiceRow, FormRow, switch, text_field
from tui_trainer.ui.widgets.key_line import KeyLine

SCRIPT_SUMMARY = "any PyTorch script, unmodified, under the same tracer"
COMMON = ("data", "steps", "epochs", "batch_size", "learning_rate", "optimizer", "device", "seed")
"""Options that are changed most often. They are always visible; all others are in groups."""


class TaskForm(ConfigurableTask, Protocol):
    """A task as the start screen needs it."""

    @property
    def summary(self) -> str:
        """One line that says what it trains."""


@dataclass(frozen=True)
class Launcher:
    """The `on_launch` of an app that opens with the start screen: the tasks, and how to start them.

    run_app(None, start_mode="start", on_launch=Launcher(tuple(definitions), start))
    """

    tasks: tuple[TaskForm, ...]
    """Tasks in the order in which they are offered; a script is offered last."""
    start: OnLaunch
    """Raises LaunchError or ConfigurationError; the form shows it at the field it names."""

    def __call__(self, request: LaunchRequest) -> Session:
        return self.start(request)


def common_options(task: TaskForm) -> tuple[Option, ...]:
    """The options that are always visible, in the order of `COMMON`."""
    known = {option.name: option for option in options_of(task.config)}
    return tuple(known[name] for name in COMMON if name in known)


def grouped_options(task: TaskForm) -> dict[str, tuple[Option, ...]]:
    """The other options by group, in the order of `GROUPS`."""
    groups: dict[str, list[Option]] = {}
    for option in options_of(task.config):
        if option.name not in COMMON:
            groups.setdefault(option.group, []).append(option)
    ordered = sorted(groups, key=lambda name: GROUPS.index(name) if name in GROUPS else len(GROUPS))
    return {name: tuple(groups[name]) for name in ordered}


def preset_value(task: TaskForm, preset: str, option: Option) -> Scalar:
    """The value of an option when only the preset is chosen."""
    return task.presets.get(preset, {}).get(option.name, option.default)


def request_for(
    task: TaskForm, preset: str, entered: Mapping[str, str | bool], start_paused: bool = False
) -> tuple[LaunchRequest | None, dict[str, ConfigurationError]]:
    """The request for these settings, or the errors by field ("" where no single field is
    wrong)."""
    overrides: dict[str, Scalar] = {}
    errors: dict[str, ConfigurationError] = {}
    for option in options_of(task.config):
        if option.name not in entered:
            continue
        try:
            value = parse(option, typed_value(option, entered[option.name]))
        except ConfigurationError as error:
            errors[option.name] = error
            continue
        if value != preset_value(task, preset, option):
            overrides[option.name] = value
    if errors:
        return None, errors
    overrides = _one_length(task, preset, overrides)
    try:
        resolve(task, preset, overrides)
    except ConfigurationError as error:
        return None, {faulty_option(task, error): error}
    settings: dict[str, Scalar] = {"preset": preset} if preset else {}
    return LaunchRequest(task.name, {**settings, **overrides}, paused=start_paused), {}


def _one_length(task: TaskForm, preset: str, overrides: dict[str, Scalar]) -> dict[str, Scalar]:
    """Drop a length that was emptied because the other one was given."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if overrides.get(name, "") is None and overrides.get(other) is not None:
            return {key: value for key, value in overrides.items() if key != name}
    return overrides


def faulty_option(task: TaskForm, error: ConfigurationError) -> str:
    """The first option that an error of the whole configuration names; "" if none."""
    flags = {option.flag: option.name for option in options_of(task.config)}
    for flag in re.findall(r"--[a-z0-9-]+", f"{error.message} {error.hint}"):
        if flag in flags:
            return flags[flag]
    return ""


def script_request(
    path: str, arguments: str, start_paused: bool = False
) -> tuple[LaunchRequest | None, dict[str, ConfigurationError]]:
    """The request to run a script, or the errors by field (`script`, `arguments`)."""
    error = _script_error(path.strip())
    if error is not None:
        return None, {"script": error}
    try:
        words = tuple(shlex.split(arguments))
    except ValueError as unbalanced:
        hint = "quotes come in pairs, as in a shell"
        return None, {"arguments": ConfigurationError(f"cannot be parsed: {unbalanced}", hint)}
    file = str(Path(path.strip()).expanduser())
    return LaunchRequest(SCRIPT, script=file, arguments=words, paused=start_paused), {}


def _script_error(path: str) -> ConfigurationError | None:
    file = Path(path).expanduser()
    if not path:
        return ConfigurationError("which script?", "the path of a Python file, such as train.py")
    if file.is_dir():
        return ConfigurationError(f"{path} is a folder", "give the Python file that trains")
    if not file.exists():
        return ConfigurationError(f"{path} does not exist", f"looked in {Path.cwd()}")
    return None


MIN_WIDTH_BESIDE = 110
"""Width from which the groups are next to the common options, expanded."""
EMPTY_MEANS: Mapping[str, str] = {"data": "built in"}
"""Meaning of an empty field, where it is not `automatic`."""


def option_row(option: Option, value: str) -> FormRow:
    """The row of an option whose default is written `value`."""
    name = f"option-{option.name}"
    editor: ChoiceRow | Input
    if option.kind == "bool":
        editor = switch(value == "on", id=name)
    elif option.choices:
        editor = ChoiceRow(option.choices, value, id=name)
    else:
        placeholder = EMPTY_MEANS.get(option.name, "automatic") if option.optional else ""
        editor = text_field(value, id=name, placeholder=placeholder, wide=option.kind == "str")
    unit = option.unit if isinstance(editor, Input) else ""
    return FormRow(option.name, editor, default=value, unit=unit, help=option.help)


def preset_row(task: TaskForm, preset: str) -> FormRow:
    """The row in which a preset is chosen."""
    editor = ChoiceRow(tuple(task.presets), preset, id="preset")
    return FormRow(
        "preset", editor, default=preset, help="A set of defaults: size, length, schedule"
    )


def paused_row() -> FormRow:
    """The row that says whether to stop before the first phase."""
    return FormRow(
        "start paused",
        switch(False, id="paused"),
        default="off",
        help="Stop before the first phase, to step from there",
    )


def task_rows(task: TaskForm, preset: str, *, expanded: bool) -> list[Widget]:
    """The common options, and the others in collapsible groups."""

    def row(option: Option) -> FormRow:
        return option_row(option, value_text(preset_value(task, preset, option)))

    common = [row(option) for option in common_options(task)]
    groups = [
        Collapsible(
            *(row(option) for option in options),
            title=f"{name} ({len(options)})",
            collapsed=not expanded,
            collapsed_symbol="▸",
            expanded_symbol="▾",
            # Textual would set this class only after mounting the group and all its rows.
            classes="" if expanded else "-collapsed",
        )
        for name, options in grouped_options(task).items()
    ]
    columns = Vertical(*common, paused_row(), id="common"), Vertical(*groups, id="groups")
    return [Vertical(*columns, id="columns")]


def script_rows() -> list[Widget]:
    """Path and arguments of a script."""
    path = text_field(id="option-script", placeholder="train.py", wide=True)
    arguments = text_field(id="option-arguments", placeholder="none", wide=True)
    return [
        FormRow("script", path, help="The Python file that trains, as you would give it to python"),
        FormRow("arguments", arguments, help="Its own arguments, quoted as in a shell"),
        paused_row(),
    ]


class StartScreen(RunScreen):
    """The form. It keeps what was typed when a start fails or another task is chosen."""

    CSS = """
    StartScreen #title, StartScreen #learn { height: 1; padding: 0 1; color: $text-muted; }
    StartScreen #what { height: auto; padding: 1 1 0 1; }
    StartScreen #form { padding: 1 1 0 1; height: 1fr; overflow-y: auto;
        scrollbar-size-vertical: 1; }
    StartScreen #presets { height: auto; }
    StartScreen #columns { height: auto; }
    StartScreen #common { height: auto; }
    StartScreen #groups { height: auto; margin-top: 1; }
    StartScreen Collapsible { border: none; padding: 0; background: transparent; }
    StartScreen Collapsible:focus-within { background-tint: $foreground 0%; }
    StartScreen CollapsibleTitle { padding: 0; width: 1fr; }
    StartScreen Contents { padding: 0 0 0 2; }
    StartScreen #summary { padding-left: 20; color: $text-muted; }
    StartScreen #error { display: none; height: auto; padding: 0 1; color: $text-error; }
    StartScreen.-failed #error { display: block; }
    StartScreen #help { height: 1; padding: 0 1; color: $text-muted; }
    StartScreen.-beside #columns { layout: grid; grid-size: 2; grid-columns: 1fr 1fr;
        grid-rows: auto; grid-gutter: 0 4; height: auto; }
    StartScreen.-beside #groups { margin-top: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "start", "Start", id="start.start", priority=True,
                tooltip="Start the training with these settings"),
        Binding("down", "app.focus_next", "Next field", id="start.next", key_display="↓",
                tooltip="Go to the next field (tab too)"),
        Binding("up", "app.focus_previous", "Previous field", id="start.previous", show=False,
                tooltip="Go to the previous field (shift+tab too)"),
        Binding("space", "expand('toggle')", "Expand/collapse", id="start.toggle_group", show=False,
                tooltip="Show or hide the options of the group"),
        Binding("right", "expand('yes')", "Expand", id="start.expand_group", show=False,
                tooltip="Show the options of the group"),
        Binding("left", "expand('no')", "Collapse", id="start.collapse_group", show=False,
                tooltip="Hide the options of the group"),
        Binding("ctrl+r", "reset", "Reset", id="start.reset",
                tooltip="Set every field to the value of the preset"),
        Binding("ctrl+l", "app.go('learn')", "Learn", id="start.learn",
                tooltip="Short pages, measured on a live model while you read, and guided runs"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._task_name = ""
        """The chosen task, or `SCRIPT`."""
        self._preset: dict[str, str] = {}
        """The preset of each task."""
        self._preset_chosen: set[str] = set()
        """Tasks whose preset the user chose, so that it no longer follows the data."""
        self._entered: dict[str, dict[str, str]] = {}
        """The changed values of each task."""
        self._starting = False

    # ------------------------------------------------------------ the form

    @property
    def tasks(self) -> tuple[TaskForm, ...]:
        """The tasks on offer."""
        launcher = self.context.on_launch
        return launcher.tasks if isinstance(launcher, Launcher) else ()

    @property
    def chosen_task(self) -> TaskForm | None:
        """The chosen task; None for a script."""
        return next((task for task in self.tasks if task.name == self._task_name), None)

    @property
    def option_rows(self) -> list[FormRow]:
        """All rows but those of task and preset."""
        rows = self.query(FormRow)
        return [row for row in rows if row.option_name not in ("train", "preset")]

    def compose(self) -> ComposeResult:
        names = [*(task.name for task in self.tasks), SCRIPT]
        self._task_name = names[0]
        self.set_class(self._wide, "-beside")
        yield Static(
            "[b $accent]tui-trainer[/] · the debugger for neural-network training",
            id="title",
        )
        yield Static(
            "[$accent]ctrl+l[/] new to this? Pages to learn from, and guided runs of what goes "
            "wrong",
            id="learn",
        )
        with Vertical(id="what"):
            choices = ChoiceRow(names, names[0], id="task")
            yield FormRow("train", choices, default=names[0], help="What to train")
            yield Static("", id="summary", markup=False)
            yield Vertical(id="presets")
        yield Vertical(id="form")
        yield Static("", id="error", markup=False)
        yield Static("", id="help", markup=False)
        yield KeyLine()

    async def on_mount(self) -> None:
        await self._show_task()
        self.query_one("#task").focus()

    async def _show_task(self) -> None:
        """Rebuild the form for the chosen task; a field that has the focus keeps it by its name."""
        task = self.chosen_task
        focused = self._focused_option()
        self.query_one("#summary", Static).update(task.summary if task else SCRIPT_SUMMARY)
        if task:
            preset = self._preset.setdefault(task.name, next(iter(task.presets), ""))
            rows = task_rows(task, preset, expanded=self._wide)
        else:
            rows = script_rows()
        form, presets = self.query_one("#form", Vertical), self.query_one("#presets", Vertical)
        with self.app.batch_update():
            await presets.remove_children()
            if task and task.presets:
                await presets.mount(preset_row(task, self._preset[task.name]))
            await form.remove_children()
            await form.mount(*rows)
        self._fill()
        self._show_error(None)
        if focused not in ("", "train"):  # keys may be faster than the form is rebuilt
            same = [row for row in self.query(FormRow) if row.option_name == focused]
            (same[0].editor if same else self.query_one("#task")).focus()

    def _focused_option(self) -> str:
        nodes = self.focused.ancestors_with_self if self.focused is not None else ()
        return next((node.option_name for node in nodes if isinstance(node, FormRow)), "")

    def _fill(self) -> None:
        """Set each field to what was typed before, else to the value of the preset."""
        entered = self._entered.get(self._task_name, {})
        task = self.chosen_task
        options = {option.name: option for option in options_of(task.config)} if task else {}
        for row in self.option_rows:
            default = "off" if row.option_name == "start paused" else ""
            if task and row.option_name in options:
                option = options[row.option_name]
                default = value_text(preset_value(task, self._preset.get(task.name, ""), option))
            row.set_value(entered.get(row.option_name, default), default)

    @property
    def _wide(self) -> bool:
        return self.app.size.width >= MIN_WIDTH_BESIDE

    def on_resize(self, event: events.Resize) -> None:
        """Show options and groups side by side where there is room."""
        self.set_class(self._wide, "-beside")

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Show the help of the field that has the focus."""
        self.call_after_refresh(self.query_one(KeyLine).update_rows)
        for node in event.widget.ancestors_with_self:
            if isinstance(node, FormRow):
                self.query_one("#help", Static).update(node.help)
                return
            if isinstance(node, Collapsible):
                self.query_one("#help", Static).update("space shows or hides these options")
                return

    # ------------------------------------------------------------ changes

    async def on_form_row_changed(self, event: FormRow.Changed) -> None:
        """Show another task, use another preset, or take note of a changed option."""
        event.stop()
        value = event.row.value
        match event.row.option_name:
            case "train":
                event.row.set_value(value, default=value)
                if value != self._task_name:
                    self._remember()
                    self._task_name = value
                    await self._show_task()
            case "preset":
                event.row.set_value(value, default=value)
                self._preset_chosen.add(self._task_name)
                self._use_preset(value)
            case "data":
                self._follow_data()
        self._show_error(None)  # an error of an earlier start may no longer hold

    def _use_preset(self, preset: str) -> None:
        self._remember()
        self._preset[self._task_name] = preset
        self._fill()

    def _follow_data(self) -> None:
        """Unless the user chose a preset, use the one that the command line would use."""
        task = self.chosen_task
        if task is None or task.name in self._preset_chosen:
            return
        data = next((row.value for row in self.option_rows if row.option_name == "data"), "")
        preset = default_preset(task, data.strip())
        if preset != self._preset.get(task.name, ""):
            self.query_one("#row-preset", FormRow).set_value(preset, preset)
            self._use_preset(preset)

    def _remember(self) -> None:
        self._entered[self._task_name] = {
            row.option_name: row.value for row in self.option_rows if row.changed
        }

    # ------------------------------------------------------------ actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer the keys that expand and collapse only on the title of a group."""
        if action == "expand":
            return self.focused is not None and isinstance(self.focused.parent, Collapsible)
        return True

    def action_expand(self, how: Literal["toggle", "yes", "no"]) -> None:
        """Expand or collapse the group whose title has the focus."""
        group = self.focused.parent if self.focused is not None else None
        if isinstance(group, Collapsible):
            group.collapsed = not group.collapsed if how == "toggle" else how == "no"

    def action_reset(self) -> None:
        """Set every field to the value of the preset."""
        self._entered.pop(self._task_name, None)
        for row in self.query(FormRow):
            row.show_error(None)
        self._fill()
        self._follow_data()
        self._show_error(None)

    def action_start(self) -> None:
        """Start the run once the field with the focus has taken the keys typed before enter."""
        if self.focused is None or not self.focused.call_later(self._start):
            self.call_later(self._start)  # the field has just been removed

    def _start(self) -> None:
        """Start the run unless a value is invalid."""
        if self._starting:
            return
        self._follow_data()  # the message about the last letter may still be on its way
        request, errors = self._request()
        for row in self.query(FormRow):
            row.show_error(errors.get(row.option_name))
        if request is None:
            self._show_errors(errors)
            return
        if self.context.on_launch is None:
            self._show_error(ConfigurationError("nothing can be started from here"))
            return
        self._show_error(None)
        self._set_starting(True)
        self.run_worker(
            partial(self._launch, self.context.on_launch, request), thread=True, exclusive=True
        )

    def _request(self) -> tuple[LaunchRequest | None, dict[str, ConfigurationError]]:
        entered = {row.option_name: row.value for row in self.option_rows}
        paused = entered["start paused"] == "on"
        task = self.chosen_task
        if task is None:
            return script_request(entered["script"], entered["arguments"], paused)
        return request_for(task, self._preset.get(task.name, ""), entered, paused)

    # ------------------------------------------------------------ errors

    def _show_errors(self, errors: dict[str, ConfigurationError]) -> None:
        """Go to the first invalid field, expanding its group; show other errors below the form."""
        invalid = [row for row in self.query(FormRow) if row.option_name in errors]
        for row in invalid:
            for node in row.ancestors:
                if isinstance(node, Collapsible):
                    node.collapsed = False
        if invalid:
            self.call_after_refresh(self._go_to, invalid[0])  # once its group is laid out
        shown = {row.option_name for row in invalid}
        for name, error in errors.items():
            if name not in shown:
                self._show_error(error)

    def _go_to(self, row: FormRow) -> None:
        row.editor.focus(scroll_visible=False)
        row.scroll_visible(animate=False)  # with the message below it

    def _show_error(self, error: ConfigurationError | None) -> None:
        self.set_class(error is not None, "-failed")
        if error is not None:
            hint = f"\n  {error.hint}" if error.hint else ""
            self.query_one("#error", Static).update(f"✗ {error.message}{hint}")

    # ------------------------------------------------------------ starting

    def _launch(self, launch: OnLaunch, request: LaunchRequest) -> None:
        """Runs on a worker thread: a run process takes a moment to start."""
        try:
            session = launch(request)
        except (LaunchError, ConfigurationError) as error:
            failure = ConfigurationError(error.args[0], error.hint)
        except Exception as error:  # shown on the form, so that nothing typed is lost
            failure = ConfigurationError(f"{type(error).__name__}: {error}")
        else:
            self.app.call_from_thread(self._launched, session)
            return
        self.app.call_from_thread(self._launch_failed, failure)

    def _launched(self, session: Session) -> None:
        self._set_starting(False)
        self.context.attach(session)
        self.context.action_go("dashboard")

    def _launch_failed(self, error: ConfigurationError) -> None:
        self._set_starting(False)
        name = faulty_option(self.chosen_task, error) if self.chosen_task else ""
        rows = [row for row in self.option_rows if row.option_name == name]
        for row in rows:
            row.show_error(error)
        self._show_errors({name if rows else "": error})

    def _set_starting(self, starting: bool) -> None:
        self._starting = starting
        self.query_one("#help", Static).update("starting …" if starting else "")

    def show(self, snapshot: Snapshot) -> None:
        """Do nothing: the form shows no run."""
