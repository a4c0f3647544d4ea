"""`tui-trainer show RUN`: one picture in text, or one JSON object, for cron and chat bots."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from tui_trainer.cli.runs.common import (
    RunName,
    RunsDir,
    chosen,
    duration,
    flag,
    number,
    one_message,
    steps,
)
from tui_trainer.cli.runs.listing import STYLES
from tui_trainer.cli.runs.picture import Curve, Look, look, look_through
from tui_trainer.session.ask import Conversation
from tui_trainer.session.registry import Run, look_at
from tui_trainer.session.trust import RunError

EVERY_S = 1.0
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-~=*#@"
LAYERS_SHOWN = 12


def show(
    run: RunName = None,
    *,
    once: Annotated[bool, flag("print one picture and leave")] = False,
    json: Annotated[bool, flag("print one JSON object and leave")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """one picture of a run in text, or one JSON object"""
    with one_message():
        found = chosen(run, runs_dir, live=False)
        if json:
            print(_as_json(look(found)))
            return 0
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        if once or not found.live or not sys.stdout.isatty():
            console.print(picture(look(found), console))
        else:
            _keep_showing(found, console)
    return 0


def _as_json(seen: Look) -> str:
    fields = msgspec.to_builtins(seen)
    return msgspec.json.encode({**fields.pop("run"), **fields}).decode()


def _keep_showing(run: Run, console: Console) -> None:
    with (
        Conversation.with_run(run, "tui-trainer show", read_only=True) as talk,
        Live(console=console, auto_refresh=False) as live,
    ):
        while True:
            try:
                seen = look_through(run, talk)
            except RunError:
                run = look_at(run.directory) or run
                live.update(picture(look(run), console), refresh=True)
                return
            live.update(picture(seen, console), refresh=True)
            if seen.run["state"] in ("finished", "stopped", "crashed"):
                return
            time.sleep(EVERY_S)


# ---------------------------------------------------------------- drawing


def picture(seen: Look, console: Console) -> RenderableType:
    """The run on a dozen lines."""
    run = seen.run
    lines = [_heading(seen), Text(_progress(seen))]
    if run["parent"]:
        step = "" if run["branch_step"] is None else f"@{run['branch_step']}"
        lines.append(Text(f"goes on from {Path(run['parent']).name}{step}"))
    if run["note"]:
        lines.append(Text(" ".join(str(run["note"]).split()), STYLES.get(run["state"], "")))
    if seen.recording:
        lines.append(Text(seen.recording, "red"))
    bars = BARS if (console.encoding or "").lower().startswith("utf") else PLAIN_BARS
    loss = number(run["loss"]) if run["loss"] is not None else (run["loss_text"] or "–")
    lines.append(_row("loss", loss, _sparkline(seen.loss_curve, bars), _extremes(seen.loss_curve)))
    if seen.grad_norm_curve.steps:
        curve = seen.grad_norm_curve
        lines.append(
            _row("grad norm", number(curve.last), _sparkline(curve, bars), _extremes(curve))
        )
    if seen.clipped_share is not None:
        lines.append(_row("clipped", f"{seen.clipped_share:.0%}", "of the last steps"))
    if seen.learning_rate is not None:
        lines.append(_row("learning rate", number(seen.learning_rate)))
    for name, value in seen.validation.items():
        lines.append(_row(f"validation {name}", number(value)))
    if seen.phase_ms:
        parts = [f"{name} {number(ms, 3)}" for name, ms in seen.phase_ms.items() if ms is not None]
        lines.append(_row("phases (ms)", "", " · ".join(parts)))
    lines += _attention_lines(seen)
    lines += [_event_line(event) for event in seen.events[-4:]]
    lines.append(Text(str(run["directory"]), "dim"))
    return Group(*lines)


def _heading(seen: Look) -> Text:
    run = seen.run
    what = f" · {run['title'] or run['task']}" if run["title"] or run["task"] else ""
    state = run["state"] + (
        f" after {seen.phase}" if run["state"] == "paused" and seen.phase else ""
    )
    device = f" · {run['device']}" if run["device"] else ""
    return Text.assemble(
        (run["name"], "bold"), what, device, "  ", (state, STYLES.get(run["state"], ""))
    )


def _progress(seen: Look) -> str:
    run = seen.run
    parts = [f"step {steps(run['step'], run['total_steps'])}"]
    if run["total_steps"]:
        parts[0] += f" ({run['step'] / run['total_steps']:.0%})"
    if run["steps_per_second"]:
        parts.append(f"{number(run['steps_per_second'], 3)} steps/s")
    if run["items_per_second"]:
        parts.append(f"{run['items_per_second']:,.0f} {run['item_unit']}/s")
    if run["elapsed_s"]:
        parts.append(f"{duration(run['elapsed_s'])} so far")
    if run["remaining_s"]:
        parts.append(f"{duration(run['remaining_s'])} left")
    if seen.parameters:
        parts.append(f"{seen.parameters:,} parameters")
    return " · ".join(parts)


def _row(name: str, value: str, *rest: str) -> Text:
    tail = "  ".join(part for part in rest if part)
    return Text.assemble((f"{name:<16}", "dim"), f"{value:>10}", f"  {tail}" if tail else "")


def _sparkline(curve: Curve, bars: str) -> str:
    """The highest value of each stretch, so that no spike is left out; ! where none was finite."""
    known = [value for value in curve.high if value is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    top = len(bars) - 1
    return "".join(
        "!" if value is None else bars[round((value - low) / span * top)] for value in curve.high
    )


def _extremes(curve: Curve) -> str:
    lows = [value for value in curve.low if value is not None]
    highs = [value for value in curve.high if value is not None]
    return f"{number(min(lows))} … {number(max(highs))}" if lows and highs else ""


def _attention_lines(seen: Look) -> Sequence[Text]:
    if not seen.attention:
        return []
    shown = seen.attention[:LAYERS_SHOWN]
    width = max(len(layer["layer"]) for layer in shown)
    names = [name for name in shown[0] if name != "layer"]
    lines = [Text("  ".join([f"{'attention':<{width}}", *(f"{n:>8}" for n in names)]), "dim")]
    for layer in shown:
        values = (f"{number(layer[name], 3):>8}" for name in names)
        lines.append(Text("  ".join([f"{layer['layer']:<{width}}", *values])))
    left = len(seen.attention) - len(shown)
    if left:
        lines.append(Text(f"and {left} more layers", "dim"))
    return lines


def _event_line(event: dict[str, object]) -> Text:
    style = {"error": "red", "warning": "yellow"}.get(str(event.get("level", "")), "")
    text = " ".join(str(event["text"]).split())
    return Text.assemble((f"step {event['step']:,}  ", "dim"), (text, style))
