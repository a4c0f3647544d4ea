"""The options of every run, and the options of a task made from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from cyclopts import Group, Parameter, validators

from tui_trainer.config.options import Option, options_of
from tui_trainer.config.training import GROUPS, default_preset
from tui_trainer.protocol.events import Level
from tui_trainer.protocol.schema import Scalar
from tui_trainer.tasks.definition import TaskDefinition

RUNNING = Group("Run", sort_key=100)
SHOWING = Group("Display", sort_key=101)
"""Groups in the help, after those of a task's own configuration."""

Options = TypeVar("Options")
"""RunOptions, CheckOptions or StartOptions."""

DEFAULT_BUDGET = 0.01
"""Share of step time that measuring may take."""


def _flag(
    help: str,
    group: Group,
    *,
    metavar: str | None = None,
    default: bool = False,
    validator: validators.Number | None = None,
) -> Parameter:
    return Parameter(
        help=help,
        group=group,
        negative=(),
        metavar=metavar,
        show_default=default,
        validator=validator,
    )


def _repeated(name: str, help: str, metavar: str) -> Parameter:
    """An option that may be given several times."""
    return Parameter(
        name=name,
        help=help,
        group=RUNNING,
        negative=(),
        metavar=metavar,
        show_default=False,
        consume_multiple=False,
    )


def _evaluated(options: type[Options]) -> type[Options]:
    """The class with its annotations as objects: cyclopts evaluates those that are text three times
    for a command line."""
    options.__annotations__ = get_type_hints(options, include_extras=True)
    return options


@_evaluated
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to show a run, where to keep it, and how much overhead it may have."""

    plain: Annotated[bool, _flag("print progress lines instead of opening the screen", SHOWING)] = (
        False
    )
    json: Annotated[bool, _flag("print JSON lines: the run, every step, the end", SHOWING)] = False
    ascii: Annotated[bool, _flag("draw with ASCII characters only", SHOWING)] = False
    slow_link: Annotated[
        bool,
        _flag("send less to the terminal: one frame in 2 s, and at once after a key", SHOWING),
    ] = False
    pixels: Annotated[
        bool,
        _flag("draw heat maps with real pixels where the terminal has them", SHOWING),
    ] = False
    paused: Annotated[
        bool, _flag("pause before the first step, until a key or `resume`", RUNNING)
    ] = False
    detach: Annotated[
        bool,
        _flag("start without a screen and print the name of the run; attach shows it", RUNNING),
    ] = False
    in_app: Annotated[
        bool,
        _flag("train on a thread of the app, so that the run ends with the terminal", RUNNING),
    ] = False
    nproc: Annotated[
        int | None,
        _flag(
            "train a script with this many processes, started by torchrun, as one run",
            RUNNING,
            metavar="N",
            validator=validators.Number(gte=1),
        ),
    ] = None
    ranks_over: Annotated[
        str | None,
        _flag(
            "with ranks on several machines: the address of rank 0's machine, which the ranks on "
            "the others reach through ssh without a password",
            RUNNING,
            metavar="ssh://\\[USER@]HOST\\[:PORT]",
        ),
    ] = None
    name: Annotated[
        str | None,
        _flag("name of the run (default: a random name)", RUNNING, metavar="NAME"),
    ] = None
    resume: Annotated[
        str | None,
        _flag(
            "continue from the newest checkpoint of a run, or from that of a step, as a new run "
            "with the same options",
            RUNNING,
            metavar="RUN\\[@STEP]",
        ),
    ] = None
    runs_dir: Annotated[
        Path | None,
        _flag("directory of the runs (also $TUI_TRAINER_RUNS_DIR)", RUNNING, metavar="DIR"),
    ] = None
    budget: Annotated[
        float | None,
        _flag(
            "share of step time that measuring may take, 0 for no limit (default: 0.01, with "
            "--json 0)",
            RUNNING,
            metavar="SHARE",
            validator=validators.Number(gte=0, lte=1),
        ),
    ] = None
    set: Annotated[
        tuple[str, ...],
        _repeated(
            "--set",
            "change a setting before the first step, as tui-trainer set does in a live run, "
            "such as lr=3e-4 with --resume; may be given several times",
            metavar="CHANGE",
        ),
    ] = ()
    snapshots: Annotated[
        str | None,
        _flag(
            "keep snapshots of the training in up to this much memory, such as 1GB, to go back to "
            "any step",
            RUNNING,
            metavar="SIZE",
        ),
    ] = None
    watch_nonfinite: Annotated[
        bool,
        _flag(
            "watch the outputs of all modules for nan and inf at every step, to name the module "
            "that produced one (otherwise only where something is wrong already)",
            RUNNING,
        ),
    ] = False
    attention_pattern: Annotated[
        str | None,
        _flag(
            "regular expression over parameter names that finds attention layers with unusual "
            "names: with a group (?P<layer>…) and either (?P<q>…), (?P<k>…) and "
            "(?P<v>…), or (?P<qkv>…)",
            RUNNING,
            metavar="REGEX",
        ),
    ] = None
    rules: Annotated[
        str,
        _flag(
            "switch rules off or change their thresholds, such as "
            "over-fitting=off,loss-diverges.rise=3; off: none (tui-trainer explain lists them)",
            RUNNING,
            metavar="CHANGES",
        ),
    ] = ""
    breakpoints: Annotated[
        tuple[str, ...],
        _repeated(
            "--break",
            "pause when a condition is met, such as nonfinite or 'loss > 3 * ema(loss)'; may "
            "be given several times (docs/breakpoints.md has the language)",
            metavar="CONDITION",
        ),
    ] = ()
    break_on_finding: Annotated[
        Level | None,
        _flag(
            "pause when a rule finds something of this level or worse: info, warning or error",
            RUNNING,
            metavar="LEVEL",
        ),
    ] = None
    alert: Annotated[
        tuple[str, ...],
        _repeated(
            "--alert",
            "a command or an http(s) address to call at findings that are warnings or errors, "
            "at breakpoints, and at the end; may be given several times (docs/runs.md)",
            metavar="COMMAND|URL",
        ),
    ] = ()
    checkpoint_every: Annotated[
        int | None,
        _flag(
            "steps between checkpoints (default: at the lowest validation loss, on request, and at "
            "the end; for a script on request only)",
            RUNNING,
            metavar="N",
            validator=validators.Number(gte=1),
        ),
    ] = None
    keep_checkpoints: Annotated[
        int,
        _flag(
            "number of newest checkpoints to keep, besides the best one",
            RUNNING,
            metavar="N",
            default=True,
            validator=validators.Number(gte=1),
        ),
    ] = 3

    @property
    def measuring_budget(self) -> float:
        """The budget in force: by default 0 with --json, which prints every quantity at every
        step."""
        if self.budget is not None:
            return self.budget
        return 0.0 if self.json else DEFAULT_BUDGET


@_evaluated
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """How to check a script or a task."""

    steps: Annotated[
        int,
        _flag(
            "optimizer steps after which to stop",
            RUNNING,
            metavar="N",
            default=True,
            validator=validators.Number(gte=1),
        ),
    ] = 300
    json: Annotated[bool, _flag("print one JSON object", SHOWING)] = False
    rules: Annotated[
        str,
        _flag("as for `run`", RUNNING, metavar="CHANGES"),
    ] = ""


@_evaluated
@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The options of the start screen."""

    ascii: Annotated[bool, _flag("draw with ASCII characters only", SHOWING)] = False
    slow_link: Annotated[
        bool,
        _flag("send less to the terminal: one frame in 2 s, and at once after a key", SHOWING),
    ] = False
    pixels: Annotated[
        bool,
        _flag("draw heat maps with real pixels where the terminal has them", SHOWING),
    ] = False
    runs_dir: Annotated[
        Path | None,
        _flag("directory of the runs (also $TUI_TRAINER_RUNS_DIR)", RUNNING, metavar="DIR"),
    ] = None


