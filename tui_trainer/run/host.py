"""The run process: serves viewers, trains on the main thread (or on a worker thread, with
`--in-app`), and reports how the run ended.

Viewers are served before torch is imported, so that an app has something to show at once.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tui_trainer.config.machine import OtherLoad
from tui_trainer.config.ranks import rank_here
from tui_trainer.config.run_spec import RunSpec, new_socket_path
from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.findings.rule import (
    known_settings,
)
from tui_trainer.findings.rules import RULES
from tui_trainer.findings.rules.nonfinite import NonFiniteRule
from tui_trainer.protocol import Phase, schema
from tui_trainer.protocol.actions import Branch
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.protocol.messages import Join, ProcessAt
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.sink_items import Sink
from tui_trainer.record.status_file import StatusFile
from tui_trainer.run.control import CommandHandler, RunBreakpoints
from tui_trainer.run.environment import initial_info, limit_openmp_spinning
from tui_trainer.run.inspection import Inspections, RankInspections
from tui_trainer.run.outcome import (
    FAILURE,
    STOPPED,
    Outcome,
    is_fully_explained,
    outcome_of,
    print_failure,
    print_outcome,
)
from tui_trainer.run.rank_control import RankControl
from tui_trainer.run.rank_server import FAILED_LEAVE_S, FAILURE_WAIT_S, LEAVE_S, RankServer
from tui_trainer.run.scalars import activated
from tui_trainer.run.script_branches import ScriptBranches
from tui_trainer.run.server import Server
from tui_trainer.run.signals import StopHandler
from tui_trainer.runs.checkpoints import checkpoint_steps
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.launch import start_branch
from tui_trainer.store.writer import StoreWriter
from tui_trainer.trace.gate import Gate, Refusal

if TYPE_CHECKING:
    from tui_trainer.inspector.inspector import Inspector
    from tui_trainer.run.checkpoints import CheckpointSaver
    from tui_trainer.settings.edits import LiveEdits
    from tui_trainer.travel.time_travel import TimeTravel


MAX_STORE_PROBLEMS = 20
"""How many distinct problems of the store get a line in the log."""
LINGER_S = 5.0
"""How long an ended run waits for its viewers to fetch the end."""
FIRST_VIEWER_S = 3.0
"""How long a run that ends at once waits for the app that started it."""


class Host:
    """One run: its recorder, gate, server and sinks. It is the `RunContext` of its training."""

    recording = True

    def __init__(
        self,
        spec: RunSpec,
        stop_handler: type[StopHandler] = StopHandler,
        others: OtherLoad | None = None,
    ) -> None:
        """`others`: a measurement of the machine's load that has already begun."""
        self.spec = spec
        self._others = others or OtherLoad()
        self.recorder = Recorder(initial_info(spec))
        self.gate = Gate(paused=spec.start_paused)
        self.gate.throttle(spec.steps_per_second)
        self.stops = stop_handler(
            self.gate, lambda: self.recorder.longest_step_s, self._warn_of_interrupt
        )
        rank = rank_here() if spec.is_script else None
        rank = rank if rank and not rank.rank else None
        self.gate.times_boundaries = rank is not None
        self.ranks = RankServer(self.recorder, rank)
        self.controls = RankControl(self.gate, self.ranks)
        self.ranks.hooks.stop_wanted = self._stop_all
        self.stops.stop_gate = self.controls.stop
        if self.recording:
            settings = known_settings(spec.rules, RULES)
            self.recorder.evaluate_with(FindingsEngine(settings, self._rule_failed))
        mine = spec if self.recording else msgspec.structs.replace(spec, breakpoints=())
        self.breakpoints = RunBreakpoints(mine, self.gate, self.recorder)
        self.gate.hooks.breakpoint_reached = self.controls.pause_at_breakpoint
        self.ranks.hooks.row_received = self.breakpoints.all.observe_rank
        control = CommandHandler(
            self.gate,
            self.recorder,
            self.stops.stop,
            self._save_on_request,
            self.controls,
            self.breakpoints,
            self._live_edits,
            self._time_travel,
            self._start_branch,
        )
        self.edits: LiveEdits | None = None
        self.travel: TimeTravel | None = None
        self.inspections = Inspections(self.gate)
        self.inspections.others = RankInspections(self.ranks)
        self.server = Server(
            spec.name,
            self.recorder,
            control,
            serve_rank=self._serve_rank,
            inspections=self.inspections,
        )
        self._branches = ScriptBranches(spec, self.recorder, self._store_problem)
        self._saver: CheckpointSaver | None = None
        self._script_started = False
        self._at_end: list[Callable[[], None]] = []
        self._store_problems: set[str] = set()
        self._pause_lock = threading.RLock()
        self.gate.hooks.changed = self._gate_changed
        self.gate.hooks.fault = self.recorder.fault
        self.gate.hooks.save_checkpoint = self._save_on_stop
        self.recorder.set_status(waiting_for="starting")
        gate = self.gate
        self.recorder.follow(self._live_status, lambda: gate.paused_s, lambda: gate.current_step)

    # ------------------------------------------------------------ start, train, end

    def open(self, sink: Sink | None) -> None:
        """Start to serve viewers and to write to disk and to `sink`."""
        try:
            self.server.listen(new_socket_path(self.spec.directory))
        except OSError as error:
            self.recorder.fault("no viewer can attach", error)
        self.breakpoints.save()
        self.recorder.subscribe(StatusFile(self.spec.directory, self.recorder.info))
        self.recorder.subscribe(StoreWriter(self.spec.directory, self._store_problem))
        self.recorder.subscribe(self.ranks)
        if self.recording and self.spec.alerts:
            self._send_alerts()
        if sink is not None:
            self.recorder.subscribe(sink)

    def _send_alerts(self) -> None:
        from tui_trainer.record.alerts import AlertSink

        try:
            self.recorder.subscribe(AlertSink(self.spec.alerts, self.recorder.info))
        except OSError as error:
            self.recorder.fault("no alert can be sent", error)

    def train(self) -> Outcome:
        """Train on this thread; returns how it ended and never raises."""
        try:
            self._prepare_openmp()
            outcome = self._train()
        except BaseException as error:
            outcome = outcome_of(error, self.spec.is_script)
            print_failure(error, outcome, self.spec.is_script)
            if outcome.state == "crashed" and not self.recorder.measured:
                refused = is_fully_explained(error, self._script_started)
                outcome = replace(outcome, refused=refused)
        finally:
            self.training_ended()
            self.stops.training_ended()
        if outcome.state == "stopped" and self.stops.requested and not self.stops.exit_status:
            outcome = STOPPED
        if outcome.state == "finished":
            outcome = self._check_last_loss(outcome)
        if outcome.state == "stopped" and self.stops.exit_status is not None:
            outcome = replace(outcome, status=self.stops.exit_status)
        return outcome

    def _prepare_openmp(self) -> None:
        try:
            limit_openmp_spinning(self.spec, self._others)
        except Exception as error:
            self.recorder.fault("preparing OpenMP", error)

    def _train(self) -> Outcome:
        with activated(self.recorder, self.gate):
            if self.spec.is_script:
                from tui_trainer.run.script import train_script

                return train_script(self)
            from tui_trainer.run.task_training import train_task

            return train_task(self)

    def _check_last_loss(self, outcome: Outcome) -> Outcome:
        """Fail a task whose last loss is not finite, so that a batch system sees that it has learnt
        nothing. A script has its own exit status."""
        if self.spec.is_script:
            return outcome
        loss = self._last_loss()
        if loss is None or math.isfinite(loss):
            return outcome
        failed = Outcome(
            "finished", f"the loss is {nonfinite(loss)}", self._nonfinite_hint(), FAILURE
        )
        print_outcome(failed)
        return failed

    def _last_loss(self) -> float | None:
        table = self.recorder.info and self.recorder.history.table(schema.STEP)
        return table.newest("loss") if table else None

    def _nonfinite_hint(self) -> str:
        first = self.recorder.first_nonfinite
        if first is None:
            return ""
        finite = first.seen and f" (finite at step {first.finite_at:,})"
        advice = "try a lower learning rate, clipping or float32"
        findings = {finding.number: finding for finding in self.recorder.findings}
        for finding in findings.values():
            if finding.rule == NonFiniteRule.name:
                # The hint has to agree with the findings.
                cause = findings.get(finding.number if finding.cause is None else finding.cause)
                if cause is None or cause is finding:
                    advice = finding.advice
                else:
                    advice = f"{cause.title} since step {cause.onset:,}; {cause.advice}"
        return f"the {first.quantity} was {first.value} at step {first.step}{finite}: {advice}"

    def close(self, outcome: Outcome, first_viewer_s: float = 0.0) -> None:
        """Report the end, wait until viewers and sinks have it, and remove the socket."""
        self.gate.end()
        with contextlib.suppress(KeyboardInterrupt):
            outcome = self._end_of_ranks(outcome)
        hint = outcome.hint or self._nonfinite_hint()
        self.recorder.end(outcome.state, outcome.reason, hint, outcome.refused)
        with contextlib.suppress(KeyboardInterrupt):
            self.server.wait_until_seen(LINGER_S, first_viewer_s)
            self.recorder.close()
        self.breakpoints.save()
        self.server.close()

    def _end_of_ranks(self, outcome: Outcome) -> Outcome:
        """Wait for the other processes and adjust `outcome`: if this process failed, the first one
        that failed is the reason, since collectives with a failed process fail as well."""
        ranks = self.ranks
        ranks.own_ended(outcome.state, outcome.reason)
        if not ranks.several:
            return outcome
        self.recorder.flush(LEAVE_S)
        failed = outcome.state == "crashed" or self.stops.exit_status is not None
        failure = ranks.first_failure(FAILURE_WAIT_S if failed else 0.0)
        if not failure:
            ranks.wait_until_left(FAILED_LEAVE_S if outcome.state == "crashed" else LEAVE_S)
            failure = ranks.first_failure()
        else:
            ranks.wait_until_left(0.0)
        ranks.close()
        if not failure:
            return outcome
        if not failed:
            return replace(outcome, reason=outcome.reason or failure)
        return replace(
            outcome, state="crashed", reason=failure, hint=outcome.reason or outcome.hint
        )

    # ------------------------------------------------------------ for the training

    def show_waiting_for(self, what: str) -> None:
        self.recorder.set_status(waiting_for=what)

    def save_with(self, saver: CheckpointSaver) -> None:
        self._saver = saver

    def inspect_with(self, inspector: Inspector) -> None:
        self.inspections.inspector = inspector

    def name_outputs(self, tokens: Sequence[str], classes: Sequence[str]) -> None:
        if self.inspections.inspector is not None:
            self.inspections.inspector.tokens = tokens
            self.inspections.inspector.classes = classes

    def edit_with(self, edits: LiveEdits, travel: TimeTravel) -> None:
        self.edits, self.travel = edits, travel
        if self.spec.is_script and self.recording:
            travel.went_back = self._branches.begin
        self.inspections.edits, self.inspections.travel = edits, travel

    def at_end(self, call: Callable[[], None]) -> None:
        self._at_end.append(call)

    def training_ended(self) -> None:
        """Call the functions given to `at_end`; an exception in one is reported."""
        calls, self._at_end = self._at_end, []
        for call in calls:
            try:
                call()
            except Exception as error:
                self.recorder.fault("the end of the training", error)

    def script_started(self) -> None:
        self._script_started = True

    # ------------------------------------------------------------ for the gate and the viewers

    def _serve_rank(self, stream: socket.socket, join: Join) -> None:
        self.ranks.serve(stream, join)

    def _stop_all(self) -> None:
        with contextlib.suppress(Refusal):
            self.controls.stop(checkpoint=True)

    def _live_edits(self) -> LiveEdits:
        """The changes of settings. Raises Refusal where nothing can be changed."""
        self._require_one_process()
        if self.edits is None:
            raise Refusal("the training has not begun yet")
        return self.edits

    def _time_travel(self) -> TimeTravel:
        """Time travel. Raises Refusal where the training cannot go back."""
        self._require_one_process()
        if self.travel is None:
            raise Refusal("the training has not begun yet")
        return self.travel

    def _require_one_process(self) -> None:
        processes = 1 + sum(not peer.child for peer in self.ranks.peers)
        if processes > 1:
            raise Refusal(
                f"this run trains in {processes} processes, each with its own state",
                "a run of one process can be changed and rewound",
            )

    def _save_on_request(self) -> None:
        self._save_soon()

    def _save_soon(self) -> Future[int]:
        """Request a checkpoint at the end of the current step; the result is its step number.
        Raises Refusal."""
        if self._saver is None:
            raise Refusal("there is nothing to save yet")
        saver, gate = self._saver, self.gate
        if gate.mode == "paused" and gate.phase and gate.phase != "step":
            raise Refusal(*_no_checkpoint_within_step(gate.phase, gate.step_in_progress))

        def save() -> int:
            saver.write(gate.completed, requested=True)
            return gate.completed

        return gate.call_soon(save)

    def _start_branch(self, asked: Branch) -> str:
        """Write a checkpoint and start a run from it in a new process. Raises Refusal."""
        if self.spec.is_script:
            return self._branch_in_script(asked)
        if self.edits is None:
            raise Refusal("the training has not begun yet")
        name = self._branches.new_directory(asked.name).name
        self.edits.require_possible(asked.changes)
        if asked.only_check:
            return f"branch {name} can be started"
        made = (asked, name, self._save_soon())
        threading.Thread(target=self._make_branch, args=made, daemon=True).start()
        return f"branch {name} is being started"

    def _branch_in_script(self, asked: Branch) -> str:
        """Record what the script does from the end of the current step on as a branch, with other
        settings. Raises Refusal."""
        from tui_trainer.settings.edits import SettingEdit

        travel, edits, gate = self._time_travel(), self._live_edits(), self.gate
        if gate.mode == "paused" and gate.within_step:
            raise Refusal(
                f"paused after {gate.phase} of step {gate.step_in_progress:,}: a branch begins at "
                "the end of a step",
                "finish the step first: s on the screen, or tui-trainer step",
            )
        edits.require_possible(asked.changes)
        directory = self._branches.new_directory(asked.name)
        if asked.only_check:
            return f"branch {directory.name} can be started"
        changes = " ".join(change.text for change in asked.changes)

        def begin() -> None:
            if asked.back_to is not None and not travel.has_state_for(asked.back_to):
                raise Refusal("the script could not be rewound")
            self._branches.begin(gate.completed, travel.state_step, directory, changes)
            if asked.changes:
                edits.apply(SettingEdit(0, asked.changes))
            if asked.paused:
                gate.pause()
            else:
                gate.resume()

        def report(done: Future[None]) -> None:
            error = None if done.cancelled() else done.exception()
            if error is not None:
                text = f"branch {directory.name} could not be started: {error}"
                self.recorder.notice("branch", text, "error", gate.completed)

        gate.call_soon(begin).add_done_callback(report)
        return f"branch {directory.name} is being started"

    def _make_branch(self, asked: Branch, name: str, saved: Future[int]) -> None:
        """Start the branch once the checkpoint is saved. Runs on its own thread; a notice reports
        the result."""
        changes = [change.text for change in asked.changes]
        try:
            step = saved.result()
            if step not in checkpoint_steps(Path(self.spec.directory)):
                raise RunError(f"the checkpoint of step {step:,} could not be written")
            start_branch(self.spec, step, name, changes, asked.paused)
        except CancelledError:
            return  # the training has ended
        except RunError as error:
            text = f"branch {name} could not be started: {error.message}"
            self.recorder.notice("branch", text, "error", self.gate.completed)
        except Exception as error:
            self.recorder.fault(f"starting branch {name}", error)
        else:
            with_changes = f" with {' '.join(changes)}" if changes else ""
            text = f"branch {name} continues from step {step:,}{with_changes}"
            self.recorder.notice("branch", text, step=step)

    def _save_on_stop(self, step: int) -> None:
        if self._saver is not None:
            self._saver.write(step)

    def _gate_changed(self) -> None:
        self.controls.wake()
        # Several threads, and a signal handler on one of them, may call this at the same time: the
        # call that ends last has seen the current mode.
        with self._pause_lock:
            reported = None
            while reported != (paused := self.gate.mode == "paused"):
                reported = paused
                (self.recorder.pause_began if paused else self.recorder.pause_ended)()

    def _live_status(self) -> dict[str, Any]:
        """The fields of `Status` that the gate knows."""
        gate = self.gate
        mode = gate.mode
        changes: dict[str, Any] = {
            "phase": gate.phase,
            "run_to": gate.run_to,
            "throttle": gate.rate,
            "processes": self.ranks.positions(self._own_position()),
            "breakpoints": self.breakpoints.all.list(),
        }
        if (stop := self.breakpoints.stopped_at) is not None:
            changes["stopped_at"], changes["reason"] = stop, stop.reason
        travel = self.travel
        if travel is not None and travel.in_the_past:
            changes["ahead"] = travel.newest
        if mode in ("stopping", "ended"):
            changes["state"] = "stopping"
        elif not gate.phase and (step := self.ranks.steps_of_children):
            changes |= {"state": "running", "step": step, "waiting_for": ""}
        elif not gate.phase:
            changes["state"] = "starting"
        else:
            changes["state"] = mode
            if self.spec.is_script:
                changes["waiting_for"] = ""  # its first step has begun
        return changes

    def _rule_failed(self, text: str) -> None:
        self.recorder.notice("fault", text, "error")

    def _own_position(self) -> ProcessAt:
        gate = self.gate
        held = gate.mode == "paused"
        for_s = max(0.0, time.monotonic() - gate.reached_at) if gate.reached_at else 0.0
        return ProcessAt(0, gate.boundary[0], gate.phase, for_s, held)

    def _warn_of_interrupt(self, text: str) -> None:
        self.recorder.notice("state", text, "warning", self.gate.completed)

    def _store_problem(self, problem: str) -> None:
        """Show a problem of the store for as long as it lasts, and log it once."""
        self.recorder.set_status(recording=problem)
        known = problem in self._store_problems or len(self._store_problems) >= MAX_STORE_PROBLEMS
        if problem and not known:
            self._store_problems.add(problem)
            self.recorder.notice("recording", problem, "warning")


