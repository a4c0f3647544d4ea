"""`tui-trainer compare RUN RUN…`: several runs on one chart, or as a table without a terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter, validators
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag
from tui_trainer.cli.errors import UsageError, notify
from tui_trainer.cli.table import columns, new_table, table_lines
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.cli.text_chart import TextCurve, text_chart
from tui_trainer.comparison.compared_runs import (
    MAX_RUNS,
    ComparedRun,
    ComparedValue,
    differences,
    outcome,
)
from tui_trainer.comparison.divergence import first_difference
from tui_trainer.protocol.formatting import scalar
from tui_trainer.protocol.schema import Scalar
from tui_trainer.protocol.text import sanitize
from tui_trainer.runs.registry import resolve

MARKERS = "*o+x#@%&"
MAX_CELL_WIDTH = 32
"""Longer options, such as a command, are listed below the table, with a line for each run."""
CHART_BUCKETS = 70
CHART_WIDTH, CHART_HEIGHT = 78, 12


def compare(
    *runs: Annotated[
        str,
        Parameter(
            help="two runs or more: names, prefixes of names, or directories",
            show_default=False,
        ),
    ],
    plain: Annotated[bool, flag("print a table instead of opening the screen")] = False,
    json: Annotated[bool, flag("print one JSON object")] = False,
    tolerance: Annotated[
        float,
        Parameter(
            help="the first difference is where values differ by more than this share of the "
            "larger one [default: 0, at all]",
            metavar="X",
            negative=(),
            show_default=False,
            validator=validators.Number(gte=0, lt=math.inf),
        ),
    ] = 0.0,
    ascii: Annotated[bool, flag("draw with ASCII characters only")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """overlay the losses and norms of runs, list how their options differ, and where they first
    differ"""
    with cli_errors():
        found = list({run.directory: run for run in (resolve(r, runs_dir) for r in runs)}.values())
        if len(found) < 2:
            raise UsageError("compare needs two runs or more", "tui-trainer ls lists them")
        if len(found) > MAX_RUNS:
            raise UsageError(f"more than {MAX_RUNS} runs cannot be distinguished on a chart")
        compared = [ComparedRun(run) for run in found]
    if json:
        print(_as_json(compared, tolerance))
    elif plain or why_no_screen():
        console = Console(highlight=False)
        for line in as_lines(compared, tolerance):
            console.print(line, soft_wrap=True)
    else:
        return open_screen(compared, ascii, tolerance)
    _print_faults(compared)
    return 0


def _print_faults(compared: list[ComparedRun]) -> None:
    for run in compared:
        if run.fault:
            notify(f"{run.name}: {run.fault}")


def open_screen(compared: list[ComparedRun], ascii: bool, tolerance: float = 0.0) -> int:
    """Show the runs on one chart until the user leaves, and return the exit status."""
    from tui_trainer.cli.screen import run_app_until_exit
    from tui_trainer.ui.compare_app import run_comparison

    return run_app_until_exit(
        lambda: run_comparison(compared, ascii=ascii, tolerance=tolerance),
        lambda: ComparisonResult(compared),
    )


class ComparisonResult:
    """The compared runs, for the exit summary: only what could not be read is printed."""

    def __init__(self, compared: list[ComparedRun]) -> None:
        self.directory: Path = compared[0].run.directory
        self._compared = compared

    def print_summary(self) -> int:
        _print_faults(self._compared)
        return 0


def as_lines(compared: list[ComparedRun], tolerance: float = 0.0) -> list[Text]:
    """How each run ended and which options differ, as one table with a column for each run; then
    where each run first differs from the first one."""
    names = [sanitize(run.name) for run in compared]
    table = new_table(["", *names], right=names)
    for line in outcome(compared):
        table.add_row(*_cells(line))
    unlike = differences(compared)
    table.add_row()
    table.add_row(Text("different options" if unlike else "same options", "bold"))
    below: list[Text] = []
    for line in unlike:
        cells = _cells(line)
        if max(cell.cell_len for cell in cells[1:]) <= MAX_CELL_WIDTH:
            table.add_row(*cells)
            continue
        of_runs = columns("left", "left")
        for name, cell in zip(names, cells[1:], strict=True):
            of_runs.add_row(Text(f"  {name}"), cell)
        below += [cells[0], *table_lines(of_runs)]
    divergence = [line for run in compared[1:] for line in _divergence(compared[0], run, tolerance)]
    return [*_loss_chart(compared), *table_lines(table), *below, *divergence]


def _divergence(a: ComparedRun, b: ComparedRun, tolerance: float) -> list[Text]:
    """Where two runs differ first, with the values of both around it."""
    found = first_difference(a.history, b.history, tolerance)
    lines = [Text(), Text(found.title(a.name, b.name, tolerance), "bold")]
    first = found.first
    if first is not None:
        headings = ["step", sanitize(a.name), sanitize(b.name)]
        table = new_table(headings, right=headings)
        for step, x, y in first.around:
            style = "bold" if step == first.step else ""
            texts = (f"{step:,}", first.text_of(x), first.text_of(y))
            table.add_row(*(Text(text, style) for text in texts))
        lines += table_lines(table)
    return lines + [Text(note, "dim") for note in found.notes(a.name, b.name)]


def _loss_chart(compared: list[ComparedRun]) -> list[Text]:
    """The training losses on one chart, with the marker of each run."""
    stop = max(run.length[0] for run in compared)
    curves, legend = [], []
    for run, marker in zip(compared, MARKERS, strict=False):
        curve = run.curve("loss", stop, CHART_BUCKETS) if stop else None
        if curve is None:
            continue
        kept = np.flatnonzero(curve.filled)
        steps = (1 + kept * stop // CHART_BUCKETS).tolist()
        low, high = curve.low[kept].tolist(), curve.high[kept].tolist()
        curves.append(TextCurve(steps, low, high, marker))
        legend.append(f"{marker} {run.name}")
    chart = text_chart(curves, CHART_WIDTH, CHART_HEIGHT)
    lines = ["training loss   " + "   ".join(legend), *chart, ""] if chart else []
    return [Text(line) for line in lines]


def _cells(line: ComparedValue) -> list[Text]:
    return [Text(sanitize(line.name)), *(Text(sanitize(scalar(each))) for each in line.values)]


def _as_json(compared: list[ComparedRun], tolerance: float) -> str:
    import msgspec

    def finite(value: Scalar) -> Scalar:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def part(lines: list[ComparedValue]) -> dict[str, list[Scalar]]:
        return {line.name: [finite(value) for value in line.values] for line in lines}

    def divergence(run: ComparedRun) -> dict[str, Any]:
        found = first_difference(compared[0].history, run.history, tolerance)
        first = found.first
        made: dict[str, Any] = {
            "runs": [compared[0].name, run.name],
            "first": None,
            "steps": found.steps,
            "quantities": found.quantities,
            "only_in": found.only_in,
            "group": found.group,
        }
        if first is not None:
            made["first"] = {
                "step": first.step,
                "phase": first.phase,
                "quantity": first.quantity,
                "table": first.table,
                "column": first.column,
                "values": [finite(value) for value in first.values],
                "texts": [first.text_of(value) for value in first.values],
                "equal_until": first.equal_until,
                "others": first.others,
                "around": [
                    {"step": step, "values": [finite(x), finite(y)]} for step, x, y in first.around
                ],
            }
        return made

    made = {
        "runs": [run.name for run in compared],
        "outcome": part(outcome(compared)),
        "differences": part(differences(compared)),
        "tolerance": tolerance,
        "divergence": [divergence(run) for run in compared[1:]],
    }
    return msgspec.json.encode(made).decode()
