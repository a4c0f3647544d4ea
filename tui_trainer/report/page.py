"""Renders the page about a run from `page.html`: its numbers, charts, events and settings."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

import jinja2
import numpy as np
from numpy.typing import NDArray

from tui_trainer import __version__
from tui_trainer.history.healthy_ranges import UPDATE_RATIO
from tui_trainer.history.loss_spikes import find_spikes
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import Event, EventKind, Finding, Level, NonFinite, Notice, Skipped
from tui_trainer.protocol.formatting import (
    event_text,
    long_duration,
    number,
    percent,
    scalar,
    step_of,
)
from tui_trainer.protocol.schema import RunInfo, Scalar
from tui_trainer.report.charts import COLOURS, panels
from tui_trainer.report.read import ReportData

WORST_SHOWN = 12
EVENTS_SHOWN = 200


@dataclass(frozen=True)
class KeyFigure:
    """One of the large numbers at the top of the page."""

    name: str
    value: str


@dataclass(frozen=True)
class ReportedParameter:
    """A parameter with its highest and last gradient norm, last norm and last update ratio."""

    name: str
    nonfinite: bool
    values: tuple[float | None, ...]
    unhealthy_update: bool


@dataclass(frozen=True)
class EventRow:
    """One line of the table of events."""

    step: int
    kind: EventKind
    level: Level
    text: str


def render(data: ReportData) -> Iterator[str]:
    """The document in pieces, so that the page of a long run is never in memory as a whole."""
    info = data.info
    return _template().generate(
        info=info,
        status=data.status,
        style=_resource("page.css"),
        colours=COLOURS,
        parent=info.parent.rpartition("/")[2],
        figures=list(_figures(data)),
        panels=panels(data),
        worst=_worst_parameters(data),
        healthy_updates=UPDATE_RATIO.words,
        findings=data.findings(),
        events=_events(data.events(EVENTS_SHOWN)),
        event_count=data.event_count(),
        configuration=_present(info.configuration),
        facts=_present({**info.facts, **_model(info)}),
        environment=_present(_environment(info)),
        unseen=_present(info.unseen),
        fault=lambda: data.history.store.fault,  # complete once everything has been read
        version=__version__,
        now=time.time(),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"scalar": scalar, "number": _number, "date": _date}
    return environment.from_string(_resource("page.html"))


def _resource(name: str) -> str:
    return files("tui_trainer.report").joinpath(name).read_text(encoding="utf-8")


def _number(value: float | None) -> str:
    return number(value, width=0)


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)).strip()
    except (ValueError, OverflowError, OSError):  # not a time: a damaged recording
        return "at an unknown time"


def _present(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {name: value for name, value in values.items() if value not in (None, "")}


# ---------------------------------------------------------------- figures


def _figures(data: ReportData) -> Iterator[KeyFigure]:
    total = data.info.total_steps
    yield KeyFigure("steps", step_of(data.last_step, total))
    for name, table, column in (
        ("training loss", schema.STEP, "loss"),
        ("validation loss", schema.VALIDATION, "loss"),
        ("validation accuracy", schema.VALIDATION, "accuracy"),
    ):
        last, best = data.last_and_best(table, column, lowest=column != "accuracy")
        if last is not None:
            extra = f", best {best:.4g}" if best is not None and best != last else ""
            yield KeyFigure(name + extra, f"{last:.4f}")
    if data.history.table(schema.CLIP) is not None and data.last_step:
        share = data.event_count("clip") / data.last_step
        yield KeyFigure("of the steps clipped", percent(share, 0))
    steps = data.history.table(schema.STEP)
    if steps is not None and (spikes := find_spikes(steps, "loss", 1)):
        yield KeyFigure("largest loss spike", f"{spikes[0].loss:.3g} at step {spikes[0].step:,}")
    if nonfinite := data.event_count("nonfinite"):
        yield KeyFigure("times a value became nan or inf", f"{nonfinite:,}")
    if data.status.elapsed_s:
        yield KeyFigure("training", long_duration(data.status.elapsed_s))


# ---------------------------------------------------------------- tables


def _worst_parameters(data: ReportData) -> list[ReportedParameter]:
    """The parameters with the highest gradient norms of the run, non-finite ones first."""
    tables = data.history.tables_named(schema.GRAD_NORM)
    tables = [table for table in tables if table.rows and table.columns]
    if not tables:
        return []
    extremes = [_extremes(table) for table in tables]
    highest = np.concatenate([high for high, _ in extremes])
    nonfinite = np.concatenate([bad for _, bad in extremes])
    names = [column.name for table in tables for column in table.table.columns]
    last = _last_by_name(data, schema.GRAD_NORM)
    weights = _last_by_name(data, schema.WEIGHT_NORM)
    ratios = _last_by_name(data, schema.UPDATE_RATIO)
    score = np.where(nonfinite, np.inf, np.nan_to_num(highest, nan=-1.0))
    rows = []
    for index in np.argsort(-score, kind="stable")[:WORST_SHOWN].tolist():
        name = names[index]
        values = (float(highest[index]), last.get(name), weights.get(name), ratios.get(name))
        unhealthy = not UPDATE_RATIO.holds(ratios.get(name, math.nan))
        rows.append(ReportedParameter(name, bool(nonfinite[index]), values, unhealthy))
    return rows


def _extremes(table: SeriesReader) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    columns = list(range(table.columns))
    window = table.window(columns, table.first_step or 0, (table.last_step or 0) + 1, 1)
    return window.high[0], window.nonfinite[0]


def _last_by_name(data: ReportData, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for table in data.history.tables_named(name):
        if (latest := table.latest()) is not None:
            columns = (column.name for column in table.table.columns)
            found.update(zip(columns, latest[1].tolist(), strict=True))
    return found


def _events(events: list[Event]) -> list[EventRow]:
    """Rows of the table of events, without clips, which are marked on the chart."""
    rows = []
    kind: EventKind
    level: Level
    for event in events:
        match event:
            case Notice():
                kind, level = event.kind, event.level
            case Finding():
                kind, level = "finding", event.level
            case Skipped():
                kind, level = "skipped", "warning"
            case NonFinite():
                kind, level = "nonfinite", "error"
            case _:
                continue
        rows.append(EventRow(event.step, kind, level, event_text(event)))
    return rows


# ---------------------------------------------------------------- settings


def _model(info: RunInfo) -> dict[str, Scalar]:
    trainable = sum(each.numel for each in info.parameters if each.trainable)
    facts: dict[str, Scalar] = {}
    if trainable:
        facts["trainable parameters"] = f"{trainable:,} in {len(info.parameters):,} tensors"
    if info.attention:
        facts["attention layers"] = len(info.attention)
    return facts


def _environment(info: RunInfo) -> dict[str, Scalar]:
    source = info.source
    commit = device = ""
    if source is not None:
        changes = {True: ", with changes", False: "", None: ", perhaps with changes"}
        branch = f" on {source.branch}" if source.branch else ""
        commit = source.commit + branch + changes[source.dirty]
    if info.device is not None:
        threads = f", {info.device.threads} threads" if info.device.threads else ""
        device = f"{info.device.kind}: {info.device.name}{threads}"
    return {
        "command": " ".join(info.command),
        "working directory": info.working_directory,
        "commit": commit,
        "device": device,
        "host": info.host,
        "run directory": info.directory,
        **info.versions,
    }
