"""Training a task from its start or from a checkpoint, evaluated and saved between its steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tui_trainer.config.errors import ConfigurationError, near_miss
from tui_trainer.config.resolve import from_flat
from tui_trainer.config.spec import RunSpec
from tui_trainer.run.devices import device_of, with_torch
from tui_trainer.run.evaluating import Evaluations
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.saving import Saver
from tui_trainer.run.surroundings import Surroundings, make_tracer
from tui_trainer.tasks.definition import TaskDefinition, Training, build, find_task
from tui_trainer.tracing.gate import StopTraining

if TYPE_CHECKING:
    import torch

    from tui_trainer.run.checkpoints import Checkpoint, Stateful


def train_task(host: Surroundings) -> Outcome:
    """Build the task and train it to its end. Every exception passes but `StopTraining`."""
    definition = _definition(host.spec.task)
    config = from_flat(definition.config, host.spec.configuration)
    host.waiting_for("importing torch")
    with nothing_collected():
        import torch

    host.recorder.describe(versions=with_torch(host.recorder.info.versions))
    host.waiting_for("preparing the data and the model")
    checkpoint = _checkpoint_to_resume(host.spec)
    start = checkpoint.step if checkpoint else 0
    host.gate.completed, host.gate.step_in_progress = start, start + 1
    tracer = make_tracer(host, start + 1)
    tracer.attach()
    try:
        training = build(definition, config)
        describe_training(host, training, torch.get_num_threads())
        saver, evaluations = _between_steps(host, training)
        if checkpoint is None:
            with tracer.suspended():
                evaluations.at_start(0)
        else:
            # Built from the same seed, so these are the weights that the run began with.
            tracer.expect(training.model, _optimizers(training))
            _resume(host, checkpoint, training)
        host.waiting_for("")
        outcome = Outcome("finished")
        try:
            training.loop()
        except StopTraining:  # the gate has left a checkpoint where one was asked for
            outcome = Outcome("stopped", "stopped on request")
    finally:
        tracer.detach()
    if outcome.state == "finished" and host.gate.completed:
        evaluations.at_end(host.gate.completed)
        saver.write(host.gate.completed)
    return outcome


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Around an import of much. Hardly any of what it makes is garbage, and looking for that in all
    of it again and again takes a tenth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _definition(name: str) -> TaskDefinition:
    try:
        return find_task(name)
    except KeyError:
        from importlib.metadata import entry_points

        known = [entry.name for entry in entry_points(group="tui_trainer.tasks")]
        raise ConfigurationError(f"there is no task {name!r}", near_miss(name, known)) from None


def describe_training(host: Surroundings, training: Training, threads: int) -> None:
    """Tell viewers what has been built."""
    host.gate.steps_per_epoch = training.steps_per_epoch
    host.recorder.describe(
        device=device_of(training.model, threads),
        total_steps=training.total_steps,
        steps_per_epoch=training.steps_per_epoch,
        items_per_step=training.items_per_step,
        item_unit=training.item_unit,
        facts=dict(training.facts),
    )


def _between_steps(host: Surroundings, training: Training) -> tuple[Saver, Evaluations]:
    def contents() -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
        return training.model.state_dict(), training.stateful

    saver = Saver(host.spec, host.recorder, contents)
    evaluations = Evaluations(training.evaluations, host.recorder, saver.validated)
    for one in (evaluations, saver):  # the best of the weights are known before they are written
        host.gate.work_every(one.cadences, one.between_steps)
    host.save = saver.write
    return saver, evaluations


def _checkpoint_to_resume(spec: RunSpec) -> Checkpoint | None:
    if spec.resume is None:
        return None
    from tui_trainer.run.checkpoints import load

    return load(spec.resume)


def _optimizers(training: Training) -> list[torch.optim.Optimizer]:
    import torch

    held = training.stateful.values()
    return [each for each in held if isinstance(each, torch.optim.Optimizer)]


def _resume(host: Surroundings, checkpoint: Checkpoint, training: Training) -> None:
    from tui_trainer.run.checkpoints import restore
    from tui_trainer.run.randomness import restore_random_state

    restore(checkpoint, training.model, training.stateful)
    restore_random_state(checkpoint.random)
    host.recorder.status(step=checkpoint.step)
    host.recorder.notice("state", f"resumed from {checkpoint.path}", step=checkpoint.step)
