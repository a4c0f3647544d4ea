"""`tui-trainer show RUN`: a run on a dozen lines of text, or as one JSON object."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from tui_trainer.cli.commands.common import RunName, RunsDir, choose_run_by_name, cli_errors, flag
from tui_trainer.cli.commands.ls import STYLES, as_object
from tui_trainer.cli.table import columns, new_table, table_lines
from tui_trainer.cli.text_chart import TextCurve, text_chart
from tui_trainer.client.connection import RunClient
from tui_trainer.client.replay import ReplaySession
from tui_trainer.findings.verdict import finding_object, newest_findings
from tui_trainer.history import History
from tui_trainer.history.analysis import attention_tables
from tui_trainer.history.logged import logged_series
from tui_trainer.history.ranks import RankSummary, summarize_ranks
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.formatting import (
    milliseconds,
    nonfinite,
    number,
    percent,
    rough_duration,
    step_of,
)
from tui_trainer.protocol.messages import (
    END_STATES,
    Clip,
    Event,
    Finding,
    NonFinite,
    Notice,
    Skipped,
    Status,
)
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import truncate_middle
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run
from tui_trainer.store.schema import STORE_FILE, StoreError

CURVE_POINTS = 60
EVENTS_SHOWN = 8
ATTENTION_SHOWN = ("cos_qk", "cos_qv", "cos_kv", "drift_q", "drift_k", "drift_v")


class SummaryCurve(msgspec.Struct, frozen=True):
    """A series over the whole run, in at most CURVE_POINTS buckets of steps."""

    steps: tuple[int, ...] = ()
    """The first step of each bucket."""
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    last: float | None = None


class LoggedValue(msgspec.Struct, frozen=True):
    """A value of `tui_trainer.log`."""

    step: int
    value: float | None
    """None where it is not finite, or beyond float32."""
    text: str | None = None
    """Then `nan`, `inf`, `-inf` or the reason."""


class RunSummary(msgspec.Struct, frozen=True):
    """What is known of a run now."""

    run: dict[str, Any]
    """As in `tui-trainer ls --json`."""
    loss_curve: SummaryCurve = SummaryCurve()
    grad_norm_curve: SummaryCurve = SummaryCurve()
    grad_norm_preclip: float | None = None
    learning_rate: float | None = None
    validation: dict[str, float | None] = {}
    clipped_share: float | None = None
    phase_ms: dict[str, float | None] = {}
    attention: tuple[dict[str, Any], ...] = ()
    phase: str = ""
    parameters: int | None = None
    """Number of elements of all trainable parameters."""
    viewers: tuple[str, ...] = ()
    recording: str = ""
    """What is wrong with recording to disk; "" while nothing is."""
    findings: tuple[dict[str, Any], ...] = ()
    """What the rules found, worst first, effects after their cause."""
    events: tuple[dict[str, Any], ...] = ()
    """The newest events, oldest first."""
    ranks: tuple[dict[str, Any], ...] = ()
    """Of a run with several processes: state, step, newest values and what stands out of each."""
    logged: dict[str, LoggedValue] = {}
    """The newest value of each name of `tui_trainer.log`."""


def summarize_run(run: RunEntry) -> RunSummary:
    """Ask a live run; read the recording of one that has ended or does not answer."""
    if not run.live:
        return summarize_recording(run)
    try:
        with RunClient.connect(run, "tui-trainer show") as client:
            return summarize_live(run, client)
    except RunError as error:
        summary = summarize_recording(run)
        summary.run["note"] = summary.run["note"] or error.message
        return summary


def summarize_recording(run: RunEntry) -> RunSummary:
    """From the run's recording, or from its status file where that cannot be read."""
    try:
        replay = ReplaySession(run.directory)
    except StoreError as error:
        there = (run.directory / STORE_FILE).exists()
        return RunSummary(as_object(run), recording=str(error) if there else "")
    except OSError:
        return RunSummary(as_object(run))
    try:
        snapshot = replay.poll()
        if snapshot.info is None:
            return RunSummary(as_object(run))
        summary = _summary(run, snapshot.history, snapshot.info, snapshot.status, snapshot.events)
    finally:
        replay.close()
    # The registry knows the current state: a run that was killed could not record it.
    summary.run.update(state=run.state, note=run.note)
    if run.reported.step > summary.run["step"]:
        last = as_object(run)
        summary.run.update({name: last[name] for name in ("step", "loss", "loss_text")})
    summary.run.update(steps_per_second=None, items_per_second=None, remaining_s=None)
    recording = "; ".join(text for text in (summary.recording, snapshot.link.message) if text)
    return msgspec.structs.replace(summary, viewers=(), recording=recording)


