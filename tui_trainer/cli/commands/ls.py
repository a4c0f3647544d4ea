"""`tui-trainer ls`: the runs, with the state and progress of each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag
from tui_trainer.cli.errors import notify
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.config.run_spec import runs_directory
from tui_trainer.protocol.formatting import number, rough_duration, step_of
from tui_trainer.protocol.messages import EntryState
from tui_trainer.protocol.text import sanitize
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import list_runs

STYLES: dict[EntryState, str] = {
    "live": "green",
    "paused": "yellow",
    "finished": "",
    "stopped": "dim",
    "crashed": "red",
    "refused": "yellow",
}
HEADINGS = ("RUN", "STATE", "STEP", "LOSS", "SPEED", "AGE", "WHAT")
NUMBERS = ("STEP", "LOSS", "SPEED", "AGE")
INDENT = "  "
MAX_REPORTED_REFUSALS = 3


def ls(
    *,
    json: Annotated[bool, flag("print a list of objects instead of a table")] = False,
    live: Annotated[bool, flag("only live and paused runs")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """list the runs: live, paused, finished, stopped, crashed"""
    with cli_errors():
        found = list_runs(runs_dir)
    runs = [run for run in found if run.live or not live]
    for run in [run for run in found if run.state == "refused"][:MAX_REPORTED_REFUSALS]:
        notify(run.note, run.hint)
    if json:
        print(msgspec.json.encode([overview_of(run) for run in runs]).decode())
        return 0
    if not runs:
        print(f"no {'live ' if live else ''}runs in {runs_directory(runs_dir)}")
        return 0
    console = Console(highlight=False)
    for line in table_lines(table(runs, time.time())):
        console.print(line, soft_wrap=True)
    return 0


class RunOverview(msgspec.Struct, frozen=True, kw_only=True):
    """A run as `ls --json` prints it. The names are documented in docs/runs.md and do not
    change."""

    name: str
    state: EntryState
    step: int
    total_steps: int | None
    loss: float | None
    loss_text: str | None
    steps_per_second: float | None
    items_per_second: float | None
    item_unit: str
    directory: str
    task: str
    title: str
    started_at: float
    ended_at: float | None
    age_s: float
    elapsed_s: float
    remaining_s: float | None
    device: str
    host: str
    pid: int | None
    parent: str | None
    branch_step: int | None
    note: str


def overview_of(run: RunEntry) -> RunOverview:
    """The overview of a run, from its directory."""
    status = run.reported
    return RunOverview(
        name=run.name,
        state=run.state,
        step=status.step,
        total_steps=status.total_steps,
        loss=status.loss,
        loss_text=status.loss_text or None,
        steps_per_second=status.steps_per_second if run.live else None,
        items_per_second=status.items_per_second if run.live else None,
        item_unit=status.item_unit,
        directory=str(run.directory),
        task=status.task,
        title=status.title,
        started_at=status.started_at,
        ended_at=status.ended_at,
        age_s=max(0.0, time.time() - status.started_at),
        elapsed_s=status.elapsed_s,
        remaining_s=status.remaining_s if run.live else None,
        device=status.device,
        host=status.host,
        pid=status.pid or None,
        parent=status.parent or None,
        branch_step=status.branch_step,
        note=run.note,
    )


def table(runs: list[RunEntry], now: float) -> Table:
    """One line for each run under a line of headings, with numbers aligned to the right. Runs that
    continue another run are indented below it."""
    found = new_table(HEADINGS, right=NUMBERS)
    for depth, run in as_tree(runs):
        name, state, *rest = _cells(run, now)
        indented = Text(INDENT * depth + name)
        found.add_row(indented, Text(state, STYLES.get(run.state, "")), *map(Text, rest))
    return found


def as_tree(runs: Sequence[RunEntry]) -> Iterator[tuple[int, RunEntry]]:
    """(depth, run): each run before those that continue it, otherwise in the order given. A run
    whose parent is not among them is at depth 0."""
    known = {run.directory for run in runs}
    children: dict[Path | None, list[RunEntry]] = {}
    for run in runs:
        parent = Path(run.reported.parent) if run.reported.parent else None
        inside = parent in known and parent != run.directory
        children.setdefault(parent if inside else None, []).append(run)
    left = [(0, run) for run in reversed(children.get(None, []))]
    listed: set[Path] = set()
    while left:
        depth, run = left.pop()
        listed.add(run.directory)
        yield depth, run
        left += [(depth + 1, each) for each in reversed(children.get(run.directory, []))]
    for run in runs:  # parents that name each other: their files were changed by hand
        if run.directory not in listed:
            yield 0, run


def _cells(run: RunEntry, now: float) -> tuple[str, ...]:
    status = run.reported
    speed = (
        f"{number(status.steps_per_second, 0, 3)}/s"
        if status.steps_per_second and run.live
        else "–"
    )
    origin = f"from {run.branched_from}" if run.branched_from else ""
    what = " · ".join(part for part in (status.title or status.task, origin) if part)
    if run.state in ("crashed", "refused") and run.note:
        what = f"{what} · {run.note}" if what else run.note
    return (
        sanitize(run.name),
        run.state,
        step_of(status.step, status.total_steps),
        status.loss_text or number(status.loss, 0),
        speed,
        rough_duration(now - status.started_at),
        " ".join(sanitize(what).split()),
    )
