"""`tui-trainer show RUN`: a run on a dozen lines of text, or as one JSON object."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import msgspec
from rich.console import Console
from rich.live import Live

from tui_trainer.cli.commands.common import RunName, RunsDir, choose_run_by_name, cli_errors, flag
from tui_trainer.cli.run_summary import (
    LayerSummary,
    RunSummary,
    finite,
    nonfinite_text,
    picture,
    summarize_live,
    summarize_run,
)
from tui_trainer.client.connection import RunClient
from tui_trainer.history.ranks import RankSummary
from tui_trainer.protocol.events import (
    Clip,
    Event,
    Finding,
    Notice,
    Skipped,
    event_kind,
    finding_object,
)
from tui_trainer.protocol.formatting import event_text
from tui_trainer.protocol.messages import END_STATES
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run

REFRESH_EVERY_S = 1.0


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
            print(as_json(summarize_run(found)))
            return 0
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        if once or not found.live or not sys.stdout.isatty():
            console.print(picture(summarize_run(found), console))
        else:
            _follow(found, console)
    return 0


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
            if summary.run.state in END_STATES:
                return
            time.sleep(REFRESH_EVERY_S)


# ---------------------------------------------------------------- JSON


def as_json(summary: RunSummary) -> str:
    """One object. Its names are documented in docs/runs.md and do not change."""
    fields: dict[str, Any] = msgspec.to_builtins(summary.run)
    fields |= {name: getattr(summary, name) for name in RunSummary.__dataclass_fields__}
    del fields["run"]
    fields |= {
        "attention": [_layer_object(layer) for layer in summary.attention],
        "findings": [finding_object(finding) for finding in summary.findings],
        "events": [_event_object(event) for event in summary.events],
        "ranks": [_rank_object(rank) for rank in summary.ranks],
    }
    return msgspec.json.encode(fields).decode()


def _layer_object(layer: LayerSummary) -> dict[str, Any]:
    return {"layer": layer.layer, **layer.values}


def _rank_object(rank: RankSummary) -> dict[str, Any]:
    values = rank.values.items()
    return {
        **msgspec.structs.asdict(rank.process),
        "step": rank.step,
        **{name: finite(value) for name, value in values},
        "nonfinite": {name: text for name, value in values if (text := nonfinite_text(value))},
        "remarks": rank.remarks,
    }


def _event_object(event: Event) -> dict[str, Any]:
    made: dict[str, Any] = {"step": event.step, "time": event.time, "kind": event_kind(event)}
    made["text"] = event_text(event)
    match event:
        case Clip():
            made["scale"] = event.scale
        case Skipped():
            made["reason"] = event.reason
        case Finding() | Notice():
            made["level"] = event.level
    return made
