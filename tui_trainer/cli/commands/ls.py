"""`tui-trainer ls`: the runs, how each is and how far."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag
from tui_trainer.cli.errors import say
from tui_trainer.config.run_spec import runs_directory
from tui_trainer.protocol.formatting import number, rough_duration, step_of
from tui_trainer.protocol.text import sanitize
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import list_runs

STYLES = {
    "live": "green",
    "paused": "yellow",
    "finished": "",
    "stopped": "dim",
    "crashed": "red",
    "refused": "yellow",
}
_GAP = "  "
REFUSED_SAID = 3


def ls(
    *,
    json: Annotated[bool, flag("print a list of objects instead of a table")] = False,
    live: Annotated[bool, flag("only the runs whose process is there")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """the runs: live, paused, finished, stopped, crashed"""
    with cli_errors():
        found = list_runs(runs_dir)
    runs = [run for run in found if run.live or not live]
    for run in [run for run in found if run.state == "refused"][:REFUSED_SAID]:
        say(run.note, run.hint)
    if json:
        print(msgspec.json.encode([as_object(run) for run in runs]).decode())
        return 0
    console = Console(highlight=False, soft_wrap=True)
    if not runs:
        console.print(f"no {'live ' if live else ''}runs in {runs_directory(runs_dir)}")
    for line in table(runs, time.time()):
        console.print(line)
    return 0


def as_object(run: RunEntry) -> dict[str, Any]:
    """A run as JSON: the names are documented in docs/runs.md and do not change."""
    said = run.reported
    return {
        "name": run.name,
        "state": run.state,
        "step": said.step,
        "total_steps": said.total_steps,
        "loss": said.loss,
        "loss_text": said.loss_text or None,
        "steps_per_second": said.steps_per_second if run.live else None,
        "items_per_second": said.items_per_second if run.live else None,
        "item_unit": said.item_unit,
        "directory": str(run.directory),
        "task": said.task,
        "title": said.title,
        "started_at": said.started_at,
        "ended_at": said.ended_at,
        "age_s": max(0.0, time.time() - said.started_at),
        "elapsed_s": said.elapsed_s,
        "remaining_s": said.remaining_s if run.live else None,
        "device": said.device,
        "host": said.host,
        "pid": said.pid or None,
        "parent": said.parent or None,
        "branch_step": said.branch_step,
        "note": run.note,
    }


def table(runs: list[RunEntry], now: float) -> list[Text]:
    """One line a run under a line of headings, numbers to the right."""
    rows = [_cells(run, now) for run in runs]
    if not rows:
        return []
    headings = ("RUN", "STATE", "STEP", "LOSS", "SPEED", "AGE", "WHAT")
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = [Text(_line(headings, widths), "bold")]
    for run, row in zip(runs, rows, strict=True):
        line = Text(_line(row, widths))
        start = widths[0] + len(_GAP)
        line.stylize(STYLES.get(run.state, ""), start, start + widths[1])
        lines.append(line)
    return lines


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    left = {0, 1, 6}
    padded = [
        cell.ljust(width) if i in left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return _GAP.join(padded).rstrip()


def _cells(run: RunEntry, now: float) -> tuple[str, ...]:
    said = run.reported
    speed = (
        f"{number(said.steps_per_second, 0, 3)}/s" if said.steps_per_second and run.live else "–"
    )
    origin = f"from {run.branched_from}" if run.branched_from else ""
    what = " · ".join(part for part in (said.title or said.task, origin) if part)
    if run.state in ("crashed", "refused") and run.note:
        what = f"{what} · {run.note}" if what else run.note
    return (
        sanitize(run.name),
        run.state,
        step_of(said.step, said.total_steps),
        said.loss_text or number(said.loss, 0),
        speed,
        rough_duration(now - said.started_at),
        " ".join(sanitize(what).split()),
    )
