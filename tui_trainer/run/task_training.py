"""Trains one of the shipped tasks, or a third party's, from the beginning or from a checkpoint."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.training import from_flat
from tui_trainer.protocol.formatting import milliseconds
from tui_trainer.protocol.schema import VALIDATION, Better, Column
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.context import RunContext, create_tracer
from tui_trainer.run.environment import device_info, with_torch_versions
from tui_trainer.run.outcome import STOPPED, Outcome
from tui_trainer.runs.checkpoints import checkpoint_path, checkpoint_steps
from tui_trainer.tasks.definition import Evaluation, TaskDefinition, Training, build, find_task
from tui_trainer.trace.gate import Gate, Refusal, StopTraining

if TYPE_CHECKING:
    import torch

    from tui_trainer.run.checkpoints import CheckpointSaver, LoadedCheckpoint
    from tui_trainer.settings.edits import EditableTask
    from tui_trainer.travel.snapshots import Stateful


EDITS = "edits"
"""Name, in a checkpoint, of the state of the user's changes of settings."""


def train_task(run: RunContext) -> Outcome:
    """Build the task and train it to its end. Raises whatever the training raises, except
    `StopTraining`."""
    definition = _find_definition(run.spec.task)
    config = from_flat(definition.config, run.spec.configuration)
    run.show_waiting_for("importing torch")
    with garbage_collection_disabled():
        import torch

    run.recorder.describe(versions=with_torch_versions(run.recorder.info.versions))
    run.show_waiting_for("preparing the data and the model")
    checkpoint = _checkpoint_to_resume(run.spec)
    start = checkpoint.step if checkpoint else 0
    run.gate.continue_from(start)
    tracer = create_tracer(run, start + 1)
    tracer.attach()
    try:
        training = build(definition, config)
        _describe(run, training, torch.get_num_threads())
        run.name_outputs(training.tokens, training.classes)
        enable_edits_and_travel(run, training)
        saver, evaluations = schedule_between_steps(run, training)
        if checkpoint is None:
            with tracer.suspended():
                evaluations.before_first_step()
        else:
            # Built from the same seed, so these are the weights that the first run started with.
            tracer.register(training.model, _optimizers(training))
            restore_checkpoint(run, checkpoint, training)
        if config.clip != "off" and training.schedule is not None:
            # So that the kind of clipping is known before the first call.
            value = config.clip == "value"
            tracer.clip_calls[config.clip] = config.clip_value if value else config.max_norm
        if run.spec.changes:
            tracer.register(training.model, _optimizers(training))
            change_before_first_step(run)
        run.show_waiting_for("")
        outcome = Outcome("finished")
        try:
            train_loop(run, training)
        except StopTraining:  # the gate has already written a checkpoint if one was requested
            outcome = STOPPED
    finally:
        tracer.detach()
    if outcome.state == "finished" and run.gate.completed:
        evaluations.after_last_step(run.gate.completed)
        saver.write(run.gate.completed)
    return outcome