def _no_checkpoint_within_step(phase: Phase, step: int) -> tuple[str, str]:
    """Message and hint of the refusal to save while paused after `phase`."""
    hint = "finish the step first: s on the screen, or tui-trainer step"
    if phase == "data":
        reason = "a checkpoint would lose the batch of the step, which is loaded already"
    else:
        reason = "a checkpoint needs the weights of a finished step"
    return f"paused after {phase} of step {step:,}: {reason}", hint


def main(spec: RunSpec, sink: Sink | None = None, own_session: bool = False) -> int:
    """Run what `spec` describes, on the main thread; returns the exit status.

    `sink` is written to besides the store (see `run.sinks`). `own_session`: this process was
    started for the run alone, by an app that is about to connect.
    """
    Path(spec.directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    return run_to_end(Host(spec), sink, own_session)


def run_to_end(
    host: Host,
    sink: Sink | None,
    own_session: bool = False,
    after_training: Callable[[], None] = lambda: None,
) -> int:
    """Open, train and close; `after_training()` is called when nothing more will be printed."""
    host.open(sink)
    host.stops.install(not host.spec.is_script, own_session)
    outcome = host.train()
    after_training()
    host.close(outcome, FIRST_VIEWER_S if own_session else 0.0)
    return outcome.status


# ---------------------------------------------------------------- on a worker thread


class WorkerStopHandler(StopHandler):
    """Leaves the process's signals and its main thread alone."""

    def install(self, task: bool, own_session: bool) -> None:
        """Set no handler."""

    def stop(self, checkpoint: bool) -> None:
        """Stop at the end of the current step, or of the first step if none has begun."""
        self._requests += 1
        self._request_stop(checkpoint)


class Worker:
    """A run on a worker thread of a process that also does something else, such as the app.

    It ends with that process and does not handle its signals; otherwise it is like a run process,
    and others can attach to it.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._host = Host(spec, WorkerStopHandler)
        self.outcome: Outcome | None = None
        """How the run ended; None until it has."""
        self.viewer, served = socket.socketpair()
        self._host.open(None)
        self._host.server.serve(served)
        self._thread = threading.Thread(target=self._work, name="training", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        outcome = self._host.train()
        self._host.close(outcome)
        self.outcome = outcome

    def stop(self, checkpoint: bool = True) -> None:
        """Ask the training to stop after its current step."""
        self._host.stops.stop(checkpoint)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run has ended and everything is written; returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()
