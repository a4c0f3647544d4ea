"""`tui-trainer autograd RUN`: the autograd graph of a live run's loss, as text or a picture;
`tui-trainer gradcheck RUN`: a gradient of the loss, checked against numerical ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators
from rich.text import Text

from tui_trainer.cli.commands.common import (
    Rank,
    RunsDir,
    cli_errors,
    flag,
    inspect_running,
    require_single_run,
    result_of,
)
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.client.answers.autograd import (
    Fold,
    as_data,
    dot,
    find_leaf,
    fold,
    gradient_text,
    lines,
    matches,
    path_to_loss,
    svg,
)
from tui_trainer.client.answers.tensors import find_tensor, parse_index
from tui_trainer.client.connection import RunClient
from tui_trainer.config.options import parse_size
from tui_trainer.protocol.autograd import (
    MAX_CHECKED,
    AutogradGraph,
    CheckedEntry,
    CheckGradient,
    DescribeGraph,
    GradientCheck,
)
from tui_trainer.protocol.formatting import (
    bytes_,
    count,
    counted,
    milliseconds,
    number,
    shape_text,
)
from tui_trainer.protocol.inspection import (
    NOT_CAPTURED,
    Inspected,
    InspectionRequest,
    ListTensors,
    TensorList,
)
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry

MAX_FOUND = 200


def autograd(
    run: Annotated[
        str | None,
        Parameter(help="the run (default: the live one, if there is only one)", show_default=False),
    ] = None,
    /,
    *,
    find: Annotated[
        str | None,
        Parameter(
            help="list the operations in which all these words occur",
            metavar="TEXT",
            show_default=False,
            negative=(),
        ),
    ] = None,
    path: Annotated[
        str | None,
        Parameter(
            help="the path from this parameter to the loss: at each branch, along the largest "
            "gradient",
            metavar="PARAMETER",
            show_default=False,
            negative=(),
        ),
    ] = None,
    depth: Annotated[
        int | None,
        Parameter(
            help="how deep modules are opened (default: all)",
            metavar="N",
            show_default=False,
            validator=validators.Number(gte=0),
        ),
    ] = None,
    all: Annotated[bool, flag("every block instead of one of equal ones")] = False,
    json: Annotated[bool, flag("print the whole graph as one JSON object")] = False,
    svg: Annotated[
        Path | None,
        Parameter(help="write a picture", metavar="FILE", show_default=False, negative=()),
    ] = None,
    dot: Annotated[
        Path | None,
        Parameter(
            help="write the whole graph for Graphviz",
            metavar="FILE",
            show_default=False,
            negative=(),
        ),
    ] = None,
    overwrite: Annotated[bool, flag("replace existing files")] = False,
    rank: Rank = 0,
    runs_dir: RunsDir = None,
) -> int:
    """show the autograd graph of a live run's loss"""
    for file in (svg, dot):
        if file is not None and file.exists() and not overwrite:
            raise CommandError(f"{file} already exists", "--overwrite replaces it")
    with cli_errors():
        found = require_single_run(run, runs_dir)
        with RunClient.connect(found, "tui-trainer autograd", rank=rank) as client:
            answer = ask_for_rerun(client, DescribeGraph())
        graph = result_of(answer, AutogradGraph)
        if svg is not None or dot is not None:
            _write(graph, found, answer, svg, dot, all)
        elif json:
            print(_as_json(found, answer, graph), flush=True)
        elif path is not None:
            print("\n".join(_path_lines(graph, path)), flush=True)
        elif find is not None:
            print("\n".join(_found_lines(graph, find)), flush=True)
        else:
            heading = _heading(graph, answer)
            print("\n".join([*heading, "", *_tree_lines(graph, depth, all)]), flush=True)
    return 0


def ask_for_rerun(client: RunClient, request: InspectionRequest) -> Inspected:
    """The answer to a request that repeats the forward pass. A running run keeps its batch only
    from the first request on, so the request is repeated after a step. Raises RunError."""
    return inspect_running(client, request, _waits_for_batch)


def _waits_for_batch(answer: Inspected) -> bool:
    live = isinstance(answer.result, AutogradGraph) and answer.result.source == "live"
    return live or answer.message == NOT_CAPTURED


# ---------------------------------------------------------------- text


def _title(graph: AutogradGraph, answer: Inspected) -> str:
    loss = "" if graph.loss is None else f"loss {number(graph.loss, 0, 6)} · "
    return f"{loss}{answer.moment}"


