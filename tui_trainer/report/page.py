"""The page about a run, put together: what it was, how it went, what happened."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from tui_trainer import __version__
from tui_trainer.history.analysis import find_spikes
from tui_trainer.history.series import MemorySeries
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import scalar
from tui_trainer.protocol.messages import Event, NonFinite, Notice
from tui_trainer.protocol.schema import RunInfo, Scalar
from tui_trainer.report.charts import COLOURS, panels
from tui_trainer.report.read import ReportData

# ---- tables
# The tables of a report.


WORST_SHOWN = 12
HEALTHY = 1e-3
"""The ratio of update to weight that is usually aimed at."""


def settings(title: str, values: Mapping[str, Scalar], layout: str) -> Iterator[str]:
    """Names and values; nothing where there are none."""
    shown = {name: value for name, value in values.items() if value not in (None, "")}
    if not shown:
        return
    yield f'<h2>{escape(title)}</h2>\n<div class="panel"><div class="{layout}"><table>\n'
    for name, value in shown.items():
        yield f'<tr><th>{escape(name)}</th><td class="m">{escape(scalar(value))}</td></tr>\n'
    yield "</table></div></div>\n"


def worst_parameters(recorded: ReportData) -> Iterator[str]:
    """The parameters with the highest gradient norm of the whole run, with where they ended."""
    found = recorded.history.of_every_optimizer(schema.GRAD_NORM)
    found = [table for table in found if table.rows and table.columns]
    if not found:
        return
    extremes = [_extremes(table) for table in found]
    highest = np.concatenate([high for high, _ in extremes])
    seen_bad = np.concatenate([bad for _, bad in extremes])
    last = _last_by_name(recorded, schema.GRAD_NORM)
    ratios = _last_by_name(recorded, schema.UPDATE_RATIO)
    weights = _last_by_name(recorded, schema.WEIGHT_NORM)
    names = [column.name for table in found for column in table.table.columns]
    score = np.where(seen_bad, np.inf, np.nan_to_num(highest, nan=-1.0))
    order = np.argsort(-score, kind="stable")[:WORST_SHOWN]
    yield '<h2>Parameters with the largest gradients</h2>\n<div class="panel"><table>\n'
    heads = ("‖∂L/∂p‖, highest", "‖∂L/∂p‖, last", "‖w‖, last", "‖Δw‖/‖w‖, last")
    yield "<tr><th>parameter</th>" + "".join(f'<th class="n">{h}</th>' for h in heads) + "</tr>\n"
    for place in order.tolist():
        name = names[place]
        bad = ' <span class="error">NaN or infinity seen</span>' if seen_bad[place] else ""
        cells = (float(highest[place]), last.get(name), weights.get(name), ratios.get(name))
        row = "".join(f'<td class="n">{_number(cell)}</td>' for cell in cells)
        yield f'<tr><td class="m">{escape(name)}{bad}</td>{row}</tr>\n'
    yield "</table></div>\n"


def _extremes(table: MemorySeries) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    columns = list(range(table.columns))
    seen = table.window(columns, table.first_step or 0, (table.last_step or 0) + 1, 1)
    return seen.high[0], seen.nonfinite[0]


def _last_by_name(recorded: ReportData, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for table in recorded.history.of_every_optimizer(name):
        if (latest := table.latest()) is not None:
            columns = (column.name for column in table.table.columns)
            found.update(zip(columns, latest[1].tolist(), strict=True))
    return found


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"


EVENTS_SHOWN = 200


def render(recorded: ReportData) -> Iterator[str]:
    """The whole document, piece by piece. Every text of the run is escaped; nothing is fetched."""
    info, status = recorded.info, recorded.status
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield f"<title>{escape(info.name)} · {escape(info.title or info.task)}</title>\n"
    yield f"<style>\n{style()}</style>\n</head>\n<body>\n<main>\n"
    yield f"<h1>{escape(info.name)}<small>{escape(info.title or info.task)}</small></h1>\n"
    yield f'<p class="lead">{_lead(recorded)}</p>\n'
    yield '<div class="figures">' + "".join(_figures(recorded)) + "</div>\n"
    yield '<h2>How it went</h2>\n<div class="charts">\n'
    yield from panels(recorded)
    yield "</div>\n"
    yield from worst_parameters(recorded)
    yield from _events(recorded.events(EVENTS_SHOWN), recorded.event_count())
    yield from settings("Configuration", _shown(info.configuration), "columns")
    yield from settings("Data and model", {**info.facts, **_model(info)}, "columns")
    yield from settings("Environment", _environment(info), "")
    if info.unseen:
        yield from settings("Not seen in this run", dict(info.unseen), "")
    if recorded.history.store.fault:  # known when all of it has been read
        yield f'<p class="lead error">{escape(recorded.history.store.fault)}</p>\n'
    yield f"<footer>written by tui-trainer {escape(__version__)}, {_when(time.time())}"
    yield f"{', before the run had ended' if not status.ended else ''}</footer>\n"
    yield "</main>\n</body>\n</html>\n"


def style() -> str:
    """The style sheet, with a class for each colour."""
    text = files("tui_trainer.report").joinpath("page.css").read_text(encoding="utf-8")
    rules = (f".{c}{{fill:var(--{c});stroke:var(--{c});background:var(--{c})}}" for c in COLOURS)
    return text.replace("COLOURS", "\n".join(rules))


def _lead(recorded: ReportData) -> str:
    info, status = recorded.info, recorded.status
    state = f'<span class="state {escape(status.state)}">{escape(status.state)}</span>'
    parts = [state + (f": {escape(status.reason)}" if status.reason else "")]
    if status.hint:
        parts.append(escape(status.hint))
    if info.started_at:
        parts.append(f"started {_when(info.started_at)}")
    if info.host:
        parts.append(f"on {escape(info.host)}")
    if info.parent:
        parent = escape(info.parent.rpartition("/")[2])
        parts.append(f"goes on from {parent} at step {info.branch_step or 0:,}")
    return " · ".join(parts)


def _when(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)).strip()
    except (ValueError, OverflowError, OSError):  # no time at all: a damaged recording
        return "at an unknown time"


def _figures(recorded: ReportData) -> Iterator[str]:
    def figure(name: str, value: str) -> str:
        return f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>'

    total = recorded.info.total_steps
    steps = f"{recorded.last_step:,}" + (f" of {total:,}" if total else "")
    yield figure("steps", steps)
    for name, table, column in (
        ("training loss", schema.STEP, "loss"),
        ("validation loss", schema.VALIDATION, "loss"),
        ("validation accuracy", schema.VALIDATION, "accuracy"),
    ):
        last, best = recorded.last_and_best(table, column, lowest=column != "accuracy")
        if last is not None:
            extra = f", best {best:.4g}" if best is not None and best != last else ""
            yield figure(name + extra, f"{last:.4f}")
    clips = recorded.event_count("clip")
    if recorded.history.table(schema.CLIP) is not None and recorded.last_step:
        yield figure("of the steps clipped", f"{100 * clips / recorded.last_step:.1f} %")
    spikes = _spikes(recorded)
    if spikes:
        yield figure("worst spike of the loss", spikes)
    bad = recorded.event_count("nonfinite")
    if bad:
        yield figure("times a NaN or infinity appeared", f"{bad:,}")
    if recorded.status.elapsed_s:
        yield figure("training", _duration(recorded.status.elapsed_s))


def _spikes(recorded: ReportData) -> str:
    table = recorded.history.table(schema.STEP)
    worst = find_spikes(table, 0, 1) if table is not None else []
    return f"{worst[0].loss:.3g} at {worst[0].step:,}" if worst else ""


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minute} min {second:02} s" if minute else f"{seconds:.1f} s"


def _events(events: list[Event], count: int) -> Iterator[str]:
    """All but clips, which are on the chart."""
    if not events:
        return
    yield '<h2>Events</h2>\n<div class="panel"><table class="events">\n'
    yield '<tr><th class="n">step</th><th>what</th><th></th></tr>\n'
    kind: str
    level: str
    for event in events:
        if isinstance(event, Notice):
            who = f" ({event.who})" if event.who else ""
            kind, level, text = event.kind, event.level, event.text + who
        elif isinstance(event, NonFinite):
            where = f" in {event.parameter}" if event.parameter else ""
            kind, level = "non-finite", "error"
            text = f"the {event.quantity}{where} is {event.value}{event.seen}"
        else:
            continue
        yield (
            f'<tr><td class="n">{event.step:,}</td><td>{escape(kind)}</td>'
            f'<td class="{escape(level, quote=True)}">{escape(text)}</td></tr>\n'
        )
    yield "</table>"
    if count > len(events):
        yield f"<p>the first {len(events):,} of {count:,}</p>"
    yield "</div>\n"


def _shown(configuration: dict[str, Scalar]) -> dict[str, Scalar]:
    return {name: value for name, value in configuration.items() if value is not None}


def _model(info: RunInfo) -> dict[str, Scalar]:
    trainable = sum(each.numel for each in info.parameters if each.trainable)
    made: dict[str, Scalar] = {}
    if trainable:
        made["trainable parameters"] = f"{trainable:,} in {len(info.parameters):,} tensors"
    if info.attention:
        made["attention layers"] = len(info.attention)
    return made


def _environment(info: RunInfo) -> dict[str, Scalar]:
    made: dict[str, Scalar] = {"command": " ".join(info.command)}
    made["working directory"] = info.working_directory
    if info.source is not None:
        changes = {True: ", with changes", False: "", None: ", perhaps with changes"}
        branch = f" on {info.source.branch}" if info.source.branch else ""
        made["commit"] = info.source.commit + branch + changes[info.source.dirty]
    if info.device is not None:
        threads = f", {info.device.threads} threads" if info.device.threads else ""
        made["device"] = f"{info.device.kind}: {info.device.name}{threads}"
    made |= {"host": info.host, "run directory": info.directory}
    return {**made, **info.versions}
