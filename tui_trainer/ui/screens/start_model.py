"""What the start screen is given of the tasks, and what it hands back: plain values, no torch.

The ui may not import the tasks, so the command line hands it their definitions: a `TaskDefinition`
is a `TaskForm` as it is, and a `Launcher` goes with them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import Option, options_of, parse
from tui_trainer.config.resolve import Definition, resolve
from tui_trainer.config.training import GROUPS
from tui_trainer.protocol.describe import Scalar
from tui_trainer.session.api import Session
from tui_trainer.ui.launch import LaunchRequest, OnLaunch

SCRIPT = "script"
SCRIPT_SUMMARY = "any PyTorch script, unmodified, under the same tracer"
COMMON = ("data", "steps", "epochs", "batch_size", "learning_rate", "optimizer", "device", "seed")
"""What people change most: on the form at once; the rest is folded by group."""


class TaskForm(Definition, Protocol):
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


def written(value: Scalar) -> str:
    """How a value stands in its input field: what is typed back gives the same value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).replace("\n", "\\n")


def typed(option: Option, text: str | bool) -> str | bool:
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
            value = parse(option, typed(option, entered[option.name]))
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
        return None, {blamed(form, error): error}
    settings: dict[str, Scalar] = {"preset": preset} if preset else {}
    return LaunchRequest(form.name, {**settings, **overrides}, paused=start_paused), {}


def _one_length(form: TaskForm, preset: str, overrides: dict[str, Scalar]) -> dict[str, Scalar]:
    """A length emptied because the other one was given is no change of its own."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if overrides.get(name, "") is None and overrides.get(other) is not None:
            return {key: value for key, value in overrides.items() if key != name}
    return overrides


def blamed(form: TaskForm, error: ConfigurationError) -> str:
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