def summarize_live(run: RunEntry, client: RunClient) -> RunSummary:
    """Poll a live run for everything new. Raises RunError."""
    while client.poll().more:
        pass
    snapshot = client.snapshot
    assert snapshot.info is not None
    return _summary(run, snapshot.history, snapshot.info, snapshot.status, snapshot.events)


def _summary(
    run: RunEntry, history: History, info: RunInfo, status: Status, events: Sequence[Event]
) -> RunSummary:
    step = history.table(schema.STEP)
    loss = _curve(step, "loss")
    summary = as_object(run)
    summary |= {
        "state": "paused" if status.state == "paused" else summary["state"],
        "step": status.step,
        "total_steps": info.total_steps,
        "loss": _finite(loss.last) if loss.last is not None else None,
        "loss_text": None
        if loss.last is None or math.isfinite(loss.last)
        else nonfinite(loss.last),
        "steps_per_second": status.steps_per_second,
        "items_per_second": status.items_per_second,
        "item_unit": info.item_unit,
        "title": info.title or info.task,
        "elapsed_s": status.elapsed_s,
        "remaining_s": status.remaining_s,
        "device": info.device.name if info.device else summary["device"],
        "note": status.reason or status.waiting_for,
    }
    if status.ended:
        summary["state"] = status.state
    trainable = sum(p.numel for p in info.parameters if p.trainable)
    made = RunSummary(
        summary,
        msgspec.structs.replace(loss, last=_finite(loss.last)),
        _curve(step, "grad_norm_preclip"),
        _latest(step).get("grad_norm_preclip"),
        _latest(step).get("learning_rate"),
        {name: each.value for name, each in _logged(history, schema.VALIDATION).items()},
        status.clipped_share,
        _latest(history.table(schema.PHASE_MS)),
        _attention(info, history),
        status.phase,
        trainable or None,
        status.viewers,
        status.recording,
        tuple(finding_object(finding) for finding in newest_findings(events)),
        tuple(_event_object(event) for event in events[-EVENTS_SHOWN:]),
    )
    ranks = tuple(map(_rank_object, summarize_ranks(info, status, history)))
    return msgspec.structs.replace(made, logged=_logged(history), ranks=ranks)


def _rank_object(rank: RankSummary) -> dict[str, Any]:
    values = rank.values.items()
    return {
        **msgspec.structs.asdict(rank.process),
        "step": rank.step,
        **{name: _finite(value) for name, value in values},
        "nonfinite": {name: word for name, value in values if (word := _nonfinite(value))},
        "remarks": rank.remarks,
    }


def _logged(history: History, table: str = schema.LOGGED) -> dict[str, LoggedValue]:
    found: dict[str, LoggedValue] = {}
    for each in logged_series(history, table):
        if (newest := each.newest()) is not None:
            step, value = newest
            why = why_absent(value)
            text = why.reason if why else _nonfinite(value)
            found[each.name] = LoggedValue(step, _finite(value), text)
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _nonfinite(value: float | None) -> str | None:
    return nonfinite(value) if value is not None and not math.isfinite(value) else None


def _latest(table: SeriesReader | None) -> dict[str, float | None]:
    latest = table.latest() if table is not None else None
    if table is None or latest is None:
        return {}
    names = [column.name for column in table.table.columns]
    return {n: _finite(float(v)) for n, v in zip(names, latest[1], strict=True)}


def _curve(table: SeriesReader | None, name: str) -> SummaryCurve:
    column = table.column(name) if table is not None else None
    if table is None or column is None or table.first_step is None or table.last_step is None:
        return SummaryCurve()
    buckets = max(1, min(CURVE_POINTS, table.rows))
    window = table.window([column], table.first_step, table.last_step + 1, buckets)
    kept = np.flatnonzero(window.filled)
    return SummaryCurve(
        tuple(int(window.edges[i]) for i in kept),
        tuple(_finite(float(window.low[i, 0])) for i in kept),
        tuple(_finite(float(window.high[i, 0])) for i in kept),
        table.newest(name),
    )


def _attention(info: RunInfo, history: History) -> tuple[dict[str, Any], ...]:
    newest: dict[str, float | None] = {}
    for table in attention_tables(history, schema.ATTENTION):
        newest |= _latest(table)
    if not newest:
        return ()
    return tuple(
        {
            "layer": each.layer,
            **{name: newest.get(f"{each.layer}.{name}") for name in ATTENTION_SHOWN},
        }
        for each in info.attention
    )


