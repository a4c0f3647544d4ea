"""`tui-trainer graph EXPRESSION`: a scalar graph with its gradients, on screen, as a table, as JSON
or as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.commands.common import flag
from tui_trainer.cli.errors import CommandError, UsageError, notify
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.cli.text_chart import TextCurve, text_chart
from tui_trainer.config.errors import did_you_mean
from tui_trainer.learn.scalar.graph import (
    DEFAULT_H,
    Descent,
    ScalarGraph,
    sweep_summary,
    three_rates,
)
from tui_trainer.learn.scalar.graph import sweep as sweep_of
from tui_trainer.learn.scalar.parser import EXAMPLES, GraphError, parse, parse_values
from tui_trainer.learn.scalar.steps import steps_of, update_line
from tui_trainer.learn.scalar.torch_process import TorchGradients, TorchProcess
from tui_trainer.protocol.formatting import short

CHART_WIDTH, CHART_HEIGHT = 78, 12
CHART_STEPS = 5
"""Steps on the chart: later steps of a rate that is too large would flatten the other curves."""
MARKERS = "so+"
NAMES = ", ".join(example.name for example in EXAMPLES)


def graph(
    expression: Annotated[
        str | None,
        Parameter(
            help=f'an expression in quotes, such as "(a*b + c) * f" or "e = a*b; L = e + c"; or an '
            f"example: {NAMES} (default: {EXAMPLES[0].name})",
            show_default=False,
        ),
    ] = None,
    /,
    *,
    at: Annotated[
        list[str] | None,
        Parameter(
            help="values of the names: --at a=2 b=-3",
            consume_multiple=True,
            metavar="NAME=VALUE",
            negative=(),
            show_default=False,
        ),
    ] = None,
    h: Annotated[
        float,
        Parameter(
            help="step of the numerical gradient",
            negative=(),
            validator=validators.Number(gt=0, lt=math.inf),
        ),
    ] = DEFAULT_H,
    sweep: Annotated[
        str | None,
        Parameter(
            help="print the error of the numerical gradient of NAME for h from 1e-15 to 1",
            metavar="NAME",
            negative=(),
            show_default=False,
        ),
    ] = None,
    descend: Annotated[
        str | None,
        Parameter(
            help="print steps NAME <- NAME - lr*G with a rate too small, right and too large",
            metavar="NAME",
            negative=(),
            show_default=False,
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        Parameter(
            help="write the graph as an SVG picture",
            metavar="FILE",
            negative=(),
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, flag("with --svg: replace the file")] = False,
    plain: Annotated[bool, flag("print a table instead of opening the screen")] = False,
    json: Annotated[bool, flag("print one JSON object")] = False,
    ascii: Annotated[bool, flag("draw with ASCII characters only")] = False,
) -> int:
    """a graph of scalars: values, gradients and the chain rule, one node at a time"""
    found = _graph_of(expression, at)
    for name in (sweep, descend):
        _check_name(found, name)
    if svg is not None:
        _write_svg(found, svg, overwrite)
        return 0
    if not (json or plain or sweep or descend) and not why_no_screen():
        return _open(found, h, ascii)
    autograd = _autograd(found)
    if json:
        print(_as_json(found, autograd, h, sweep, descend), flush=True)
        return 0
    console = Console(highlight=False)
    for line in _as_lines(found, autograd, h, sweep, descend):
        console.print(line, soft_wrap=True)
    return 0


def _graph_of(expression: str | None, at: Sequence[str] | None) -> ScalarGraph:
    """The graph that the arguments describe. Raises UsageError, pointing at the place."""
    wanted = EXAMPLES[0].name if expression is None else expression
    example = next((each for each in EXAMPLES if each.name == wanted), None)
    try:
        values = parse_values(at or ())
        if example is not None and wanted not in values:
            return ScalarGraph.of(example.text, {**example.values, **values})
        return ScalarGraph.at(parse(wanted), values)
    except GraphError as error:
        raise UsageError(error.pointed if error.text else error.message, error.hint) from error


def _check_name(found: ScalarGraph, name: str | None) -> None:
    inputs = found.expression.inputs
    if name is not None and name not in inputs:
        raise UsageError(f"{name} is not an input of the expression", did_you_mean(name, inputs))


def _write_svg(found: ScalarGraph, path: Path, overwrite: bool) -> None:
    from tui_trainer.learn.scalar.svg import svg

    if path.suffix != ".svg":
        raise UsageError(f"cannot write {path.name}", "its name must end in .svg")
    if path.exists() and not overwrite:
        raise CommandError(f"{path} already exists", "--overwrite replaces it")
    try:
        path.write_text(svg(found), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"wrote {path}", flush=True)


def _open(found: ScalarGraph, h: float, ascii: bool) -> int:
    from tui_trainer.cli.screen import run_app_until_exit
    from tui_trainer.ui.graph_app import run_graph

    return run_app_until_exit(lambda: run_graph(found, h=h, ascii=ascii), lambda: None)


def _autograd(found: ScalarGraph) -> TorchGradients | None:
    process = TorchProcess()
    try:
        answer = process.gradients(found.expression.text, found.inputs)
    finally:
        process.close()
    if answer is None:
        notify("PyTorch gave no gradients: those shown are tui-trainer's own", "tui-trainer doctor")
    return answer


# ---------------------------------------------------------------- text


def _as_lines(
    found: ScalarGraph, autograd: TorchGradients | None, h: float, swept: str | None,
    moved: str | None,
) -> list[Text]:  # fmt: skip
    values = "  ".join(f"{name} = {value:g}" for name, value in found.inputs.items())
    lines = [Text(found.expression.text, "bold"), Text(f"at {values}"), Text()]
    lines += _node_lines(found, autograd, h)
    if swept is None and moved is None:
        lines += [Text(), Text("backward, one node at a time", "bold")]
        for step in steps_of(found):
            if step.backward:
                lines += [Text(step.title), *(Text(f"  {line}") for line in step.lines)]
    if swept is not None:
        lines += [Text(), *_sweep_lines(found, swept)]
    if moved is not None:
        lines += [Text(), *_descent_lines(three_rates(found, moved), found.output_name)]
    return lines


def _node_lines(found: ScalarGraph, autograd: TorchGradients | None, h: float) -> list[Text]:
    gradients = found.gradients if autograd is None else autograd.gradients
    source = "tui-trainer" if autograd is None else autograd.version
    table = new_table(
        ("name", "operation", "value", "gradient", "numerical", "as a product"),
        right=("value", "gradient", "numerical"),
    )
    for index, node in enumerate(found.nodes):
        table.add_row(
            Text(node.name),
            Text(found.expression.operation_text(index) or node.operation),
            short(found.values[index]),
            short(gradients[index]),
            _ten_digits(found.numerical(index, h)),
            Text(found.formulas[index]),
        )
    note = f"gradient: d{found.output_name}/d(name) by {source}; numerical: central, h = {h:g}"
    return [*table_lines(table), Text(note, "dim")]


def _ten_digits(value: float | None) -> str:
    """`value` with enough digits to show the error of a numerical gradient."""
    return short(None) if value is None else f"{value:.10g}"


def _sweep_lines(found: ScalarGraph, name: str) -> list[Text]:
    index = found.expression.index(name)
    assert index is not None
    points = sweep_of(found, index, 31)
    table = new_table(("h", "central", "forward"), right=("h", "central", "forward"))
    for point in points:
        table.add_row(f"{point.h:.0e}", _error(point.central), _error(point.forward))
    title = f"error of the numerical d{found.output_name}/d{name}"
    return [Text(title, "bold"), *table_lines(table), Text(sweep_summary(found, index, points))]


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _descent_lines(descent: Descent, output: str) -> list[Text]:
    lines = [Text(f"{descent.name} <- {descent.name} - lr*G", "bold"), Text(descent.verdict)]
    if not descent.runs:
        return lines
    before, moved = f"{output} before", f"{descent.name} - lr*G"
    headings = ("rate", "lr", before, "after 1 step", "after all", moved)
    table = new_table(headings, right=("lr", before, "after 1 step", "after all"))
    for number, run in enumerate(descent.runs):
        table.add_row(
            run.label,
            f"{run.learning_rate:.3g}",
            short(run.outputs[0]),
            short(run.outputs[min(1, len(run.outputs) - 1)]),
            "undefined" if run.left_domain else short(run.outputs[-1]),
            Text(update_line(descent, number)),
        )
    curves = [
        TextCurve(range(len(shown := run.outputs[:CHART_STEPS])), shown, shown, marker)
        for run, marker in zip(descent.runs, MARKERS, strict=True)
    ]
    chart = text_chart(curves, CHART_WIDTH, CHART_HEIGHT)
    legend = "   ".join(
        f"{marker} {run.label}" for run, marker in zip(descent.runs, MARKERS, strict=True)
    )
    if chart:
        lines += [*table_lines(table), Text(), Text(f"{output} at each step   {legend}")]
        return lines + [Text(line) for line in chart]
    return lines + table_lines(table)


# ---------------------------------------------------------------- JSON


def _as_json(
    found: ScalarGraph, autograd: TorchGradients | None, h: float, swept: str | None,
    moved: str | None,
) -> str:  # fmt: skip
    import msgspec

    names = [node.name for node in found.nodes]
    gradients = found.gradients if autograd is None else autograd.gradients
    made: dict[str, Any] = {
        "expression": found.expression.text,
        "output": found.output_name,
        "at": dict(found.inputs),
        "gradient_by": "tui-trainer" if autograd is None else autograd.version,
        "h": h,
        "nodes": [
            {
                "name": node.name,
                "operation": node.operation,
                "inputs": [names[i] for i in node.inputs],
                "value": found.values[index],
                "gradient": _finite(gradients[index]),
                "numerical": _finite(found.numerical(index, h)),
                "product": found.formulas[index],
            }
            for index, node in enumerate(found.nodes)
        ],
        "backward": [
            {
                "name": names[step.node],
                "gradient": _finite(step.gradient),
                "passes_on": [
                    {
                        "to": names[each.to],
                        "local": _finite(each.local),
                        "formula": each.formula_alone,
                        "amount": _finite(each.amount),
                        "total": _finite(each.total),
                    }
                    for each in step.contributions
                ],
            }
            for step in found.backward
        ],
    }
    if swept is not None:
        index = found.expression.index(swept)
        assert index is not None
        points = sweep_of(found, index)
        made["sweep"] = {
            "name": swept,
            "summary": str(sweep_summary(found, index, points)),
            "points": [
                {"h": p.h, "central": _finite(p.central), "forward": _finite(p.forward)}
                for p in points
            ],
        }
    if moved is not None:
        descent = three_rates(found, moved)
        made["descent"] = {
            "name": moved,
            "verdict": str(descent.verdict),
            "runs": [
                {
                    "label": run.label,
                    "learning_rate": run.learning_rate,
                    "weights": run.weights,
                    "outputs": run.outputs,
                    "left_domain": run.left_domain,
                }
                for run in descent.runs
            ],
        }
    return msgspec.json.encode(made).decode()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
