"""The run process: serves viewers, trains on the main thread, and says how it ended.

Viewers are served before torch is imported, so that an app has something to show at once.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tui_trainer.config.machine import OtherLoad
from tui_trainer.config.run_spec import RunSpec, new_socket_path
from tui_trainer.protocol import schema
from tui_trainer.record.events import Sink
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.status_file import StatusFile
from tui_trainer.run.control import CommandHandler
from tui_trainer.run.environment import initial_info, limit_openmp_spinning
from tui_trainer.run.outcome import FAULT, Outcome, judge, report_outcome, say, told_in_full
from tui_trainer.run.server import Server
from tui_trainer.run.signals import Signals
from tui_trainer.store.writer import StoreWriter
from tui_trainer.trace.gate import Gate, Refusal

TROUBLES_SAID = 20
LINGER_S = 5.0
"""How long an ended run stays for its viewers to fetch the end."""
FIRST_VIEWER_S = 3.0
"""How long a run that ends at once waits for the app that started it."""


class Host:
    """One run and all that surrounds its training."""

    def __init__(
        self,
        spec: RunSpec,
        signals: Callable[[Gate], Signals] = Signals,
        others: OtherLoad | None = None,
    ) -> None:
        """`others`: who has been looking, since before this was imported, how busy the machine is
        with others."""
        self.spec = spec
        self._others = others or OtherLoad()
        self.recorder = Recorder(initial_info(spec))
        self.gate = Gate(paused=spec.start_paused)
        self.signals = signals(self.gate)
        self.signals.longest_step_s = lambda: self.recorder.longest_step_s
        self.signals.say = self._say_forced
        self.control = CommandHandler(
            self.gate, self.recorder, self.signals.stop, self._ask_checkpoint
        )
        self.server = Server(spec.name, self.recorder, self.control)
        self._troubles: set[str] = set()
        self._changing = threading.RLock()
        self.save: Callable[[int, bool], object] | None = None
        """Writes a checkpoint of the step given, told whether somebody waits for the answer; on the
        training thread, between steps."""
        self.script_runs = False
        """Whether a script has begun: it was found, and is Python."""
        self.gate.hooks.changed = self._gate_changed
        self.gate.hooks.fault = self.recorder.fault
        self.gate.hooks.save_checkpoint = lambda step: self.save and self.save(step, False)
        self.recorder.set_status(waiting_for="starting")
        self.recorder.follow(self._live_status, lambda: self.gate.paused_s)

    def open(self, sink: Sink | None) -> None:
        """Make what is known visible: to viewers, on disk, and to `sink`."""
        try:
            self.server.listen(new_socket_path(self.spec.directory))
        except OSError as fault:
            self.recorder.fault("no viewer can attach", fault)
        self.recorder.subscribe(StatusFile(self.spec.directory, self.recorder.info))
        self.recorder.subscribe(StoreWriter(self.spec.directory, self._say_recording))
        if sink is not None:
            self.recorder.subscribe(sink)

    def train(self) -> Outcome:
        """Train on this thread; returns how it ended and raises nothing."""
        try:
            self._look_around()
            outcome = self._train()
        except BaseException as fault:
            script = self.spec.task == "script"
            outcome = judge(fault, script)
            report_outcome(fault, outcome, script)
            if outcome.state == "crashed" and not self.recorder.measured:
                refused = told_in_full(fault, script_runs=self.script_runs)
                outcome = replace(outcome, refused=refused)
        finally:
            self.signals.over()
        if outcome.state == "stopped" and self.signals.asked and not self.signals.exit_status:
            outcome = Outcome("stopped", "stopped on request")
        if outcome.state == "finished":
            outcome = self._judge_loss(outcome)
        if self.signals.exit_status is not None and outcome.state == "stopped":
            outcome = Outcome("stopped", outcome.reason, outcome.hint, self.signals.exit_status)
        return outcome

    def _look_around(self) -> None:
        """What is settled before anything of the training is imported."""
        try:
            limit_openmp_spinning(self.spec, self._others)
        except Exception as fault:
            self.recorder.fault("looking around", fault)

    def _train(self) -> Outcome:
        if self.spec.task == "script":
            from tui_trainer.run.training import run_script

            return run_script(self)
        from tui_trainer.run.training import train_task

        return train_task(self)

    def _judge_loss(self, outcome: Outcome) -> Outcome:
        """A task that ended with no finite loss has learnt nothing: a batch system shall see it. A
        script has its own exit status."""
        table = self.recorder.info and self.recorder.history.table(schema.STEP)
        latest = table.latest() if table else None
        if self.spec.task == "script" or latest is None or math.isfinite(latest[1][0]):
            return outcome
        failed = Outcome("finished", f"the loss is {latest[1][0]}", self._hint(), FAULT)
        say(failed)
        return failed

    def close(self, outcome: Outcome, first_viewer_s: float = 0.0) -> None:
        """Say the end to everybody, wait until it was taken, and leave nothing behind."""
        self.gate.end()
        hint = outcome.hint or self._hint()
        self.recorder.end(outcome.state, outcome.reason, hint, outcome.refused)
        with contextlib.suppress(KeyboardInterrupt):
            self.server.wait_until_seen(LINGER_S, first_viewer_s)
            self.recorder.close()
        self.server.close()

    def _say_recording(self, trouble: str) -> None:
        """What is wrong with the store: on every screen while it is, and once in the story."""
        self.recorder.set_status(recording=trouble)
        if trouble and trouble not in self._troubles and len(self._troubles) < TROUBLES_SAID:
            self._troubles.add(trouble)
            self.recorder.notice("recording", trouble, "warning")

    def _say_forced(self, text: str) -> None:
        self.recorder.notice("state", text, "warning", self.gate.completed)

    def waiting_for(self, what: str) -> None:
        """What a run that makes no steps is busy with."""
        self.recorder.set_status(waiting_for=what)

    def _hint(self) -> str:
        found = self.recorder.first_nonfinite
        if found is None:
            return ""
        return (
            f"the {found.quantity} was {found.value} at step {found.step}"
            f"{found.seen and f' (finite at step {found.finite_at:,})'}: "
            "try a lower learning rate, clipping or float32"
        )

    def _ask_checkpoint(self) -> None:
        if self.save is None:
            raise Refusal("there is nothing to save yet")
        gate = self.gate
        if gate.mode == "paused" and gate.phase != "step":
            raise Refusal(*_no_checkpoint_here(gate.phase, gate.step_in_progress))
        gate.call_soon(lambda: self.save and self.save(gate.completed, True))

    def _gate_changed(self) -> None:
        # Several threads may tell at once, and a signal's handler on top of one of them: whoever
        # is done last has seen what is so now.
        with self._changing:
            said = None
            while said != (paused := self.gate.mode == "paused"):
                said = paused
                (self.recorder.pause_began if paused else self.recorder.pause_ended)()

    def _live_status(self) -> dict[str, Any]:
        gate = self.gate
        mode = gate.mode
        changes: dict[str, Any] = {
            "phase": gate.phase,
            "run_to": gate.run_to,
            "throttle": gate.rate,
        }
        if mode in ("stopping", "ended"):
            changes["state"] = "stopping"
        elif not gate.phase:
            changes["state"] = "starting"
        else:
            changes["state"] = mode
            if self.spec.task == "script":
                changes["waiting_for"] = ""  # its first phase has come
        return changes


def _no_checkpoint_here(phase: str, step: int) -> tuple[str, str]:
    """Why there can be none while a run is paused after this phase, and what to do."""
    hint = "finish the step first: s on the screen, or tui-trainer step"
    if phase == "data":
        why = "the batch of the step is drawn and would be lost"
    else:
        why = "weights in the middle of a step are no checkpoint"
    return f"paused after {phase} of step {step:,}: {why}", hint


def main(spec: RunSpec, sink: Sink | None = None, own_session: bool = False) -> int:
    """Do the run that `spec` describes, on the main thread; returns the exit status.

    `sink` is given the run's story (see `run.sinks`). `own_session`: this process was started for
    the run alone, by an app that is about to connect.
    """
    Path(spec.directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    return finish(Host(spec), sink, own_session)


def finish(
    host: Host,
    sink: Sink | None,
    own_session: bool = False,
    before_end: Callable[[], None] = lambda: None,
) -> int:
    """Open, train and close; `before_end()` is called when nothing more will be printed."""
    host.open(sink)
    host.signals.install(host.spec.task != "script", own_session)
    outcome = host.train()
    before_end()
    host.close(outcome, FIRST_VIEWER_S if own_session else 0.0)
    return outcome.status
