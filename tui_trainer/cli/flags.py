"""Command-line flags of a task, made from its typed configuration: each overrides the preset."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Group, Parameter

from tui_trainer.cli.options import RunOptions
from tui_trainer.config.options import Option, options_of
from tui_trainer.config.resolve import default_preset
from tui_trainer.config.training import GROUPS
from tui_trainer.protocol.describe import Scalar
from tui_trainer.tasks.definition import TaskDefinition

PRESET = Group("Preset", sort_key=0)
_PLAIN = RunOptions()
_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}

Start = Callable[[TaskDefinition, str | None, dict[str, Scalar], RunOptions], int]
"""(task, preset, overrides, options) → exit status."""


def task_command(task: TaskDefinition, start: Start) -> Callable[..., int]:
    """The function behind `tui-trainer <task>`, with one keyword for every field it can override.

    Values are handed on as typed: `config.resolve` converts and checks them, for the form of the
    start screen too, so that both say the same of a wrong one.
    """

    def command(
        *, preset: str | None = None, options: RunOptions = _PLAIN, **given: str | bool | None
    ) -> int:
        overrides: dict[str, Scalar] = {name: v for name, v in given.items() if v is not None}
        return start(task, preset, overrides, options)

    keywords = [
        _keyword("preset", Annotated[str | None, _preset_flag(task)]),
        _keyword("options", Annotated[RunOptions, Parameter(name="*")], _PLAIN),
        *_override_keywords(task),
    ]
    command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in keywords}
    command.__doc__ = task.summary
    return command


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _override_keywords(task: TaskDefinition) -> list[inspect.Parameter]:
    options = options_of(task.config)
    names = dict.fromkeys((*GROUPS, *(option.group for option in options)))
    groups = {name: Group(name, sort_key=1 + rank) for rank, name in enumerate(names)}
    preset = task.presets.get(default_preset(task), {})
    return [
        _keyword(
            option.name,
            Annotated[
                (bool if option.kind == "bool" else str) | None,
                _flag(option, groups[option.group], preset.get(option.name, option.default)),
            ],
        )
        for option in options
    ]


def _preset_flag(task: TaskDefinition) -> Parameter:
    return Parameter(
        help=f"where the options start from: {', '.join(task.presets)}",
        group=PRESET,
        metavar="NAME",
        show_default=_always(f"{default_preset(task)}, whose values are shown here"),
    )


def _flag(option: Option, group: Group, value: Scalar) -> Parameter:
    metavar = "|".join(option.choices) or _METAVARS.get(option.kind)
    return Parameter(
        name=option.flag,
        help=option.help,
        group=group,
        metavar=metavar,
        negative=() if option.kind != "bool" else None,
        show_default=False if value is None else _always(_plainly(value)),
    )


def _plainly(value: Scalar) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and not value.isprintable():
        return repr(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _always(text: str) -> Callable[[Any], str]:
    """Shown as the default of a flag whose own default, None, only means `as the preset has it`."""

    def shown(_: Any) -> str:
        return text

    return shown