def _event_object(event: Event) -> dict[str, Any]:
    shared: dict[str, Any] = {"step": event.step, "time": event.time}
    match event:
        case Clip():
            text = f"clipped: norm {event.norm_before:.4g} over {event.max_norm:.4g}"
            return shared | {"kind": "clip", "text": text, "scale": event.scale}
        case NonFinite():
            return shared | {"kind": "nonfinite", "text": event.text}
        case Skipped():
            return shared | {"kind": "skipped", "text": event.text, "reason": event.reason}
        case Finding():
            text = f"{event.title}: {event.text}"
            return shared | {"kind": "finding", "text": text, "level": event.level}
        case Notice():
            who = f" ({event.who})" if event.who else ""
            return shared | {"kind": event.kind, "text": event.text + who, "level": event.level}


# ---------------------------------------------------------------- the command

REFRESH_EVERY_S = 1.0
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-~=*#@"
LAYERS_SHOWN = 12
LOGGED_SHOWN = 12
CHART_WIDTH, CHART_HEIGHT = 78, 10


def show(
    run: RunName = None,
    *,
    once: Annotated[bool, flag("print the run once, even if it is live")] = False,
    json: Annotated[bool, flag("print one JSON object")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """show a run on a dozen lines, or as one JSON object"""
    with cli_errors():
        found = choose_run_by_name(run, runs_dir, live=False)
        if json:
            print(_as_json(summarize_run(found)))
            return 0
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        if once or not found.live or not sys.stdout.isatty():
            console.print(picture(summarize_run(found), console))
        else:
            _follow(found, console)
    return 0


def _as_json(summary: RunSummary) -> str:
    fields = msgspec.to_builtins(summary)
    return msgspec.json.encode({**fields.pop("run"), **fields}).decode()


def _follow(run: RunEntry, console: Console) -> None:
    with (
        RunClient.connect(run, "tui-trainer show") as client,
        Live(console=console, auto_refresh=False) as live,
    ):
        while True:
            try:
                summary = summarize_live(run, client)
            except RunError:
                run = inspect_run(run.directory) or run
                live.update(picture(summarize_run(run), console), refresh=True)
                return
            live.update(picture(summary, console), refresh=True)
            if summary.run["state"] in END_STATES:
                return
            time.sleep(REFRESH_EVERY_S)


# ---------------------------------------------------------------- drawing


def picture(summary: RunSummary, console: Console) -> RenderableType:
    """The run on a dozen lines."""
    run = summary.run
    lines = [_heading(summary), Text(_progress(summary))]
    if run["parent"]:
        step = "" if run["branch_step"] is None else f"@{run['branch_step']}"
        lines.append(Text(f"continues {Path(run['parent']).name}{step}"))
    if run["note"]:
        lines.append(Text(" ".join(str(run["note"]).split()), STYLES.get(run["state"], "")))
    if summary.recording:
        lines.append(Text(summary.recording, "red"))
    bars = BARS if (console.encoding or "").lower().startswith("utf") else PLAIN_BARS
    values = _values(summary, bars)
    # The chart of the loss stands under its line; the lines below it keep the same columns.
    least = [max(cell_len(row[i]) for row in values) for i in range(2)]
    lines += _value_lines(values[:1], least)
    marker = "braille" if bars is BARS else "*"
    curve = summary.loss_curve
    chart = TextCurve(curve.steps, curve.low, curve.high, marker)
    lines += map(Text, text_chart([chart], min(CHART_WIDTH, console.width), CHART_HEIGHT))
    lines += _value_lines(values[1:], least)
    lines += _attention_lines(summary)
    lines += [_rank_line(rank) for rank in summary.ranks]
    if summary.findings:
        lines += finding_lines(summary.findings)
    elif run["step"]:
        lines.append(Text("no findings", "dim"))
    shown = [event for event in summary.events if event["kind"] != "finding"]
    lines += [_event_line(event) for event in shown[-4:]]
    lines.append(Text(str(run["directory"]), "dim"))
    return Group(*lines)


def _rank_line(rank: dict[str, Any]) -> Text:
    """`rank 1  step 40  loss 0.4406  12.3 ms/step  slow in data: …`"""
    parts = [rank["label"] or f"rank {rank['rank']}"]
    if rank["step"] is not None:
        parts.append(f"step {rank['step']:,}")
        parts.append(f"loss {number(rank.get('loss'), 0)}")
        parts.append(f"{milliseconds(rank.get('step_ms'), 0)}/step")
    text = Text("  ".join(parts))
    if rank["remarks"]:
        text.append("  " + "; ".join(rank["remarks"]), "yellow")
    return text


def _heading(summary: RunSummary) -> Text:
    run = summary.run
    what = f" · {run['title'] or run['task']}" if run["title"] or run["task"] else ""
    state = run["state"] + (
        f" after {summary.phase}" if run["state"] == "paused" and summary.phase else ""
    )
    device = f" · {run['device']}" if run["device"] else ""
    return Text.assemble(
        (run["name"], "bold"), what, device, "  ", (state, STYLES.get(run["state"], ""))
    )


def _progress(summary: RunSummary) -> str:
    run = summary.run
    parts = [f"step {step_of(run['step'], run['total_steps'])}"]
    if run["total_steps"]:
        parts[0] += f" ({percent(run['step'] / run['total_steps'], 0, 0)})"
    if run["steps_per_second"]:
        parts.append(f"{number(run['steps_per_second'], 0, 3)} steps/s")
    if run["items_per_second"]:
        parts.append(f"{run['items_per_second']:,.0f} {run['item_unit']}/s")
    if run["elapsed_s"]:
        parts.append(f"{rough_duration(run['elapsed_s'])} so far")
    if run["remaining_s"]:
        parts.append(f"{rough_duration(run['remaining_s'])} left")
    if summary.parameters:
        parts.append(f"{summary.parameters:,} parameters")
    return " · ".join(parts)


def _values(summary: RunSummary, bars: str) -> list[tuple[str, str, str]]:
    """Name, value and remark of each quantity, the loss first."""
    run = summary.run
    loss = number(run["loss"], 0) if run["loss"] is not None else (run["loss_text"] or "–")
    rows = [("loss", loss, _extremes(summary.loss_curve))]
    if summary.grad_norm_curve.steps:
        curve = summary.grad_norm_curve
        remark = "  ".join(part for part in (_sparkline(curve, bars), _extremes(curve)) if part)
        rows.append(("grad norm", number(curve.last, 0), remark))
    if summary.clipped_share is not None:
        rows.append(("clipped", percent(summary.clipped_share, 0, 0), "of the last steps"))
    if summary.learning_rate is not None:
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


def _attention_lines(summary: RunSummary) -> Sequence[Text]:
    if not summary.attention:
        return []
    shown = summary.attention[:LAYERS_SHOWN]
    names = [name for name in shown[0] if name != "layer"]
    table = new_table(["attention", *names], right=names, style="dim")
    for layer in shown:
        table.add_row(Text(layer["layer"]), *(Text(number(layer[n], 0, 3)) for n in names))
    lines = table_lines(table)
    left = len(summary.attention) - len(shown)
    if left:
        lines.append(Text(f"and {left} more layers", "dim"))
    return lines


FINDINGS_SHOWN = 6


def finding_lines(findings: Sequence[dict[str, Any]], details: bool = False) -> list[Text]:
    """The findings, two lines each; with `details` also what to do and what they caused."""
    causes = [each for each in findings if each["cause"] is None]
    lines: list[Text] = []
    for found in causes if details else causes[:FINDINGS_SHOWN]:
        style = {"error": "red", "warning": "yellow"}.get(found["level"], "")
        lines.append(
            Text.assemble(
                (f"{found['level']:<8}", style),
                (found["title"], "bold"),
                (f"  since step {found['onset']:,}  {found['rule']}", "dim"),
            )
        )
        lines.append(Text(f"        {found['text']}"))
        if details:
            lines.append(Text.assemble(("        next: ", "dim"), found["next"]))
        effects = [each for each in findings if each["cause"] == found["number"]]
        if effects:
            listed = ", ".join(f"{each['title']} (step {each['onset']:,})" for each in effects)
            lines.append(Text.assemble(("        it explains: ", "dim"), listed))
    if not details and len(causes) > FINDINGS_SHOWN:
        lines.append(Text(f"and {len(causes) - FINDINGS_SHOWN} more findings", "dim"))
    return lines


def _event_line(event: dict[str, object]) -> Text:
    style = {"error": "red", "warning": "yellow"}.get(str(event.get("level", "")), "")
    text = " ".join(str(event["text"]).split())
    return Text.assemble((f"step {event['step']:,}  ", "dim"), (text, style))
