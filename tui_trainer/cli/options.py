"""The flags that every run takes, whatever it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

SHOWING = Group("Showing", sort_key=1)
RUNNING = Group("The run", sort_key=2)


def _flag(help: str, group: Group, *names: str, metavar: str | None = None) -> Parameter:
    return Parameter(name=names or None, help=help, group=group, negative=(), metavar=metavar)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to show a run, where to keep it and what measuring it may cost."""

    plain: Annotated[bool, _flag("Print progress lines instead of opening the screen.", SHOWING)] = (
        False
    )
    json: Annotated[
        bool, _flag("Print one JSON object a line: the run, every step, the end.", SHOWING)
    ] = False
    ascii: Annotated[bool, _flag("Draw with ASCII characters alone.", SHOWING)] = False
    paused: Annotated[bool, _flag("Stop before the first step and wait for keys.", RUNNING)] = False
    name: Annotated[
        str | None, _flag("What to call the run (default: a free name, made up).", RUNNING)
    ] = None
    runs_dir: Annotated[
        Path | None,
        _flag("Where runs are kept (also $TUI_TRAINER_RUNS_DIR).", RUNNING, metavar="DIR"),
    ] = None
    budget: Annotated[
        float,
        _flag(
            "Share of the step time that measuring may take; 0 measures all at every step.", RUNNING
        ),
    ] = 0.01
    attention_pattern: Annotated[
        str | None,
        _flag(
            "Regular expression naming the query, key and value parameters, where their names "
            "do not say it.",
            RUNNING,
            metavar="REGEX",
        ),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        _flag("Steps between checkpoints (default: at the end and when asked).", RUNNING),
    ] = None
    keep_checkpoints: Annotated[
        int, _flag("How many of the newest checkpoints to keep, the best one besides.", RUNNING)
    ] = 3
