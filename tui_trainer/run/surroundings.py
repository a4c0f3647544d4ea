"""What training happens in: what a task or a script is given of its run, and the tracer over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tui_trainer.config.spec import RunSpec
from tui_trainer.recording.recorder import Recorder
from tui_trainer.tracing.gate import Gate

if TYPE_CHECKING:
    from tui_trainer.tracing.tracer import Tracer


class Surroundings(Protocol):
    """A run, as its training sees it: `run.host.Host` is one."""

    spec: RunSpec
    recorder: Recorder
    gate: Gate
    save: Callable[[int, bool], object] | None
    """Set by whoever trains: writes a checkpoint of the step given; told whether somebody asked for
    it and waits for an answer."""
    script_runs: bool
    """Set once a script has begun."""

    def waiting_for(self, what: str) -> None:
        """What a run that makes no steps is busy with."""


def make_tracer(host: Surroundings, first_step: int = 1) -> Tracer:
    """The tracer with every probe, not attached yet. Imports torch."""
    from tui_trainer.probes import PROBES
    from tui_trainer.tracing.probe import Options
    from tui_trainer.tracing.tracer import Tracer

    options = Options(budget=host.spec.budget, attention_pattern=host.spec.attention_pattern)
    tracer = Tracer(host.recorder, host.gate, PROBES, options)
    tracer.step = first_step
    host.recorder.meanwhile = tracer.record_meanwhile
    return tracer
