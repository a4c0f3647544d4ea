"""Summarizes one run for `tui-trainer show`, from the live run or from its recording, and writes
the summary as a dozen lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.text import Text

from tui_trainer.cli.commands.ls import STYLES, RunOverview, overview_of
from tui_trainer.cli.table import GAP, columns, new_table, table_lines
from tui_trainer.cli.text_chart import TextCurve, text_chart
from tui_trainer.client.connection import RunClient
from tui_trainer.client.replay import ReplaySession
from tui_trainer.history import History
from tui_trainer.history.columns import attention_tables, logged_series
from tui_trainer.history.ranks import RankSummary, summarize_ranks
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import Phase, schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import Event, Finding, Level, Notice, newest_findings
from tui_trainer.protocol.formatting import (
    MISSING,
    counted,
    event_text,
    milliseconds,
    nonfinite,
    number,
    percent,
    rough_duration,
    step_of,
)
from tui_trainer.protocol.messages import END_STATES, EntryState, Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import truncate_middle
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.store.schema import STORE_FILE, StoreError

CURVE_POINTS = 60
EVENTS_SHOWN = 8
ATTENTION_SHOWN = ("cos_qk", "cos_qv", "cos_kv", "drift_q", "drift_k", "drift_v")


@dataclass(frozen=True)
class SummaryCurve:
    """A series over the whole run, in at most CURVE_POINTS buckets of steps. Buckets in which
    nothing was measured are left out."""

    steps: tuple[int, ...] = ()
    """The first step of each bucket."""
    low: tuple[float | None, ...] = ()
    """Lowest value of each bucket; None where no measured value is finite."""
    high: tuple[float | None, ...] = ()
    last: float | None = None


@dataclass(frozen=True)
class LoggedValue:
    """A value of `tui_trainer.log`."""

    step: int
    value: float | None
    """None for a value that is not finite, or beyond float32."""
    text: str | None = None
    """If `value` is None: `nan`, `inf`, `-inf` or the reason why there is no value."""


@dataclass(frozen=True)
class LayerSummary:
    """The newest statistics of an attention layer."""

    layer: str
    values: dict[str, float | None]
    """Values by the names of ATTENTION_SHOWN."""


@dataclass(frozen=True)
class OptimizerSummary:
    """The last step of one optimizer."""

    name: str
    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm_preclip: float | None
    notes: dict[str, str]
    """Name of a value that is None to `nan`, `inf`, `-inf` or the reason why there is none."""


@dataclass(frozen=True)
class RunSummary:
    """The present state of a run. Numbers that are not finite are None."""

    run: RunOverview
    loss_curve: SummaryCurve = SummaryCurve()
    """Losses at the steps of the first optimizer, as in `grad_norm_curve`."""
    grad_norm_curve: SummaryCurve = SummaryCurve()
    grad_norm_preclip: float | None = None
    """Norm at the last step of any optimizer, as are the loss, the learning rate and the times."""
    learning_rate: float | None = None
    optimizers: tuple[OptimizerSummary, ...] = ()
    """The optimizers that have stepped, in the order of their first step."""
    validation: dict[str, float | None] = field(default_factory=dict)
    clipped_share: float | None = None
    phase_ms: dict[str, float | None] = field(default_factory=dict)
    attention: tuple[LayerSummary, ...] = ()
    phase: Phase | Literal[""] = ""
    parameters: int | None = None
    """Number of elements of all trainable parameters."""
    viewers: tuple[str, ...] = ()
    recording: str = ""
    """Problem with recording to disk; "" for none."""
    findings: tuple[Finding, ...] = ()
    """Findings of the rules, worst first, effects after their cause."""
    events: tuple[Event, ...] = ()
    """The newest events and changes of settings, oldest first."""
    ranks: tuple[RankSummary, ...] = ()
    """The processes of a run that trains in several."""
    logged: dict[str, LoggedValue] = field(default_factory=dict)
    """The newest value of each name of `tui_trainer.log`."""


def summarize_run(run: RunEntry) -> RunSummary:
    """The summary of a run: from the run itself while it is live, otherwise, or if it does not
    answer, from its recording."""
    if not run.live:
        return summarize_recording(run)
    try:
        with RunClient.connect(run, "tui-trainer show") as client:
            return summarize_live(run, client)
    except RunError as error:
        summary = summarize_recording(run)
        if summary.run.note:
            return summary
        return replace(summary, run=msgspec.structs.replace(summary.run, note=error.message))


def summarize_recording(run: RunEntry) -> RunSummary:
    """The summary from a run's recording, or from its status file if that cannot be read."""
    overview = overview_of(run)
    try:
        replay = ReplaySession(run.directory)
    except StoreError as error:
        there = (run.directory / STORE_FILE).exists()
        return RunSummary(overview, recording=str(error) if there else "")
    except OSError:
        return RunSummary(overview)
    try:
        snapshot = replay.poll()
        if snapshot.info is None:
            return RunSummary(overview)
        summary = _summary(run, snapshot.history, snapshot.info, snapshot.status, snapshot.events)
    finally:
        replay.close()
    # The registry knows the current state: a run that was killed could not record it.
    recorded = msgspec.structs.replace(
        summary.run,
        state=run.state,
        note=run.note,
        steps_per_second=None,
        items_per_second=None,
        remaining_s=None,
    )
    if overview.step > recorded.step:
        recorded = msgspec.structs.replace(
            recorded, step=overview.step, loss=overview.loss, loss_text=overview.loss_text
        )
    recording = "; ".join(text for text in (summary.recording, snapshot.link.message) if text)
    return replace(summary, run=recorded, viewers=(), recording=recording)


