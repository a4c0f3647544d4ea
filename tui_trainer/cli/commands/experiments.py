"""`what-if`, `lr-finder` and `landscape`: experiments with a live run, which is then restored."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators
from rich.text import Text

from tui_trainer.cli.commands.autograd import ask_for_rerun
from tui_trainer.cli.commands.common import (
    LiveRunName,
    RunsDir,
    cli_errors,
    confirmed,
    flag,
    require_single_run,
    result_of,
    run_and_changes,
)
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.cli.text_chart import TextCurve, text_chart
from tui_trainer.client.connection import RunClient
from tui_trainer.protocol.formatting import cost_text, number
from tui_trainer.protocol.travel import (
    MAX_POINTS,
    MAX_STEPS,
    Curve,
    Direction,
    EstimateCost,
    Experiment,
    ExperimentCost,
    ExperimentResult,
    FindLearningRate,
    MeasureLandscape,
    WhatIf,
)

ROWS = 25
CHART = (76, 16)
MARKERS = ("braille", "x")
Yes = Annotated[bool, flag("do not ask for confirmation, even if it takes long or much memory")]
Json = Annotated[bool, flag("print the curves as one JSON object")]


def _number(text: str, most: int) -> Parameter:
    return Parameter(
        help=text, metavar="N", negative=(), validator=validators.Number(gte=1, lte=most)
    )


def what_if(
    *given: Annotated[
        str,
        Parameter(
            help="the run (default: the live one, if there is only one) and changes, as for `set`",
            show_default=False,
        ),
    ],
    steps: Annotated[int, _number("number of steps with each", MAX_STEPS)] = 50,
    yes: Yes = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """compare the next steps with the present settings and with changed ones"""
    run, _, parsed = run_and_changes(given, required=True)
    return _experiment("what-if", run, WhatIf(parsed, steps), yes, json, runs_dir)


def lr_finder(
    run: LiveRunName = None,
    *,
    low: Annotated[float, Parameter(help="first learning rate", negative=())] = 1e-7,
    high: Annotated[float, Parameter(help="last learning rate", negative=())] = 1.0,
    steps: Annotated[int, _number("number of steps", MAX_STEPS)] = 100,
    yes: Yes = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """measure the loss while the learning rate grows, then restore the run"""
    return _experiment("lr-finder", run, FindLearningRate(low, high, steps), yes, json, runs_dir)


def landscape(
    run: LiveRunName = None,
    *,
    direction: Annotated[
        Direction,
        Parameter(help="against the gradient, a random one, or between two snapshots", negative=()),
    ] = "gradient",
    points: Annotated[int, _number("number of points", MAX_POINTS)] = 25,
    reach: Annotated[
        float,
        Parameter(
            help="how far to go: in learning rates, in norms of each parameter, or in distances of "
            "the snapshots",
            negative=(),
        ),
    ] = 1.0,
    first: Annotated[int, Parameter(help="step of one snapshot", negative=())] = 0,
    second: Annotated[int, Parameter(help="step of the other one", negative=())] = 0,
    yes: Yes = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """measure the loss of one batch along a direction from the present weights"""
    asked = MeasureLandscape(direction, points, reach, first, second)
    return _experiment("landscape", run, asked, yes, json, runs_dir)


def _experiment(
    name: str, run: str | None, asked: Experiment, yes: bool, json: bool, runs_dir: RunsDir
) -> int:
    with cli_errors():
        found = require_single_run(run, runs_dir)
        with RunClient.connect(found, f"tui-trainer {name}", read_only=False) as client:
            cost = client.inspect(EstimateCost(asked))
            if isinstance(cost.result, ExperimentCost):
                _announce(name, cost.result, yes)
            answer = ask_for_rerun(client, asked)
    result = result_of(answer, ExperimentResult)
    if json:
        document = {
            "run": found.name,
            "step": answer.step,
            "text": result.text,
            "curves": [
                {"name": curve.name, result.x_name: curve.x, "loss": curve.loss}
                for curve in result.curves
            ],
        }
        print(msgspec.json.encode(document).decode(), flush=True)
        return 0
    print("\n".join(_lines(result)), flush=True)
    return 0


def _announce(name: str, cost: ExperimentCost, yes: bool) -> None:
    """Print the cost of an experiment. Raises CommandError if the cost is large and the user does
    not confirm it."""
    text = f"{name} makes {cost_text(cost)}"
    if not cost.large or yes:
        print(text, file=sys.stderr, flush=True)
    elif not sys.stdin.isatty():
        raise UsageError(text, "add --yes")
    elif not confirmed(f"{text}; continue?"):
        raise CommandError("nothing was done")


def _chart_positions(curve: Curve, x_name: str) -> list[int]:
    """Positions of the points on the x axis: step numbers, or else indices of the points."""
    if x_name == "step":
        return [int(x) for x in curve.x]
    return list(range(len(curve.x)))


def _lines(result: ExperimentResult) -> list[str]:
    curves = [
        TextCurve(
            _chart_positions(curve, result.x_name), list(curve.loss), list(curve.loss), marker
        )
        for curve, marker in zip(result.curves, MARKERS, strict=False)
    ]
    names = [f"loss: {curve.name}" for curve in result.curves]
    table = new_table((result.x_name, *names), right=(result.x_name, *names))
    longest = max(result.curves, key=lambda curve: len(curve.x))
    every = max(1, len(longest.x) // ROWS)
    for position in range(0, len(longest.x), every):
        losses = [
            number(curve.loss[position], 0) if position < len(curve.loss) else ""
            for curve in result.curves
        ]
        table.add_row(f"{longest.x[position]:.4g}", *map(Text, losses))
    rows = [line.plain.rstrip() for line in table_lines(table)]
    return [*text_chart(curves, *CHART), *rows, result.text, "the run is unchanged, and paused"]
