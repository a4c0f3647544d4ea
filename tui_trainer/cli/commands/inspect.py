"""`tui-trainer inspect RUN NAME`: statistics, histogram and heat map of a tensor of a live run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter, validators

from tui_trainer.cli.commands.autograd import ask_for_rerun, parse_index_option
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
from tui_trainer.cli.heat_map import COLUMNS, ask_for_pixels, window_of_pixels
from tui_trainer.cli.tensor_text import (
    groups_text,
    list_text,
    summary_text,
    tensor_facts,
    update_text,
)
from tui_trainer.client.answers.tensors import ENDINGS, cells_of, fetch, find_tensor, write_tensor
from tui_trainer.client.connection import RunClient
from tui_trainer.config.atomic_file import replacing
from tui_trainer.protocol.heat_map import HeatMap, HeatMapWindow, Reduction
from tui_trainer.protocol.inspection import (
    MAX_ENTRIES,
    NOT_OBSERVED,
    DescribeUse,
    ExplainUpdate,
    Inspected,
    ListTensors,
    ParameterUse,
    Summarize,
    TensorInfo,
    TensorKind,
    TensorList,
    TensorSummary,
    UpdateExplanation,
)
from tui_trainer.runs.liveness import RunEntry

ROWS = 16
"""Rows of a heat map."""


def inspect(
    run: Annotated[
        str | None,
        Parameter(
            help="the run (default: the live one, if there is only one) and the name of a "
            "parameter or buffer, or a part of it; without a name, the tensors are listed",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *,
    grad: Annotated[bool, flag("the gradient of the parameter, as it is now")] = False,
    state: Annotated[
        str | None,
        Parameter(
            help="a tensor that its optimizer holds, such as exp_avg",
            metavar="KEY",
            show_default=False,
            negative=(),
        ),
    ] = None,
    modules: Annotated[
        bool, flag("list the inputs and outputs of the modules: the forward pass runs again")
    ] = False,
    output: Annotated[
        int | None,
        Parameter(
            help="an output of the module of this name; 0 is the first",
            metavar="N",
            show_default=False,
            negative=(),
            validator=validators.Number(gte=0),
        ),
    ] = None,
    input: Annotated[
        int | None,
        Parameter(
            help="an input of the module of this name; 0 is the first",
            metavar="N",
            show_default=False,
            negative=(),
            validator=validators.Number(gte=0),
        ),
    ] = None,
    groups: Annotated[
        bool,
        flag(
            "the parameter groups of all optimizers with their hyper-parameters, and the memory by "
            "kind"
        ),
    ] = False,
    update: Annotated[
        bool, flag("why the optimizer moves the parameter: its formula with the numbers in it")
    ] = False,
    index: Annotated[
        str | None,
        Parameter(
            help="with --update: of one entry, such as 3,17; without it values are norms",
            metavar="I,J",
            show_default=False,
            negative=(),
        ),
    ] = None,
    window: Annotated[
        str | None,
        Parameter(
            help="the part that the heat map shows, such as 0:128,64:96 (rows, columns)",
            metavar="RANGES",
            show_default=False,
            negative=(),
        ),
    ] = None,
    reduce: Annotated[
        Reduction,
        Parameter(help="how a block of entries becomes one cell of the heat map", negative=()),
    ] = "mean_abs",
    entries: Annotated[
        int,
        Parameter(
            help="how many of the largest and of the smallest entries",
            metavar="N",
            negative=(),
            validator=validators.Number(gte=0, lte=MAX_ENTRIES),
        ),
    ] = 5,
    pixels: Annotated[
        bool, flag("draw the heat map with real pixels where the terminal has them")
    ] = False,
    json: Annotated[bool, flag("print one JSON object")] = False,
    save: Annotated[
        Path | None,
        Parameter(
            help="write the whole tensor to a .npy or .safetensors file",
            metavar="FILE",
            show_default=False,
            negative=(),
        ),
    ] = None,
    overwrite: Annotated[bool, flag("replace an existing file")] = False,
    rank: Rank = 0,
    runs_dir: RunsDir = None,
) -> int:
    """inspect a tensor of a live run, or list its tensors"""
    kind, key = _kind(grad, state, input, output)
    of_modules = modules or kind in ("input", "output")
    place = _index(index, update, kind is not None or save is not None or window is not None)
    if groups and (name is not None or kind or save or window or update):
        raise UsageError(
            "--groups lists the groups of all parameters, not one tensor",
            "tui-trainer inspect RUN --groups",
        )
    if name is None and (kind or save or window or update):
        raise UsageError("name a parameter", "tui-trainer inspect RUN NAME --grad")
    if pixels and json:
        raise UsageError("--pixels and --json cannot be used together")
    shown = _window(window, reduce)
    screen = ask_for_pixels() if pixels else None
    if screen is not None:
        shown = window_of_pixels(shown, screen)
    _check_file(save, overwrite)
    with cli_errors():
        found = require_single_run(run, runs_dir)
        with RunClient.connect(found, "tui-trainer inspect", rank=rank) as client:
            if groups:
                answer = inspect_running(client, DescribeUse(), _waits_for_batch)
                use = result_of(answer, ParameterUse)
                print(_as_json(found, answer) if json else groups_text(use, answer), flush=True)
                return 0
            listed = ask_for_rerun(client, ListTensors(of_modules))
            tensors = result_of(listed, TensorList)
            if name is None:
                print(_list_as_json(found, listed) if json else list_text(tensors), flush=True)
                return 0
            tensor = find_tensor(tensors.tensors, name, kind, key)
            if save is not None:
                _save(client, tensor, save)
                return 0
            if update:
                request = ExplainUpdate(tensor.ref.name, place)
                answer = inspect_running(client, request, _not_observed)
                explained = result_of(answer, UpdateExplanation)
                print(_as_json(found, answer) if json else update_text(answer, explained))
                return 0
            answer = ask_for_rerun(client, Summarize(tensor.ref, window=shown, entries=entries))
    summary = result_of(answer, TensorSummary)
    print(_as_json(found, answer) if json else summary_text(answer, summary, screen), flush=True)
    return 0


def _kind(
    grad: bool, state: str | None, input: int | None, output: int | None
) -> tuple[TensorKind | None, str]:
    if sum((grad, state is not None, input is not None, output is not None)) > 1:
        several = "--grad, --state, --input and --output name different tensors"
        raise UsageError(several, "give one of them")
    for kind, place in (("input", input), ("output", output)):
        if place is not None:
            return kind, str(place) if place else ""  # type: ignore[return-value]
    if grad:
        return "gradient", ""
    return ("state", state) if state is not None else (None, "")


def _index(text: str | None, update: bool, other: bool) -> tuple[int, ...] | None:
    if text is not None and not update:
        raise UsageError("--index belongs to --update", "tui-trainer inspect RUN NAME --update")
    if update and other:
        raise UsageError("--update takes a parameter only", "without --grad, --state, --save")
    if text is None:
        return None
    return parse_index_option(text)


def _window(text: str | None, reduction: Reduction) -> HeatMapWindow:
    if text is None:
        return HeatMapWindow(ROWS, COLUMNS, reduction=reduction)
    ranges = [_range(part) for part in text.split(",")]
    if not 1 <= len(ranges) <= 2 or None in ranges:
        raise UsageError(
            f"--window {text} is not understood",
            "rows and columns: 0:128,64:96, or 0:128, or :,64:96",
        )
    (row_from, row_to), (column_from, column_to) = (*ranges, (0, None))[:2]  # type: ignore[misc]
    return HeatMapWindow(ROWS, COLUMNS, row_from, row_to, column_from, column_to, reduction)


def _range(text: str) -> tuple[int, int | None] | None:
    """`64:96`, `64:` or `:`; None where it is not a range."""
    found = re.fullmatch(r"\s*(\d{0,18})\s*:\s*(\d{0,18})\s*", text)
    if found is None:
        return None
    first, last = int(found[1] or 0), int(found[2]) if found[2] else None
    return None if last is not None and last <= first else (first, last)


def _waits_for_batch(answer: Inspected) -> bool:
    return isinstance(answer.result, ParameterUse) and answer.result.waits_for_batch


def _not_observed(answer: Inspected) -> bool:
    return answer.message == NOT_OBSERVED


# ---------------------------------------------------------------- saving


def _check_file(save: Path | None, overwrite: bool) -> None:
    if save is None:
        return
    if save.suffix not in ENDINGS:
        raise UsageError(
            f"cannot write {save.name}", f"its name must end in {' or '.join(ENDINGS)}"
        )
    if save.exists() and not overwrite:
        raise CommandError(f"{save} already exists", "--overwrite replaces it")


def _save(client: RunClient, tensor: TensorInfo, path: Path) -> None:
    info, data = fetch(client.inspect, tensor.ref)
    try:
        with replacing(path) as partial:
            write_tensor(partial, info, data)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"wrote {tensor.ref.text} ({tensor_facts(info)}) to {path}", flush=True)


# ---------------------------------------------------------------- JSON


def _list_as_json(run: RunEntry, answer: Inspected) -> str:
    tensors = result_of(answer, TensorList)
    return _json(run, answer, {"tensors": [_plain(t) for t in tensors.tensors]})


def _as_json(run: RunEntry, answer: Inspected) -> str:
    return _json(run, answer, _plain(answer.result))


def _json(run: RunEntry, answer: Inspected, more: dict[str, Any]) -> str:
    known = {"run": run.name, "rank": answer.rank, "step": answer.step, "phase": answer.phase}
    return msgspec.json.encode({**known, "took_ms": answer.took_ms, **more}).decode()


def _plain(value: Any) -> Any:
    """A message as dictionaries and lists, without the tag; cells as rows of numbers."""
    if isinstance(value, HeatMap):
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        return {**fields, "cells": cells_of(value).tolist()}
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
