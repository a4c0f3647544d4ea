"""`tui-trainer inspect RUN NAME`: statistics, histogram and heat map of a tensor of a live run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from cyclopts import Parameter, validators
from rich.text import Text

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
from tui_trainer.cli.errors import CommandError, UsageError, notify
from tui_trainer.cli.table import Alignment, columns, new_table, table_lines
from tui_trainer.client.answers.tensors import (
    ENDINGS,
    KIND_NAMES,
    cells_of,
    exact,
    fetch,
    find_tensor,
    settings_text,
    write_tensor,
)
from tui_trainer.client.connection import RunClient
from tui_trainer.config.atomic_file import replacing
from tui_trainer.protocol import Phase
from tui_trainer.protocol.formatting import bytes_, count, counted, number, percent, shape_text
from tui_trainer.protocol.heat_map import MAX_CELLS, HeatMap, HeatMapWindow, Reduction
from tui_trainer.protocol.inspection import (
    MAX_ENTRIES,
    NOT_OBSERVED,
    BeforePhase,
    DescribeUse,
    ExplainUpdate,
    Histogram,
    Inspected,
    ListTensors,
    ParameterUse,
    Summarize,
    TensorEntry,
    TensorInfo,
    TensorKind,
    TensorList,
    TensorStatistics,
    TensorSummary,
    UpdateExplanation,
)
from tui_trainer.runs.liveness import RunEntry

if TYPE_CHECKING:
    from tui_trainer.ui.terminal_images import PixelSupport

SHADES = " ░▒▓█"
NOT_FINITE = "!"
BARS = " ▁▂▃▄▅▆▇█"
ROWS, COLUMNS = 16, 64
PICTURE_ROWS = 24
"""Rows of the terminal for a picture of real pixels."""


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
                print(_as_json(found, answer) if json else _use_text(use, answer), flush=True)
                return 0
            listed = ask_for_rerun(client, ListTensors(of_modules))
            tensors = result_of(listed, TensorList)
            if name is None:
                print(_list_as_json(found, listed) if json else _list_as_text(tensors), flush=True)
                return 0
            tensor = find_tensor(tensors.tensors, name, kind, key)
            if save is not None:
                _save(client, tensor, save)
                return 0
            if update:
                request = ExplainUpdate(tensor.ref.name, place)
                answer = inspect_running(client, request, _not_observed)
                explained = result_of(answer, UpdateExplanation)
                print(_as_json(found, answer) if json else _update_text(answer, explained))
                return 0
            answer = ask_for_rerun(client, Summarize(tensor.ref, window=shown, entries=entries))
    summary = result_of(answer, TensorSummary)
    print(_as_json(found, answer) if json else _as_text(answer, summary, screen), flush=True)
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
    print(f"wrote {tensor.ref.text} ({_facts(info)}) to {path}", flush=True)


# ---------------------------------------------------------------- text


def _list_as_text(tensors: TensorList) -> str:
    table = new_table(("tensor", "kind", "shape", "type", "bytes", "device"), right=("bytes",))
    for each in tensors.tensors:
        kind = each.ref.key if each.ref.kind == "state" else each.ref.kind
        table.add_row(
            Text(each.ref.name),
            Text(kind),
            shape_text(each.shape),
            each.dtype,
            bytes_(each.bytes, 0),
            Text(", ".join(filter(None, (each.device, each.note, *(f"= {n}" for n in each.also))))),
        )
    lines = [line.plain for line in table_lines(table)]
    if tensors.left_out:
        lines.append(f"and {tensors.left_out:,} more")
    return "\n".join(lines) if tensors.tensors else "no tensors yet: no model has been called"


def _facts(tensor: TensorInfo) -> str:
    """`64×64 float32, 16.0 KB on cpu`"""
    kind = f"{shape_text(tensor.shape)} {tensor.dtype}"
    note = f", {tensor.note}" if tensor.note else ""
    return f"{kind}, {bytes_(tensor.bytes, 0)} on {tensor.device}{note}"


def _as_text(answer: Inspected, summary: TensorSummary, screen: PixelSupport | None = None) -> str:
    tensor, statistics, heat = summary.tensor, summary.statistics, summary.heat
    lines = [tensor.ref.text, f"{_facts(tensor)} · {answer.moment}"]
    if statistics is not None and statistics.count:
        if summary.before is not None:
            lines += ["", *_before_lines(summary.before, statistics, answer.phase)]
        lines += ["", *_statistics_lines(statistics)]
    elif statistics is not None:
        lines += ["", "it has no elements"]
    if heat is not None:
        lines += ["", *(heat_lines(heat) if screen is None else picture_lines(heat, screen))]
    return "\n".join(lines)


def _before_lines(
    before: BeforePhase, now: TensorStatistics, phase: Phase | Literal[""]
) -> list[str]:
    """What the last phase has changed."""
    title = f"{phase}, the last phase"
    old = before.moments
    if old is None:
        return [f"{title}: it was not there before"]
    pairs = [
        (name, getattr(old, field), getattr(now, field))
        for name, field in (
            *(("mean", "mean"), ("std", "std"), ("norm", "norm")),
            *(("min", "minimum"), ("max", "maximum"), ("zeros", "zeros")),
            ("not finite", "not_finite"),
        )
    ]
    changed = [pair for pair in pairs if pair[1] != pair[2] and pair[1] == pair[1]]
    if not changed:
        return [f"{title}: it has not changed the tensor"]
    table = columns("left", "right", "left", "right", "right")
    for name, earlier, later in changed:
        table.add_row(
            name, number(earlier, 0, 6), "→", number(later, 0, 6), f"{later - earlier:+.3g}"
        )
    return [f"{title}:", *(f"  {line.plain}" for line in table_lines(table))]


def _statistics_lines(statistics: TensorStatistics) -> list[str]:
    table = columns("left", "right", "left", "right", "left", "right")
    value = {name: number(getattr(statistics, name), 0) for name in ("mean", "std", "norm")}
    table.add_row("mean", value["mean"], "std", value["std"], "norm", value["norm"])
    low, high = number(statistics.minimum, 0), number(statistics.maximum, 0)
    zeros = percent(statistics.zeros / statistics.count, 0)
    table.add_row("min", low, "max", high, "zeros", zeros)
    lines = [line.plain for line in table_lines(table)]
    if statistics.not_finite:
        lines.append(
            f"not finite: {statistics.nan:,} nan, {statistics.positive_inf:,} inf, "
            f"{statistics.negative_inf:,} -inf of {statistics.count:,}"
        )
        lines.append(f"  at {_places(statistics.nonfinite)}")
    if statistics.quantiles:
        lines += ["", *_quantile_lines(statistics)]
        lines += ["", *_histogram_lines("histogram", statistics.histogram, log=False)]
        if statistics.log_histogram.counts:
            lines += _histogram_lines("|x|, log10", statistics.log_histogram, log=True)
        if statistics.sampled < statistics.count:
            share = f"{statistics.sampled:,} of {statistics.count:,} entries, evenly spaced"
            lines.append(f"quantiles and histograms of {share}")
    if statistics.largest:
        lines += ["", f"largest   {_places(statistics.largest)}"]
        lines.append(f"smallest  {_places(statistics.smallest)}")
    return lines


def _places(entries: tuple[TensorEntry, ...]) -> str:
    return ", ".join(f"{number(e.value, 0)} [{', '.join(map(str, e.index))}]" for e in entries)


def _quantile_lines(statistics: TensorStatistics) -> list[str]:
    inner = statistics.quantiles[1:-1]
    right: list[Alignment] = ["right"] * len(inner)
    table = columns("left", *right)
    table.add_row("quantile", *(percent(q, 0) for q, _ in inner))
    table.add_row("", *(number(value, 0) for _, value in inner))
    return [line.plain for line in table_lines(table)]


def _histogram_lines(title: str, histogram: Histogram, log: bool) -> list[str]:
    most = max(histogram.counts, default=0)
    bars = "".join(
        BARS[-(-count * (len(BARS) - 1) // most)] if most else " " for count in histogram.counts
    )
    low, high = (
        (f"1e{histogram.low:.1f}", f"1e{histogram.high:.1f}")
        if log
        else (number(histogram.low, 0), number(histogram.high, 0))
    )
    return [f"{title:<10}  {low:>9} {bars} {high}"]


def heat_lines(heat: HeatMap) -> list[str]:
    cells = cells_of(heat)
    finite = np.isfinite(cells)
    sizes = np.abs(np.where(finite, cells, 0.0))
    top = float(sizes.max(initial=0.0))
    levels = np.ceil(sizes / (top or 1.0) * (len(SHADES) - 1)).astype(int)
    marks = np.where(finite, np.array(list(SHADES))[levels], NOT_FINITE)
    if heat.lines:  # the rest of the last line
        filled = -(-(heat.column_to - heat.column_from) // heat.block_columns)
        marks.reshape(-1)[filled:] = " "
    lines = ["  " + "".join(row).rstrip() for row in marks]
    return [f"{heat_title(heat)}, darkest: {number(top, 0)}", *lines]


def heat_title(heat: HeatMap) -> str:
    """What a heat map shows."""
    block = f"{heat.block_rows}×{heat.block_columns}"
    text = {"mean_abs": "mean |x|", "mean": "|mean|", "max_abs": "max |x|"}[heat.reduction]
    part = (
        f"entries {heat.column_from:,} to {heat.column_to:,} in reading order"
        if heat.lines
        else f"rows {heat.row_from:,} to {heat.row_to:,}, "
        f"columns {heat.column_from:,} to {heat.column_to:,}"
    )
    return f"{text} of blocks {block}, {part}"


# ---------------------------------------------------------------- real pixels


def ask_for_pixels() -> PixelSupport | None:
    """None, and the reason on stderr, where the terminal cannot show pictures."""
    from tui_trainer.ui.terminal_images import HINT, ask_terminal

    if not sys.stdout.isatty():
        notify("no pixels: the output is no terminal", "--save writes the tensor to a file")
        return None
    screen = ask_terminal()
    if screen.kitty or screen.sixel:
        return screen
    notify(f"no pixels: {screen.missing}", HINT)
    return None


def window_of_pixels(window: HeatMapWindow, screen: PixelSupport) -> HeatMapWindow:
    """The same window with a cell for each pixel of the picture."""
    rows, columns = PICTURE_ROWS * screen.cell_height, COLUMNS * screen.cell_width
    less = max(1.0, (rows * columns / MAX_CELLS) ** 0.5)
    return msgspec.structs.replace(window, rows=int(rows / less), columns=int(columns / less))


def picture_lines(heat: HeatMap, screen: PixelSupport) -> list[str]:
    """The picture as an escape sequence."""
    from tui_trainer.ui.panels.tensor import background_of, color_range, colored, filled_cells
    from tui_trainer.ui.terminal_images import enlarged, kitty, padded, sixel
    from tui_trainer.ui.theme import DARK, palette

    colors = palette(DARK.to_color_system().generate())
    cells = cells_of(heat)
    low, high = color_range(cells, heat.reduction)
    image = colored(colors, cells, filled_cells(heat) > 0, low, high)
    cell = screen.cell_width, screen.cell_height
    image = enlarged(image, COLUMNS * cell[0], PICTURE_ROWS * cell[1])
    columns, rows = -(-image.shape[1] // cell[0]), -(-image.shape[0] // cell[1])
    image = padded(image, columns, rows, cell, np.array(background_of(colors), np.uint8))
    title = f"{heat_title(heat)}, from {number(low, 0)} (dark) to {number(high, 0)}"
    return [title, kitty(image, columns, rows) if screen.kitty else sixel(image)]


# ---------------------------------------------------------------- the update of a weight


def _update_text(answer: Inspected, found: UpdateExplanation) -> str:
    single = found.index is not None
    place = f"[{', '.join(map(str, found.index))}]" if found.index is not None else ""
    lines = [
        f"{found.tensor.ref.name}{place} · {answer.moment}",
        f"{found.optimizer}, group {found.group}: {settings_text(found.settings, found.count)}",
        "",
    ]
    value = "value" if single else "2-norm"
    table = new_table(("", "formula", value, *(["with numbers"] if single else [])), right=(value,))
    for term in found.terms:
        cells = [term.name, term.formula, exact(term.value), *([term.numbers] if single else [])]
        table.add_row(*map(Text, cells))
    lines += [line.plain for line in table_lines(table)]
    lines += ["", f"before     {exact(found.old)}", f"predicted  {exact(found.predicted)}"]
    if found.actual is not None and found.difference is not None:
        apart = f"{found.difference:.2g}"
        unit = "spacing of numbers there" if single else "norm of the spacing"
        lines.append(f"actual     {exact(found.actual)}")
        lines.append(f"difference {apart} ({unit}: {found.precision:.2g})")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


# ---------------------------------------------------------------- groups

NAMES_SHOWN = 6


def _use_text(use: ParameterUse, answer: Inspected) -> str:
    lines = [answer.moment, ""]
    for group in use.groups:
        size = f"{counted(group.parameters, 'parameter')}, {count(group.elements, 0)} entries"
        lines.append(f"{group.optimizer}, group {group.number}: {size}")
        lines.append(f"  {settings_text(group.settings)}")
        lines.append(f"  {_names(group.names, group.parameters)}")
    if not use.groups:
        lines.append("no optimizer is known yet")
    for title, names in (
        ("frozen (requires_grad is False)", use.frozen),
        ("trainable, in no optimizer", use.without_optimizer),
        ("without a gradient now, while others have one", use.without_gradient),
        ("not used by the loss of this step", use.unused),
    ):
        if names:
            lines += ["", f"{title}: {len(names):,}", f"  {_names(names, len(names))}"]
    if use.shared:
        lines += ["", f"shared under several names: {len(use.shared):,}"]
        lines += [f"  {' = '.join(names)}" for names in use.shared[:NAMES_SHOWN]]
    table = new_table(("", "device", "tensors", "bytes"), right=("tensors", "bytes"))
    for each in use.memory:
        kind = KIND_NAMES[each.kind]
        table.add_row(kind, Text(each.device), f"{each.tensors:,}", bytes_(each.bytes, 0))
    lines += ["", *(line.plain for line in table_lines(table))]
    if use.graph_missing:
        lines.append(f"saved for backward, and not used by the loss: unknown, {use.graph_missing}")
    return "\n".join(lines)


def _names(names: tuple[str, ...], whole: int) -> str:
    more = f", and {whole - NAMES_SHOWN:,} more" if whole > NAMES_SHOWN else ""
    return f"{', '.join(names[:NAMES_SHOWN])}{more}"


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