def _heading(graph: AutogradGraph, answer: Inspected) -> list[str]:
    operations = sum(not node.leaf for node in graph.nodes)
    leaves = len(graph.nodes) - operations
    facts = [
        counted(operations, "operation"),
        counted(leaves, "leaf", "leaves"),
        counted(graph.edges, "edge"),
    ]
    if graph.saved_bytes is not None:
        facts.append(f"{bytes_(graph.saved_bytes, 0)} saved for backward")
    found = [_title(graph, answer), ", ".join(facts)]
    if graph.left_out:
        found.append(f"note: {graph.left_out:,} edges lead to further nodes, which are left out")
    return [*found, *(f"note: {note}" for note in graph.notes)]


def _tree_lines(graph: AutogradGraph, depth: int | None, everything: bool) -> list[str]:
    table = new_table(("", "shape", "saved", "gradient"), right=("shape", "saved", "gradient"))
    for level, row in lines(fold(graph, not everything), depth):
        table.add_row(Text(f"{'  ' * level}{label_of(row)}"), *cells_of(row))
    return [line.plain for line in table_lines(table)]


def label_of(row: Fold) -> str:
    """`0 … 11 × 12  Block`, `Addmm`, `weight`"""
    times = f" × {row.count}" if row.count > 1 else ""
    detail = f"  {row.detail}" if row.detail and row.kind != "leaf" else ""
    return f"{row.label}{times}{detail}"


def cells_of(row: Fold) -> tuple[str, str, str]:
    """Shape, saved bytes and gradient of a row, as text."""
    small, large = row.gradients
    own = row.kind in ("operation", "leaf") or not row.children
    shape = shape_text(row.shape) if own else ""
    saved = bytes_(row.saved_bytes, 0) if row.saved_bytes else ""
    several = row.kind == "repeat" and small < large
    gradient = (
        f"{gradient_text(small)} … {gradient_text(large)}" if several else gradient_text(large)
    )
    return shape, saved, gradient


def _path_lines(graph: AutogradGraph, name: str) -> list[str]:
    found = path_to_loss(graph, find_leaf(graph, name))
    several = f"1 of {count(found.paths, 0)} paths" if found.paths > 1 else "the only path"
    table = new_table(("", "module", "shape", "gradient"), right=("shape", "gradient"))
    for index, gradient in zip(found.nodes, (math.nan, *found.gradients), strict=True):
        node = graph.nodes[index]
        module = graph.modules[node.module].path
        table.add_row(
            Text(node.leaf or node.operation),
            Text(module),
            shape_text(node.shape),
            gradient_text(gradient),
        )
    steps = counted(len(found.gradients), "edge")
    heading = f"{graph.nodes[found.nodes[0]].leaf} to the loss: {steps}, {several}"
    return [heading, "", *(line.plain for line in table_lines(table))]


def _found_lines(graph: AutogradGraph, text: str) -> list[str]:
    found = matches(graph, text)
    table = new_table(
        ("", "module", "shape", "saved", "gradient"), right=("shape", "saved", "gradient")
    )
    for index in found[:MAX_FOUND]:
        node = graph.nodes[index]
        saved = bytes_(node.saved_bytes, 0) if node.saved_bytes else ""
        module = graph.modules[node.module].path
        name = Text(node.leaf or node.operation)
        table.add_row(
            name, Text(module), shape_text(node.shape), saved, gradient_text(node.gradient)
        )
    heading = f"{len(found):,} of {counted(len(graph.nodes), 'node')} match {text}"
    return [heading, "", *(line.plain for line in table_lines(table))] if found else [heading]


# ---------------------------------------------------------------- files


def _write(
    graph: AutogradGraph,
    run: RunEntry,
    answer: Inspected,
    picture: Path | None,
    graphviz: Path | None,
    everything: bool,
) -> None:
    title = f"{run.name} · {_title(graph, answer)}"
    for file, text in (
        (picture, svg(graph, title, not everything) if picture is not None else ""),
        (graphviz, dot(graph, title) if graphviz is not None else ""),
    ):
        if file is None:
            continue
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"cannot write {file}: {error.strerror or error}") from error
        print(f"wrote the graph ({counted(len(graph.nodes), 'node')}) to {file}", flush=True)


def _as_json(run: RunEntry, answer: Inspected, graph: AutogradGraph) -> str:
    known = {"run": run.name, "rank": answer.rank, "step": answer.step, "phase": answer.phase}
    return msgspec.json.encode({**known, "took_ms": answer.took_ms, **as_data(graph)}).decode()