def summarize_live(run: RunEntry, client: RunClient) -> RunSummary:
    """The summary of a live run, after a poll for everything new. Raises RunError."""
    while client.poll().more:
        pass
    snapshot = client.snapshot
    assert snapshot.info is not None
    return _summary(run, snapshot.history, snapshot.info, snapshot.status, snapshot.events)


def _summary(
    run: RunEntry, history: History, info: RunInfo, status: Status, events: Sequence[Event]
) -> RunSummary:
    first = history.table(schema.STEP)
    loss = _curve(first, "loss", status.step)
    optimizers = _optimizers(info, history, status.step)
    last = max(optimizers, key=lambda each: each.step, default=None)
    return RunSummary(
        run=_overview(run, info, status, _loss_at(history, status.step)),
        loss_curve=replace(loss, last=finite(loss.last)),
        grad_norm_curve=_curve(first, "grad_norm_preclip", status.step),
        grad_norm_preclip=last.grad_norm_preclip if last is not None else None,
        learning_rate=last.learning_rate if last is not None else None,
        optimizers=optimizers,
        validation={n: each.value for n, each in _logged(history, schema.VALIDATION).items()},
        clipped_share=status.clipped_share,
        phase_ms=_latest(_last_of(history, schema.PHASE_MS, status.step), status.step),
        attention=_attention(info, history, status.step),
        phase=status.phase,
        parameters=sum(p.numel for p in info.parameters if p.trainable) or None,
        viewers=status.viewers,
        recording=status.recording,
        findings=tuple(newest_findings(events)),
        events=_shown_events(events, EVENTS_SHOWN),
        ranks=tuple(summarize_ranks(info, status, history)),
        logged=_logged(history, schema.LOGGED),
    )


def _overview(run: RunEntry, info: RunInfo, status: Status, loss: float | None) -> RunOverview:
    """The overview of a run, with values that the run itself reports in place of those of its
    status file, which may be older."""
    found = overview_of(run)
    state: EntryState = found.state
    if status.state == "paused":
        state = "paused"
    elif status.state in END_STATES:
        state = status.state
    return msgspec.structs.replace(
        found,
        state=state,
        step=status.step,
        total_steps=info.total_steps,
        loss=finite(loss),
        loss_text=nonfinite_text(loss),
        steps_per_second=status.steps_per_second,
        items_per_second=status.items_per_second,
        item_unit=info.item_unit,
        title=info.title or info.task,
        elapsed_s=status.elapsed_s,
        remaining_s=status.remaining_s,
        device=info.device.name if info.device else found.device,
        note=status.reason or status.waiting_for,
    )


def _last_of(history: History, name: str, step: int) -> SeriesReader | None:
    """The table called `name`, one of which each optimizer has, with the newest row up to `step`;
    None if no table has such a row."""
    rows = [
        (found[0], n)
        for n, t in history.tables.items()
        if t.table.name == name and (found := t.row_at(step)) is not None
    ]
    return history.tables[max(rows)[1]] if rows else None


def _loss_at(history: History, step: int) -> float | None:
    """The loss of the newest step up to `step`."""
    table = _last_of(history, schema.STEP, step)
    return None if table is None else table.value_at("loss", step)


def _optimizers(info: RunInfo, history: History, step: int) -> tuple[OptimizerSummary, ...]:
    found: list[OptimizerSummary] = []
    for table in history.tables_named(schema.STEP):
        row = table.row_at(step)
        if row is None:
            continue
        values = {c.name: float(v) for c, v in zip(table.table.columns, row[1], strict=True)}
        shown = {n: values.get(n, math.nan) for n in ("loss", "learning_rate", "grad_norm_preclip")}
        found.append(
            OptimizerSummary(
                name=table.table.optimizer or next(iter(info.optimizers), ""),
                step=row[0],
                loss=finite(shown["loss"]),
                learning_rate=finite(shown["learning_rate"]),
                grad_norm_preclip=finite(shown["grad_norm_preclip"]),
                notes={n: _note(value) for n, value in shown.items() if not math.isfinite(value)},
            )
        )
    return tuple(found)


