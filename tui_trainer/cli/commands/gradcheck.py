"""`tui-trainer gradcheck RUN NAME`: compares a gradient of autograd with numerical ones."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators
from rich.text import Text

from tui_trainer.cli.commands.autograd import ask_for_rerun, result_of
from tui_trainer.cli.commands.common import Rank, RunsDir, cli_errors, flag, require_single_run
from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.client.answers.autograd_export import as_data
from tui_trainer.client.answers.tensors import find_tensor
from tui_trainer.client.connection import RunClient
from tui_trainer.config.options import parse_size
from tui_trainer.protocol.autograd import MAX_CHECKED, CheckedEntry, CheckGradient, GradientCheck
from tui_trainer.protocol.formatting import bytes_, number
from tui_trainer.protocol.inspection import Inspected, ListTensors, TensorList
from tui_trainer.runs.errors import RunError


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
    places = tuple(_place(text) for text in index)
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


def _place(text: str) -> tuple[int, ...]:
    parts = text.strip("[] ").split(",") if text.strip("[] ") else []
    if not all(re.fullmatch(r"\s*\d{1,18}\s*", part) for part in parts):
        raise UsageError(f"--index {text} is not understood", "numbers from 0: --index 3,17")
    return tuple(int(part) for part in parts)


def _text(answer: Inspected, check: GradientCheck, sweeps: bool) -> list[str]:
    kind = f"{check.dtype}, in a copy of {bytes_(check.copied_bytes, 0)}"
    lines = [
        f"{check.name} · {answer.moment}",
        f"loss {number(check.loss, 0, 8)} in {kind} · {answer.took_ms / 1e3:.1f} s",
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
