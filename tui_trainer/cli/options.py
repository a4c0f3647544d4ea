"""The flags that every run takes, whatever it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

RUNNING = Group("The run", sort_key=100)
SHOWING = Group("Showing", sort_key=101)
"""Both come after the groups of a task's own configuration."""

DEFAULT_BUDGET = 0.01
"""Share of the step time that measuring may take."""


def _flag(
    help: str, group: Group, *, metavar: str | None = None, default: bool = False
) -> Parameter:
    return Parameter(help=help, group=group, negative=(), metavar=metavar, show_default=default)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to show a run, where to keep it and what measuring it may cost."""

    plain: Annotated[bool, _flag("print progress lines instead of opening the screen", SHOWING)] = (
        False
    )
    json: Annotated[
        bool, _flag("print one JSON object a line: the run, every step, the end", SHOWING)
    ] = False
    ascii: Annotated[bool, _flag("draw with ASCII characters alone", SHOWING)] = False
    slow_link: Annotated[
        bool,
        _flag("send the terminal little: at most one frame in 2 s, but at once on a key", SHOWING),
    ] = False
    paused: Annotated[
        bool, _flag("stop before the first step and wait for keys, or for `resume`", RUNNING)
    ] = False
    detach: Annotated[
        bool, _flag("start it without a screen and print its name; attach shows it", RUNNING)
    ] = False
    in_app: Annotated[
        bool,
        _flag("train on a thread of the app, so that it ends with the terminal", RUNNING),
    ] = False
    name: Annotated[
        str | None,
        _flag("what to call the run (default: a name is made up)", RUNNING, metavar="NAME"),
    ] = None
    resume: Annotated[
        str | None,
        _flag(
            "go on from the newest checkpoint of a run, or from that of a step: a new run, which "
            "takes over the other's options",
            RUNNING,
            metavar="RUN\\[@STEP]",
        ),
    ] = None
    runs_dir: Annotated[
        Path | None,
        _flag("where runs are kept (also $TUI_TRAINER_RUNS_DIR)", RUNNING, metavar="DIR"),
    ] = None
    budget: Annotated[
        float | None,
        _flag(
            "share of the step time that measuring may take; 0 measures all at its own cadence, "
            "whatever it costs (default: 0.01, under --json 0)",
            RUNNING,
            metavar="SHARE",
        ),
    ] = None
    attention_pattern: Annotated[
        str | None,
        _flag(
            "regular expression over parameter names that finds the attention layers, where their "
            "names do not say it: with a group (?P<layer>…) and either (?P<q>…), (?P<k>…) and "
            "(?P<v>…), or (?P<qkv>…)",
            RUNNING,
            metavar="REGEX",
        ),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        _flag(
            "steps between checkpoints (without it: at the lowest validation loss, when asked, and "
            "at the end; of a script only when asked)",
            RUNNING,
            metavar="N",
        ),
    ] = None
    keep_checkpoints: Annotated[
        int,
        _flag(
            "how many of the newest checkpoints to keep, the best one besides",
            RUNNING,
            metavar="N",
            default=True,
        ),
    ] = 3

    @property
    def measuring_budget(self) -> float:
        """The budget in force: a program that reads every step is promised every step."""
        if self.budget is not None:
            return self.budget
        return 0.0 if self.json else DEFAULT_BUDGET


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The flags of the start screen: what does not depend on the run that is going to be made."""

    ascii: Annotated[bool, _flag("draw with ASCII characters alone", SHOWING)] = False
    slow_link: Annotated[
        bool,
        _flag("send the terminal little: at most one frame in 2 s, but at once on a key", SHOWING),
    ] = False
    runs_dir: Annotated[
        Path | None,
        _flag("where runs are kept (also $TUI_TRAINER_RUNS_DIR)", RUNNING, metavar="DIR"),
    ] = None