# ---------------------------------------------------------------- options of a task

PRESET = Group("Preset", sort_key=0)
ALIASES = {"learning_rate": "--lr"}
"""A second flag for an option, under the name that other programs use."""
_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
Start = Callable[[TaskDefinition, str | None, dict[str, Scalar], Options], int]
"""(task, preset, overrides, options) → exit status."""


def task_command(
    task: TaskDefinition, start: Start[Options], kind: type[Options]
) -> Callable[..., int]:
    """The function behind `tui-trainer <task>`, with one keyword for every option of the task,
    except those that `kind` has itself.

    Values are passed on as typed by the user: `config.training.resolve` converts and checks them,
    as it does for the start screen, so that both report the same error.
    """

    plain: Any = kind()
    taken = {each.name for each in fields(plain)}

    def command(
        *, preset: str | None = None, options: Options = plain, **given: str | bool | None
    ) -> int:
        overrides: dict[str, Scalar] = {name: v for name, v in given.items() if v is not None}
        return start(task, preset, overrides, options)

    keywords = [
        _keyword("preset", Annotated[str | None, _preset_flag(task)]),
        _keyword("options", Annotated[kind, Parameter(name="*")], plain),
        *(each for each in _override_keywords(task) if each.name not in taken),
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
                _task_flag(option, groups[option.group], preset.get(option.name, option.default)),
            ],
        )
        for option in options
    ]


def _preset_flag(task: TaskDefinition) -> Parameter:
    return Parameter(
        help=f"the preset that the options override: {', '.join(task.presets)}",
        group=PRESET,
        metavar="NAME",
        show_default=_constant(f"{default_preset(task)}, whose values are shown as defaults"),
    )


def _task_flag(option: Option, group: Group, value: Scalar) -> Parameter:
    metavar = "|".join(option.choices) or _METAVARS.get(option.kind)
    return Parameter(
        name=(option.flag, ALIASES[option.name]) if option.name in ALIASES else option.flag,
        help=option.help,
        group=group,
        metavar=metavar,
        negative=() if option.kind != "bool" else None,
        show_default=False if value is None else _constant(_default_text(value)),
    )


def _default_text(value: Scalar) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and not value.isprintable():
        return repr(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _constant(text: str) -> Callable[[Any], str]:
    """The shown default of an option whose own default, None, means the value of the preset."""

    def shown(_: Any) -> str:
        return text

    return shown
