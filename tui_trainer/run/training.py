"""Trains one of the shipped tasks, or a third party's, from its start or from a checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.training import from_flat
from tui_trainer.run.context import RunContext, create_tracer
from tui_trainer.run.environment import device_info, with_torch_versions
from tui_trainer.run.evaluations import Evaluations
from tui_trainer.run.outcome import STOPPED, Outcome
from tui_trainer.tasks.definition import TaskDefinition, Training, build, find_task
from tui_trainer.trace.gate import StopTraining

if TYPE_CHECKING:
    import torch

    from tui_trainer.run.checkpoints import CheckpointSaver, LoadedCheckpoint, Stateful


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
    run.gate.completed, run.gate.step_in_progress = start, start + 1
    tracer = create_tracer(run, start + 1)
    tracer.attach()
    try:
        training = build(definition, config)
        _describe(run, training, torch.get_num_threads())
        saver, evaluations = _schedule_between_steps(run, training)
        if checkpoint is None:
            with tracer.suspended():
                evaluations.before_first_step()
        else:
            # Built from the same seed, so these are the weights that the first run started with.
            tracer.register(training.model, _optimizers(training))
            _resume(run, checkpoint, training)
        run.show_waiting_for("")
        outcome = Outcome("finished")
        try:
            training.loop()
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
    """Around a large import, which creates hardly any garbage: searching for it takes a tenth of
    the time."""
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


def _schedule_between_steps(
    run: RunContext, training: Training
) -> tuple[CheckpointSaver, Evaluations]:
    from tui_trainer.run.checkpoints import CheckpointSaver

    def contents() -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
        return training.model.state_dict(), training.stateful

    saver = CheckpointSaver(run.spec, run.recorder, contents)
    evaluations = Evaluations(training.evaluations, run.recorder, saver.save_if_best)
    # Evaluations first: the checkpoint of the best weights then serves the cadence as well.
    run.gate.call_every(evaluations.cadences, evaluations.after_step)
    run.gate.call_every(saver.cadences, saver.after_step)
    run.save_with(saver)
    return saver, evaluations


def _checkpoint_to_resume(spec: RunSpec) -> LoadedCheckpoint | None:
    if spec.resume is None:
        return None
    from tui_trainer.run.checkpoints import load_checkpoint

    return load_checkpoint(spec.resume)


def _optimizers(training: Training) -> list[torch.optim.Optimizer]:
    import torch

    parts = training.stateful.values()
    return [part for part in parts if isinstance(part, torch.optim.Optimizer)]


def _resume(run: RunContext, checkpoint: LoadedCheckpoint, training: Training) -> None:
    from tui_trainer.run.checkpoints import restore, restore_random_state

    restore(checkpoint, training.model, training.stateful)
    restore_random_state(checkpoint.random)
    run.recorder.set_status(step=checkpoint.step)
    run.recorder.notice("state", f"resumed from {checkpoint.path}", step=checkpoint.step)
