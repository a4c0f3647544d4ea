"""The page about a run, put together: what it was, how it went, what happened."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from importlib.resources import files

from tui_trainer import __version__
from tui_trainer.history.spikes import find_spikes
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import RunInfo, Scalar
from tui_trainer.protocol.messages import Event, NonFinite, Notice
from tui_trainer.report import tables as table_parts
from tui_trainer.report.charts import COLOURS, panels
from tui_trainer.report.read import Recorded

EVENTS_SHOWN = 200


def render(recorded: Recorded) -> Iterator[str]:
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
    yield from table_parts.worst_parameters(recorded)
    yield from _events(recorded.events(EVENTS_SHOWN), recorded.event_count())
    yield from table_parts.settings("Configuration", _shown(info.configuration), "columns")
    yield from table_parts.settings("Data and model", {**info.facts, **_model(info)}, "columns")
    yield from table_parts.settings("Environment", _environment(info), "")
    if info.unseen:
        yield from table_parts.settings("Not seen in this run", dict(info.unseen), "")
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


def _lead(recorded: Recorded) -> str:
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


def _figures(recorded: Recorded) -> Iterator[str]:
    def figure(name: str, value: str) -> str:
        return f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>'

    total = recorded.info.total_steps
    steps = f"{recorded.last_step:,}" + (f" of {total:,}" if total else "")
    yield figure("steps", steps)
    for name, table, column in (
        ("training loss", tables.STEP, "loss"),
        ("validation loss", tables.VALIDATION, "loss"),
        ("validation accuracy", tables.VALIDATION, "accuracy"),
    ):
        last, best = recorded.last_and_best(table, column, lowest=column != "accuracy")
        if last is not None:
            extra = f", best {best:.4g}" if best is not None and best != last else ""
            yield figure(name + extra, f"{last:.4f}")
    clips = recorded.event_count("clip")
    if recorded.history.table(tables.CLIP) is not None and recorded.last_step:
        yield figure("of the steps clipped", f"{100 * clips / recorded.last_step:.1f} %")
    spikes = _spikes(recorded)
    if spikes:
        yield figure("worst spike of the loss", spikes)
    bad = recorded.event_count("nonfinite")
    if bad:
        yield figure("times a NaN or infinity appeared", f"{bad:,}")
    if recorded.status.elapsed_s:
        yield figure("training", _duration(recorded.status.elapsed_s))


def _spikes(recorded: Recorded) -> str:
    table = recorded.history.table(tables.STEP)
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
