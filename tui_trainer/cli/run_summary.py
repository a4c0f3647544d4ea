"""What `tui-trainer show` knows of one run: read from the live run, or from its recording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import numpy as np

from tui_trainer.cli.commands.ls import RunOverview, overview_of
from tui_trainer.client.connection import RunClient
from tui_trainer.client.replay import ReplaySession
from tui_trainer.history import History
from tui_trainer.history.columns import attention_tables, logged_series
from tui_trainer.history.ranks import RankSummary, summarize_ranks
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import Phase, schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import Event, Finding, Notice, newest_findings
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.protocol.messages import END_STATES, EntryState, Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.store.schema import STORE_FILE, StoreError

CURVE_POINTS = 60
EVENTS_SHOWN = 8
ATTENTION_SHOWN = ("cos_qk", "cos_qv", "cos_kv", "drift_q", "drift_k", "drift_v")


@dataclass(frozen=True)
class SummaryCurve:
    """A series over the whole run, in at most CURVE_POINTS buckets of steps."""

    steps: tuple[int, ...] = ()
    """The first step of each bucket."""
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    last: float | None = None


@dataclass(frozen=True)
class LoggedValue:
    """A value of `tui_trainer.log`."""

    step: int
    value: float | None
    """None where it is not finite, or beyond float32."""
    text: str | None = None
    """Then `nan`, `inf`, `-inf` or the reason."""


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
    """What is known of a run now. Numbers that are not finite are None."""

    run: RunOverview
    loss_curve: SummaryCurve = SummaryCurve()
    """Losses of the first optimizer, and so is the curve of the norm."""
    grad_norm_curve: SummaryCurve = SummaryCurve()
    grad_norm_preclip: float | None = None
    """Norm of the last step of any optimizer; so are the loss, the rate and the times."""
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
    """What is wrong with recording to disk; "" while nothing is."""
    findings: tuple[Finding, ...] = ()
    """What the rules found, worst first, effects after their cause."""
    events: tuple[Event, ...] = ()
    """The newest events and changes of settings, oldest first."""
    ranks: tuple[RankSummary, ...] = ()
    """The processes of a run with several."""
    logged: dict[str, LoggedValue] = field(default_factory=dict)
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
        if summary.run.note:
            return summary
        return replace(summary, run=msgspec.structs.replace(summary.run, note=error.message))


def summarize_recording(run: RunEntry) -> RunSummary:
    """From the run's recording, or from its status file where that cannot be read."""
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
    """Poll a live run for everything new. Raises RunError."""
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
        events=_shown_events(events),
        ranks=tuple(summarize_ranks(info, status, history)),
        logged=_logged(history, schema.LOGGED),
    )


def _overview(run: RunEntry, info: RunInfo, status: Status, loss: float | None) -> RunOverview:
    """Replaces older values of the status file by those that the run itself reports."""
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
    """The table of that name, of any optimizer, that has the last row until `step`."""
    rows = [
        (found[0], n)
        for n, t in history.tables.items()
        if t.table.name == name and (found := t.row_at(step)) is not None
    ]
    return history.tables[max(rows)[1]] if rows else None


def _loss_at(history: History, step: int) -> float | None:
    """The loss of the last step until `step`."""
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
    """`nan`, `inf` or `-inf`; None for a finite or missing value."""
    return nonfinite(value) if value is not None and not math.isfinite(value) else None


def _latest(table: SeriesReader | None, step: int) -> dict[str, float | None]:
    """The row of `step`, which is not the newest where the training was taken back."""
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
    kept = np.flatnonzero(window.filled)
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


def _shown_events(events: Sequence[Event]) -> tuple[Event, ...]:
    """The newest events, and the newest changes of settings even where they are older. How often
    things are measured is left to the log."""
    events = [each for each in events if not (isinstance(each, Notice) and each.kind == "cadence")]
    edits = [each for each in events if isinstance(each, Notice) and each.kind == "edit"]
    newest = events[-EVENTS_SHOWN:]
    older = [each for each in edits[-EVENTS_SHOWN:] if each not in newest]
    return (*older, *newest)