def _note(value: float) -> str:
    why = why_absent(value)
    return why.reason if why is not None else nonfinite(value)


def _logged(history: History, table: str) -> dict[str, LoggedValue]:
    found: dict[str, LoggedValue] = {}
    for each in logged_series(history, table):
        if (newest := each.newest()) is not None:
            step, value = newest
            text = None if math.isfinite(value) else _note(value)
            found[each.name] = LoggedValue(step, finite(value), text)
    return found


def finite(value: float | None) -> float | None:
    """The value; None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def nonfinite_text(value: float | None) -> str | None:
    """`nan`, `inf` or `-inf`; None for a value that is finite, missing or absent."""
    if value is None or math.isfinite(value) or why_absent(value) is not None:
        return None
    return nonfinite(value)


def _latest(table: SeriesReader | None, step: int) -> dict[str, float | None]:
    """The row of `step`, which is not the newest where the training was rewound."""
    row = table.at(step) if table is not None else None
    if table is None or row is None:
        return {}
    names = [column.name for column in table.table.columns]
    return {n: finite(float(v)) for n, v in zip(names, row, strict=True)}


def _curve(table: SeriesReader | None, name: str, step: int) -> SummaryCurve:
    column = table.column(name) if table is not None else None
    if table is None or column is None or table.first_step is None or table.last_step is None:
        return SummaryCurve()
    buckets = max(1, min(CURVE_POINTS, table.rows))
    window = table.window([column], table.first_step, table.last_step + 1, buckets)
    kept = np.flatnonzero(np.isfinite(window.low[:, 0]) | window.nonfinite[:, 0])
    last = table.value_at(name, step)
    if last is not None and why_absent(last) is not None and table.last_step <= step:
        last = table.newest_measured(name)
    return SummaryCurve(
        tuple(int(window.edges[i]) for i in kept),
        tuple(finite(float(window.low[i, 0])) for i in kept),
        tuple(finite(float(window.high[i, 0])) for i in kept),
        last,
    )


def _attention(info: RunInfo, history: History, step: int) -> tuple[LayerSummary, ...]:
    newest: dict[str, float | None] = {}
    for table in attention_tables(history, schema.ATTENTION):
        newest |= _latest(table, step)
    if not newest:
        return ()
    return tuple(
        LayerSummary(
            each.layer,
            {name: newest.get(f"{each.layer}.{name}") for name in ATTENTION_SHOWN},
        )
        for each in info.attention
    )


def _shown_events(events: Sequence[Event], count: int) -> tuple[Event, ...]:
    """The newest `count` events, and as many changes of settings even where they are older.
    Notices about cadences are left to the log."""
    events = [each for each in events if not (isinstance(each, Notice) and each.kind == "cadence")]
    edits = [each for each in events if isinstance(each, Notice) and each.kind == "edit"]
    newest = events[-count:]
    older = [each for each in edits[-count:] if each not in newest]
    return (*older, *newest)


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
    indent = sum(least) + 2 * GAP
    lines += [part for line in _value_lines(values[1:], least)
              for part in hanging(line, indent, console)]  # fmt: skip
    lines += _attention_lines(summary.attention)
    lines += [_rank_line(rank) for rank in summary.ranks]
    if summary.findings:
        for line in finding_lines(summary.findings):
            lines += hanging(line, 8, console)
    elif run.step:
        lines.append(Text("no findings", "dim"))
    shown = [event for event in summary.events if not isinstance(event, Finding)]
    for event in _shown_events(shown, NEWEST_EVENTS):
        lines += hanging(_event_line(event), len(f"step {event.step:,}  "), console)
    lines.append(Text(run.directory, "dim"))
    return Group(*lines)


def hanging(line: Text, indent: int, console: Console) -> list[Text]:
    """`line` in the width of `console`, its further rows indented by `indent` cells."""
    width = console.width - indent
    if cell_len(line.plain) <= console.width or width < 20:
        return [line]
    first, rest = line.divide([indent])
    rows = list(rest.wrap(console, width))
    for row in rows:
        row.rstrip()
    return [first + rows[0], *(Text(" " * indent) + row for row in rows[1:])]


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
    """Name and loss of an optimizer, and the other values of its last step."""
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
