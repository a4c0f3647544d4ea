"""Draws a `RunSummary` as a dozen lines of text, and findings as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.text import Text

from tui_trainer.cli.commands.ls import STYLES
from tui_trainer.cli.run_summary import LayerSummary, OptimizerSummary, RunSummary, SummaryCurve
from tui_trainer.cli.table import columns, new_table, table_lines
from tui_trainer.cli.text_chart import TextCurve, text_chart
from tui_trainer.history.ranks import RankSummary
from tui_trainer.protocol.events import Event, Finding, Level, Notice
from tui_trainer.protocol.formatting import (
    MISSING,
    counted,
    event_text,
    milliseconds,
    number,
    percent,
    rough_duration,
    step_of,
)
from tui_trainer.protocol.text import truncate_middle

BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-~=*#@"
LAYERS_SHOWN = 12
LOGGED_SHOWN = 12
FINDINGS_SHOWN = 6
NEWEST_EVENTS = 4
CHART_WIDTH, CHART_HEIGHT = 78, 10
LEVEL_STYLES: dict[Level, str] = {"error": "red", "warning": "yellow"}


def picture(summary: RunSummary, console: Console) -> RenderableType:
    """The run on a dozen lines."""
    run = summary.run
    lines = [_heading(summary), Text(_progress(summary))]
    if run.parent:
        step = "" if run.branch_step is None else f"@{run.branch_step}"
        lines.append(Text(f"continues {Path(run.parent).name}{step}"))
    if run.note:
        lines.append(Text(" ".join(run.note.split()), STYLES.get(run.state, "")))
    if summary.recording:
        lines.append(Text(summary.recording, "red"))
    bars = BARS if (console.encoding or "").lower().startswith("utf") else PLAIN_BARS
    values = _values(summary, bars)
    # The chart of the loss is under its line; the lines below it keep the same columns.
    least = [max(cell_len(row[i]) for row in values) for i in range(2)]
    lines += _value_lines(values[:1], least)
    marker = "braille" if bars is BARS else "*"
    curve = summary.loss_curve
    chart = TextCurve(curve.steps, curve.low, curve.high, marker)
    lines += map(Text, text_chart([chart], min(CHART_WIDTH, console.width), CHART_HEIGHT))
    lines += _value_lines(values[1:], least)
    lines += _attention_lines(summary.attention)
    lines += [_rank_line(rank) for rank in summary.ranks]
    if summary.findings:
        lines += finding_lines(summary.findings)
    elif run.step:
        lines.append(Text("no findings", "dim"))
    shown = [event for event in summary.events if not isinstance(event, Finding)]
    lines += [_event_line(event) for event in shown[-NEWEST_EVENTS:]]
    lines.append(Text(run.directory, "dim"))
    return Group(*lines)


def _rank_line(rank: RankSummary) -> Text:
    """`rank 1  step 40  loss 0.4406  12.3 ms/step  slow in data: …`"""
    parts = [rank.name]
    if rank.step is not None:
        parts.append(f"step {rank.step:,}")
        parts.append(f"loss {number(rank.values.get('loss'), 0)}")
        parts.append(f"{milliseconds(rank.values.get('step_ms'), 0)}/step")
    text = Text("  ".join(parts))
    if rank.remarks:
        text.append("  " + "; ".join(rank.remarks), "yellow")
    return text


def _heading(summary: RunSummary) -> Text:
    run = summary.run
    what = f" · {run.title or run.task}" if run.title or run.task else ""
    state = run.state + (
        f" after {summary.phase}" if run.state == "paused" and summary.phase else ""
    )
    device = f" · {run.device}" if run.device else ""
    return Text.assemble((run.name, "bold"), what, device, "  ", (state, STYLES.get(run.state, "")))


def _progress(summary: RunSummary) -> str:
    run = summary.run
    parts = [f"step {step_of(run.step, run.total_steps)}"]
    if run.total_steps:
        parts[0] += f" ({percent(run.step / run.total_steps, 0, 0)})"
    if run.steps_per_second:
        parts.append(f"{number(run.steps_per_second, 0, 3)} steps/s")
    if run.items_per_second:
        parts.append(f"{run.items_per_second:,.0f} {run.item_unit}/s")
    if run.elapsed_s:
        parts.append(f"{rough_duration(run.elapsed_s)} so far")
    if run.remaining_s:
        parts.append(f"{rough_duration(run.remaining_s)} left")
    if summary.parameters:
        parts.append(f"{summary.parameters:,} parameters")
    return " · ".join(parts)


def _values(summary: RunSummary, bars: str) -> list[tuple[str, str, str]]:
    """Name, value and remark of each quantity, the loss first."""
    run = summary.run
    loss = number(run.loss, 0) if run.loss is not None else (run.loss_text or "–")
    several = len(summary.optimizers) > 1
    # The chart and the curve of the norm are the first optimizer's.
    of = f" of {truncate_middle(summary.optimizers[0].name, 16)}" if several else ""
    rows = [("loss", loss, _extremes(summary.loss_curve))]
    if several:
        newest = max(summary.optimizers, key=lambda each: each.step)
        rows = [("loss", loss, f"{newest.name}'s at step {newest.step:,}; chart{of}")]
        rows += [_optimizer_row(each) for each in summary.optimizers]
    if summary.grad_norm_curve.steps:
        curve = summary.grad_norm_curve
        remark = "  ".join(part for part in (_sparkline(curve, bars), _extremes(curve)) if part)
        rows.append((f"grad norm{of}", number(curve.last, 0), remark))
    if summary.clipped_share is not None:
        rows.append(("clipped", percent(summary.clipped_share, 0, 0), "of the last steps"))
    if summary.learning_rate is not None and not several:
        rows.append(("learning rate", number(summary.learning_rate, 0), ""))
    for name, value in summary.validation.items():
        rows.append((f"validation {name}", number(value, 0), ""))
    for name, logged in list(summary.logged.items())[:LOGGED_SHOWN]:
        shown = number(logged.value, 0) if logged.value is not None else logged.text or "–"
        rows.append((truncate_middle(name, 24), shown, f"at step {logged.step:,}"))
    if len(summary.logged) > LOGGED_SHOWN:
        rows.append(("", "", f"and {len(summary.logged) - LOGGED_SHOWN} more logged values"))
    phases = {name: ms for name, ms in summary.phase_ms.items() if ms is not None}
    if phases:
        parts = (f"{name} {number(ms, 0, 3)}" for name, ms in phases.items())
        rows.append(("phases (ms)", "", " · ".join(parts)))
    return rows


def _optimizer_row(optimizer: OptimizerSummary) -> tuple[str, str, str]:
    """Its name, loss, and the other values of its last step."""
    values = (("grad norm", optimizer.grad_norm_preclip), ("lr", optimizer.learning_rate))
    parts = [f"{name} {number(value, 0)}" for name, value in values if value is not None]
    loss = number(optimizer.loss, 0) if optimizer.loss is not None else MISSING
    where = f"at step {optimizer.step:,}"
    return truncate_middle(optimizer.name, 24), loss, "  ".join([*parts, where])


def _value_lines(rows: Sequence[tuple[str, str, str]], least: Sequence[int]) -> list[Text]:
    table = columns("left", "right", "left", least=least)
    for name, value, remark in rows:
        table.add_row(Text(name, "dim"), Text(value), Text(remark))
    return table_lines(table)


def _sparkline(curve: SummaryCurve, bars: str) -> str:
    """The highest value of each bucket, so that no spike is lost; ! where none is finite."""
    known = [value for value in curve.high if value is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    top = len(bars) - 1
    return "".join(
        "!" if value is None else bars[round((value - low) / span * top)] for value in curve.high
    )


def _extremes(curve: SummaryCurve) -> str:
    lows = [value for value in curve.low if value is not None]
    highs = [value for value in curve.high if value is not None]
    return f"{number(min(lows), 0)} … {number(max(highs), 0)}" if lows and highs else ""


def _attention_lines(layers: Sequence[LayerSummary]) -> Sequence[Text]:
    if not layers:
        return []
    shown = layers[:LAYERS_SHOWN]
    names = list(shown[0].values)
    table = new_table(["attention", *names], right=names, style="dim")
    for layer in shown:
        table.add_row(Text(layer.layer), *(Text(number(layer.values[n], 0, 3)) for n in names))
    lines = table_lines(table)
    if len(layers) > len(shown):
        lines.append(Text(f"and {len(layers) - len(shown)} more layers", "dim"))
    return lines


def finding_lines(findings: Sequence[Finding], details: bool = False) -> list[Text]:
    """The findings, two lines each; with `details` also what to do and what they caused."""
    causes = [each for each in findings if each.cause is None]
    lines: list[Text] = []
    for found in causes if details else causes[:FINDINGS_SHOWN]:
        lines.append(
            Text.assemble(
                (f"{found.level:<8}", LEVEL_STYLES.get(found.level, "")),
                (found.title, "bold"),
                (f"  since step {found.onset:,}  {found.rule}", "dim"),
            )
        )
        lines.append(Text(f"        {found.text}"))
        if details:
            lines.append(Text.assemble(("        next: ", "dim"), found.advice))
        effects = [each for each in findings if each.cause == found.number]
        if effects:
            listed = ", ".join(f"{each.title} (step {each.onset:,})" for each in effects)
            lines.append(Text.assemble(("        it explains: ", "dim"), listed))
    if not details and len(causes) > FINDINGS_SHOWN:
        lines.append(Text(f"and {counted(len(causes) - FINDINGS_SHOWN, 'more finding')}", "dim"))
    return lines


def _event_line(event: Event) -> Text:
    level = event.level if isinstance(event, Notice | Finding) else "info"
    text = " ".join(event_text(event).split())
    return Text.assemble((f"step {event.step:,}  ", "dim"), (text, LEVEL_STYLES.get(level, "")))
