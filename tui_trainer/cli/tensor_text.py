"""The answers of `tui-trainer inspect` as text: the list of tensors, the statistics of one tensor,
the update of a weight, and the parameter groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich.text import Text

from tui_trainer.cli.heat_map import heat_lines, picture_lines
from tui_trainer.cli.table import Alignment, columns, new_table, table_lines
from tui_trainer.client.answers.tensors import KIND_NAMES, exact, settings_text
from tui_trainer.protocol import Phase
from tui_trainer.protocol.formatting import bytes_, count, counted, number, percent, shape_text
from tui_trainer.protocol.inspection import (
    BeforePhase,
    Histogram,
    Inspected,
    ParameterUse,
    TensorEntry,
    TensorInfo,
    TensorList,
    TensorStatistics,
    TensorSummary,
    UpdateExplanation,
)

if TYPE_CHECKING:
    from tui_trainer.ui.terminal_images import PixelSupport

BARS = " ▁▂▃▄▅▆▇█"
NAMES_SHOWN = 6


def list_text(tensors: TensorList) -> str:
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


def tensor_facts(tensor: TensorInfo) -> str:
    """`64×64 float32, 16.0 KB on cpu`"""
    kind = f"{shape_text(tensor.shape)} {tensor.dtype}"
    note = f", {tensor.note}" if tensor.note else ""
    return f"{kind}, {bytes_(tensor.bytes, 0)} on {tensor.device}{note}"


def summary_text(
    answer: Inspected, summary: TensorSummary, screen: PixelSupport | None = None
) -> str:
    tensor, statistics, heat = summary.tensor, summary.statistics, summary.heat
    lines = [tensor.ref.text, f"{tensor_facts(tensor)} · {answer.moment}"]
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
    """Statistics that the last phase has changed, with old and new values."""
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


# ---------------------------------------------------------------- the update of a weight


def update_text(answer: Inspected, found: UpdateExplanation) -> str:
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


def groups_text(use: ParameterUse, answer: Inspected) -> str:
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