def parse_index_option(text: str) -> tuple[int, ...]:
    """The `--index` of an entry. Raises UsageError."""
    try:
        return parse_index(text)
    except ValueError:
        hint = "numbers from 0: --index 3,17"
        raise UsageError(f"--index {text} is not understood", hint) from None


def gradcheck(
    run: Annotated[
        str | None,
        Parameter(
            help="the run (default: the live one, if there is only one) and the name of a "
            "parameter, or a part of it",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *,
    index: Annotated[
        tuple[str, ...],
        Parameter(
            help="the entry to check, such as 3,17; may be given several times (default: some of "
            "the largest gradients, and evenly spaced ones)",
            metavar="I,J",
            show_default=False,
            negative=(),
        ),
    ] = (),
    entries: Annotated[
        int,
        Parameter(
            help="number of entries if none is given",
            metavar="N",
            validator=validators.Number(gte=1, lte=MAX_CHECKED),
        ),
    ] = 4,
    memory: Annotated[
        str,
        Parameter(
            help="memory limit of the float64 copy of the parameters; above it they are checked "
            "in their own type",
            metavar="SIZE",
        ),
    ] = "1G",
    json: Annotated[bool, flag("print one JSON object")] = False,
    rank: Rank = 0,
    runs_dir: RunsDir = None,
) -> int:
    """check a gradient of a live run against numerical ones"""
    places = tuple(map(parse_index_option, index))
    limit = max(1, parse_size(memory))
    with cli_errors():
        found = require_single_run(run, runs_dir)
        if name is None:
            raise UsageError("name a parameter", "tui-trainer inspect RUN lists them")
        with RunClient.connect(found, "tui-trainer gradcheck", rank=rank) as client:
            listed = client.inspect(ListTensors())
            if listed.state == "failed":
                raise RunError(listed.message, listed.hint)
            tensors = result_of(listed, TensorList).tensors
            chosen = find_tensor(tensors, name, "parameter").ref.name
            answer = ask_for_rerun(client, CheckGradient(chosen, places, entries, limit))
    check = result_of(answer, GradientCheck)
    if json:
        known = {"run": found.name, "rank": answer.rank, "step": answer.step, "phase": answer.phase}
        document = {**known, "took_ms": answer.took_ms, **as_data(check)}
        print(msgspec.json.encode(document).decode(), flush=True)
    else:
        print("\n".join(_text(answer, check, sweeps=bool(places))), flush=True)
    return 0


def _text(answer: Inspected, check: GradientCheck, sweeps: bool) -> list[str]:
    kind = f"{check.dtype}, in a copy of {bytes_(check.copied_bytes, 0)}"
    lines = [
        f"{check.name} · {answer.moment}",
        f"loss {number(check.loss, 0, 8)} in {kind} · {milliseconds(answer.took_ms, 0)}",
        *(f"note: {note}" for note in check.notes),
        "",
    ]
    own = check.step_gradient
    right = ("weight", "autograd", "numerical", "h", "relative error", "in .grad")
    table = new_table(("entry", *(right if own else right[:-1])), right=right)
    for number_, entry in enumerate(check.entries):
        best = entry.steps[entry.best]
        cells = [
            f"{entry.value:.6g}",
            f"{entry.autograd:.8g}",
            f"{best.central:.8g}",
            f"{best.h:.0e}",
            f"{best.central_error:.1e}",
            *([f"{own[number_]:.6g}"] if own else []),
        ]
        table.add_row(Text(place_text(entry)), *cells)
    lines += [line.plain for line in table_lines(table)]
    for entry in check.entries if sweeps else check.entries[:1]:
        lines += ["", *_sweep(entry)]
    return lines


def place_text(entry: CheckedEntry) -> str:
    """`[3, 17]`"""
    return f"[{', '.join(map(str, entry.index))}]"


def _sweep(entry: CheckedEntry) -> list[str]:
    right = ("h", "(L(w+h) − L(w)) / h", "error", "(L(w+h) − L(w−h)) / 2h", "error ")
    table = new_table((*right, ""), right=right)
    for index, step in enumerate(entry.steps):
        table.add_row(
            f"{step.h:.0e}",
            f"{step.forward:.8g}",
            f"{step.forward_error:.1e}",
            f"{step.central:.8g}",
            f"{step.central_error:.1e}",
            "← best" if index == entry.best else "",
        )
    return [f"{place_text(entry)}: autograd {entry.autograd:.8g}", *_plain(table_lines(table))]


def _plain(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]
