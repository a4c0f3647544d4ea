"""The interface of a run to its training, and the tracer that all trainings use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from tui_trainer.config.ranks import rank_here
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate

if TYPE_CHECKING:
    from tui_trainer.inspector.inspector import Inspector
    from tui_trainer.run.checkpoints import CheckpointSaver
    from tui_trainer.settings.edits import LiveEdits
    from tui_trainer.trace.tracer import Tracer
    from tui_trainer.travel.time_travel import TimeTravel


class RunContext(Protocol):
    """A run as its training sees it; `run.host.Host` implements it."""

    recording: bool
    """False in a process whose measurements another process of the run records."""

    @property
    def spec(self) -> RunSpec: ...

    @property
    def recorder(self) -> Recorder: ...

    @property
    def gate(self) -> Gate: ...

    @property
    def edits(self) -> LiveEdits | None:
        """Changes the settings of the training; None before the training begins."""

    @property
    def travel(self) -> TimeTravel | None:
        """Goes back to earlier steps; None before the training begins."""

    def show_waiting_for(self, what: str) -> None:
        """Show what the run is doing before its first step; "" once it makes steps."""

    def save_with(self, saver: CheckpointSaver) -> None:
        """Set the saver of the checkpoints that are requested by viewers or when stopping."""

    def inspect_with(self, inspector: Inspector) -> None:
        """Set the inspector of the training's tensors."""

    def name_outputs(self, tokens: Sequence[str], classes: Sequence[str]) -> None:
        """Set the texts of the model's tokens and the names of its classes, for inspections."""

    def edit_with(self, edits: LiveEdits, travel: TimeTravel) -> None:
        """Set the objects that change settings and that go back to earlier steps."""

    def at_end(self, call: Callable[[], None]) -> None:
        """Have `call()` called on the training thread once the training has ended."""

    def script_started(self) -> None:
        """Note that the user's script was found and compiled, and starts now."""


def create_tracer(run: RunContext, first_step: int = 1) -> Tracer:
    """A tracer with all probes, or those of a rank; not attached yet. Imports torch."""
    from tui_trainer.findings.rule import known_settings
    from tui_trainer.findings.rules import RULES
    from tui_trainer.findings.rules.nonfinite import NonFiniteRule
    from tui_trainer.inspector.checked_rerun import CheckedRerun
    from tui_trainer.inspector.inspector import Inspector
    from tui_trainer.probes import PROBES, RANK_PROBES, REPLICA_PROBES
    from tui_trainer.settings.edits import LiveEdits
    from tui_trainer.trace.probe import ProbeOptions
    from tui_trainer.trace.tracer import Tracer
    from tui_trainer.travel.time_travel import TimeTravel

    options = ProbeOptions(
        budget=run.spec.budget,
        attention_pattern=run.spec.attention_pattern,
        watch_nonfinite=run.spec.watch_nonfinite,
    )
    several = run.spec.is_script and rank_here() is not None
    recorded = (*PROBES, *REPLICA_PROBES) if several else PROBES
    tracer = Tracer(run.recorder, run.gate, recorded if run.recording else RANK_PROBES, options)
    tracer.step = first_step
    inspector = Inspector(tracer)
    rules = known_settings(run.spec.rules, RULES)
    reruns = int(rules.limits_of(NonFiniteRule)["reruns"]) if rules.runs(NonFiniteRule) else 0
    if run.recording and reruns > 0:
        inspector.capture.checked = tracer.origins.rerun = CheckedRerun(tracer, reruns)
    run.inspect_with(inspector)
    edits = LiveEdits(tracer, run.gate, run.recorder)
    memory = run.spec.snapshots if run.recording and not several else 0
    if memory != run.spec.snapshots and run.recording:
        text = "no snapshots are kept: a run of several processes cannot be rewound"
        run.recorder.notice("state", text, "warning")
    travel = TimeTravel(tracer, run.gate, run.recorder, edits, memory)
    travel.every = run.spec.snapshots_every
    travel.capture = inspector.capture
    run.edit_with(edits, travel)
    run.recorder.call_regularly(tracer.flush_idle)
    return tracer