@contextmanager
def garbage_collection_disabled() -> Iterator[None]:
    """Disable the garbage collector during a large import, which creates hardly any garbage:
    collections would take a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find_definition(name: str) -> TaskDefinition:
    try:
        return find_task(name)
    except KeyError:
        from importlib.metadata import entry_points

        known = [entry.name for entry in entry_points(group="tui_trainer.tasks")]
        raise ConfigurationError(f"there is no task {name!r}", did_you_mean(name, known)) from None


def change_before_first_step(run: RunContext) -> None:
    """Apply the changes of settings given at the start. Raises ConfigurationError."""
    from tui_trainer.settings.edits import SettingEdit

    assert run.edits is not None
    try:
        run.edits.apply(SettingEdit(0, parse_changes(run.spec.changes)))
    except Refusal as refused:
        raise ConfigurationError(refused.message, refused.hint) from refused


def train_loop(run: RunContext, training: Training) -> None:
    """Train to the end, going back whenever a user asks for it. Raises StopTraining."""
    from tui_trainer.travel.time_travel import RewindRequested

    travel, target = run.travel, None
    if travel is not None:
        travel.start()
    while True:
        try:
            if travel is not None and target is not None:
                travel.go(target)
            return training.loop()
        except RewindRequested as rewind:
            target = rewind.target


def enable_edits_and_travel(run: RunContext, training: Training) -> None:
    """Let users change the settings of the task and go back to earlier steps."""
    if run.edits is not None and run.travel is not None:
        run.edits.task = editable(training)
        run.travel.task = training
        run.travel.checkpoints = OwnCheckpoints(Path(run.spec.directory), training)


class OwnCheckpoints:
    """The checkpoints that this run has written, for time travel."""

    def __init__(self, directory: Path, training: Training) -> None:
        self._directory = directory
        self._training = training

    def steps(self) -> Sequence[int]:
        return checkpoint_steps(self._directory)

    def load(self, step: int) -> LoadedCheckpoint:
        """Read the checkpoint of `step`. Raises ConfigurationError."""
        from tui_trainer.run.checkpoints import load_checkpoint

        return load_checkpoint(checkpoint_path(self._directory, step))

    def restore(self, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
        """Restore a checkpoint; returns the state of the changes of settings. Raises
        ConfigurationError."""
        from tui_trainer.run.checkpoints import restore
        from tui_trainer.trace.random_state import restore_random_state

        restore(checkpoint, self._training.model, self._training.stateful)
        restore_random_state(checkpoint.random)
        state: dict[str, Any] = checkpoint.states[EDITS]
        return state


def editable(training: Training) -> EditableTask | None:
    """The parts of the task that a user may change."""
    from tui_trainer.settings.edits import EditableTask

    if training.schedule is None or training.batches is None:
        return None
    return EditableTask(training.schedule, training.batches, training.items_per_step)


def _describe(run: RunContext, training: Training, threads: int) -> None:
    run.gate.steps_per_epoch = training.steps_per_epoch
    run.recorder.describe(
        device=device_info(training.model, threads),
        total_steps=training.total_steps,
        steps_per_epoch=training.steps_per_epoch,
        items_per_step=training.items_per_step,
        item_unit=training.item_unit,
        facts=dict(training.facts),
    )


def schedule_between_steps(
    run: RunContext, training: Training
) -> tuple[CheckpointSaver, Evaluations]:
    """Schedule the evaluations of the task, and checkpoints, between its steps."""
    from tui_trainer.run.checkpoints import CheckpointSaver

    def contents() -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
        edits = {EDITS: run.edits} if run.edits is not None else {}
        return training.model.state_dict(), {**training.stateful, **edits}

    saver = CheckpointSaver(run.spec, run.recorder, contents)
    evaluations = Evaluations(training.evaluations, run.recorder, run.gate, saver.save_if_best)
    # Evaluations first: the checkpoint of the best weights then serves the cadence as well.
    run.gate.call_every(evaluations.cadences, _once(run, evaluations.after_step))
    run.gate.call_every(saver.cadences, _once(run, saver.after_step))
    run.save_with(saver)
    return saver, evaluations


def _once(run: RunContext, work: Callable[[int], None]) -> Callable[[int], None]:
    """`work`, skipped after steps that time travel repeats."""

    def after_step(step: int) -> None:
        if step > run.recorder.repeating_until:
            work(step)

    return after_step


def _checkpoint_to_resume(spec: RunSpec) -> LoadedCheckpoint | None:
    if spec.resume is None:
        return None
    from tui_trainer.run.checkpoints import load_checkpoint

    return load_checkpoint(spec.resume)


def _optimizers(training: Training) -> list[torch.optim.Optimizer]:
    import torch

    parts = training.stateful.values()
    return [part for part in parts if isinstance(part, torch.optim.Optimizer)]


def restore_checkpoint(run: RunContext, checkpoint: LoadedCheckpoint, training: Training) -> None:
    """Restore the state of the training and of the random generators from the checkpoint."""
    from tui_trainer.run.checkpoints import restore
    from tui_trainer.trace.random_state import restore_random_state

    restore(checkpoint, training.model, training.stateful)
    if run.edits is not None and EDITS in checkpoint.states:
        run.edits.load_state_dict(checkpoint.states[EDITS])
    restore_random_state(checkpoint.random)
    run.recorder.set_status(step=checkpoint.step)
    run.recorder.notice("state", f"resumed from {checkpoint.path}", step=checkpoint.step)


# ---------------------------------------------------------------- evaluations

BETTER: dict[str, Better] = {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}
"""The direction in which a metric improves."""


class Evaluations:
    """The evaluations of a task; those due after the same step fill one row of `validation`."""

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        recorder: Recorder,
        gate: Gate,
        on_loss: Callable[[int, float], None],
    ) -> None:
        """`on_loss(step, loss)` is called after each evaluation that measures a loss."""
        self._evaluations = evaluations
        self._recorder = recorder
        self._gate = gate
        self._on_loss = on_loss
        self._tables: dict[tuple[str, ...], int] = {}
        self._last_step: dict[str, int] = {}

    @property
    def cadences(self) -> tuple[int, ...]:
        """Intervals, in steps, at which `after_step` is called."""
        return tuple(evaluation.every for evaluation in self._evaluations)

    def before_first_step(self) -> None:
        self._run([each for each in self._evaluations if each.at_start], 0)

    def after_step(self, step: int) -> None:
        due = [each for each in self._evaluations if each.every and step % each.every == 0]
        self._run(due, step)

    def after_last_step(self, step: int) -> None:
        """Run the evaluations that have not seen the final weights."""
        due = [each for each in self._evaluations if self._last_step.get(each.name) != step]
        self._run(due, step)

    def _run(self, due: list[Evaluation], step: int) -> None:
        if not due:
            return
        metrics: dict[str, float] = {}
        with self._recorder.excluded():
            for evaluation in due:
                self._last_step[evaluation.name] = step
                self._recorder.set_status(waiting_for=f"evaluating: {evaluation.name}")
                started = time.perf_counter()
                try:
                    measured, artifacts = evaluation.run()
                except Exception as error:
                    self._recorder.fault(f"evaluation {evaluation.name}", error)
                    continue
                metrics.update(measured)
                for artifact in artifacts:
                    self._recorder.artifact(msgspec.structs.replace(artifact, step=step))
                self._log(evaluation.name, measured, step, time.perf_counter() - started)
        self._recorder.set_status(waiting_for="")
        if metrics:
            self._record(metrics, step)

    def _record(self, metrics: Mapping[str, float], step: int) -> None:
        names = tuple(metrics)
        if names not in self._tables:
            columns = tuple(Column(name, "", BETTER.get(name, "")) for name in names)
            self._tables[names] = self._recorder.new_table(VALIDATION, columns, every=0)
        values = np.array([metrics[name] for name in names], np.float32)
        self._recorder.row(self._tables[names], step, values)
        if self._gate.breakpoints is not None:
            self._gate.breakpoints.logged(metrics, VALIDATION)
        if "loss" in metrics:
            self._on_loss(step, metrics["loss"])

    def _log(self, name: str, metrics: Mapping[str, float], step: int, took_s: float) -> None:
        listed = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        text = f"{name}: {listed}" if listed else name
        self._recorder.notice("evaluation", f"{text} ({milliseconds(1e3 * took_s, 0)})", step=step)
