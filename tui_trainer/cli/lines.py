"""Off a terminal: the run is done in this very process, and tells its story in lines on stdout."""

from __future__ import annotations

from typing import Literal

from tui_trainer.cli.directory import discard_refused
from tui_trainer.config.spec import RunSpec


def show_lines(spec: RunSpec, kind: Literal["plain", "json"]) -> int:
    """Do the run; returns its exit status."""
    from tui_trainer.run.host import main
    from tui_trainer.run.sinks.opening import open_sink

    status = main(spec, open_sink(kind))
    discard_refused(spec)
    return status
