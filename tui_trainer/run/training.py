"""Training a task from its start or from a checkpoint, evaluated and saved between its steps."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from tui_trainer.config.errors import ConfigurationError, near_miss
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.training import from_flat
from tui_trainer.protocol.schema import VALIDATION, Column
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.environment import busy_cores_warning, device_info, with_torch_versions
from tui_trainer.run.import_hook import around_torch_import
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.script import load_module, load_script
from tui_trainer.tasks.definition import Evaluation, TaskDefinition, Training, build, find_task
from tui_trainer.trace.gate import Gate, StopTraining

if TYPE_CHECKING:
    import torch

    from tui_trainer.run.checkpoints import Checkpoint, Stateful
    from tui_trainer.trace.tracer import Tracer


# ---- evaluating
# Running a task's evaluations on their cadence, between steps, on the training thread.


_BETTER = {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}


class Evaluations:
    """Those that are due at one step make one row of table `validation`."""

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        recorder: Recorder,
        on_loss: Callable[[int, float], None],
    ) -> None:
        self._evaluations = evaluations
        self._recorder = recorder
        self._on_loss = on_loss
        self._tables: dict[tuple[str, ...], int] = {}
        self._last: dict[str, int] = {}

    def at_start(self, step: int) -> None:
        """Before the first step."""
        self._run([one for one in self._evaluations if one.at_start], step)

    @property
    def cadences(self) -> tuple[int, ...]:
        """Multiples of which steps end with `between_steps`."""
        return tuple(one.every for one in self._evaluations)

    def between_steps(self, step: int) -> None:
        """On the cadence of each."""
        self._run([one for one in self._evaluations if one.every and step % one.every == 0], step)

    def at_end(self, step: int) -> None:
        """Those that have not seen the weights as they are now."""
        self._run([one for one in self._evaluations if self._last.get(one.name) != step], step)

    def _run(self, due: list[Evaluation], step: int) -> None:
        if not due:
            return
        metrics: dict[str, float] = {}
        with self._recorder.excluded():
            for evaluation in due:
                self._last[evaluation.name] = step
                self._recorder.set_status(waiting_for=f"evaluating: {evaluation.name}")
                began = time.perf_counter()
                try:
                    found, artifacts = evaluation.run()
                except Exception as fault:
                    self._recorder.fault(f"evaluation {evaluation.name}", fault)
                    continue
                metrics.update(found)
                for artifact in artifacts:
                    self._recorder.artifact(msgspec.structs.replace(artifact, step=step))
                self._say(evaluation.name, found, step, time.perf_counter() - began)
        self._recorder.set_status(waiting_for="")
        if metrics:
            self._record(metrics, step)

    def _record(self, metrics: Mapping[str, float], step: int) -> None:
        names = tuple(metrics)
        if names not in self._tables:
            columns = tuple(Column(name, "", _BETTER.get(name, "")) for name in names)
            self._tables[names] = self._recorder.new_table(VALIDATION, columns, every=0)
        values = np.array([metrics[name] for name in names], np.float32)
        self._recorder.row(self._tables[names], step, values)
        if "loss" in metrics:
            self._on_loss(step, metrics["loss"])

    def _say(self, name: str, metrics: Mapping[str, float], step: int, took_s: float) -> None:
        said = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        text = f"{name}: {said}" if said else name
        self._recorder.notice("evaluation", f"{text} ({took_s:.2g} s)", step=step)


# ---- saving
# When checkpoints are written, and of what.


Contents = Callable[[], "tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]"]
"""Weights, and what else has a state, as they are now."""


class CheckpointSaver:
    """Writes checkpoints of one run. Every call is made on the training thread, between steps.

    A checkpoint that cannot be written is said and never stops the training.
    """

    def __init__(self, spec: RunSpec, recorder: Recorder, contents: Contents) -> None:
        from tui_trainer.run.checkpoints import Checkpoints

        self._spec = spec
        self._recorder = recorder
        self._contents = contents
        self._checkpoints = Checkpoints(spec.directory, spec.keep_checkpoints)
        self._written: tuple[int, Path] | None = None
        """The step and the directory of the last."""

    @property
    def cadences(self) -> tuple[int, ...]:
        """Multiples of which steps end with `between_steps`."""
        return (self._spec.checkpoint_every or 0,)

    def between_steps(self, step: int) -> None:
        """On the cadence asked for."""
        self.write(step)

    def validated(self, step: int, loss: float) -> None:
        """Keep the weights with the lowest validation loss; a step of training comes before it."""
        if step > 0 and self._checkpoints.improves(loss) and self.write(step):
            try:
                self._checkpoints.mark_best(step, loss)
            except OSError as fault:
                self._recorder.fault("checkpoint", fault)

    def write(self, step: int, asked: bool = False) -> bool:
        """Write one now, unless this step's was written; whether it is there. `asked`: somebody
        waits for the answer, also where there is nothing left to do."""
        if self._written is not None and self._written[0] == step and self._written[1].is_dir():
            if asked:
                text = f"checkpoint {self._written[1].name} is there already"
                self._recorder.notice("checkpoint", text, step=step)
            return True
        try:
            with self._recorder.excluded():
                weights, stateful = self._contents()
                facts = {
                    "task": self._spec.task,
                    "run": self._spec.name,
                    "configuration": self._spec.configuration,
                }
                path = self._checkpoints.write(step, weights, stateful, facts)
        except Exception as fault:
            text = f"no checkpoint of step {step}: {type(fault).__name__}: {fault}"
            self._recorder.notice("checkpoint", text, "error", step)
            return False
        self._written = step, path
        self._recorder.notice("checkpoint", f"checkpoint {path.name}", step=step)
        return True


# ---- surroundings
# What training happens in: what a task or a script is given of its run, and the tracer over it.


class RunContext(Protocol):
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


def make_tracer(host: RunContext, first_step: int = 1) -> Tracer:
    """The tracer with every probe, not attached yet. Imports torch."""
    from tui_trainer.probes import PROBES
    from tui_trainer.trace.probe import Options
    from tui_trainer.trace.tracer import Tracer

    options = Options(budget=host.spec.budget, attention_pattern=host.spec.attention_pattern)
    tracer = Tracer(host.recorder, host.gate, PROBES, options)
    tracer.step = first_step
    host.recorder.on_tick = tracer.flush_idle
    return tracer


def train_task(host: RunContext) -> Outcome:
    """Build the task and train it to its end. Every exception passes but `StopTraining`."""
    definition = _definition(host.spec.task)
    config = from_flat(definition.config, host.spec.configuration)
    host.waiting_for("importing torch")
    with nothing_collected():
        import torch

    host.recorder.describe(versions=with_torch_versions(host.recorder.info.versions))
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
            tracer.register(training.model, _optimizers(training))
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


def describe_training(host: RunContext, training: Training, threads: int) -> None:
    """Tell viewers what has been built."""
    host.gate.steps_per_epoch = training.steps_per_epoch
    host.recorder.describe(
        device=device_info(training.model, threads),
        total_steps=training.total_steps,
        steps_per_epoch=training.steps_per_epoch,
        items_per_step=training.items_per_step,
        item_unit=training.item_unit,
        facts=dict(training.facts),
    )


def _between_steps(host: RunContext, training: Training) -> tuple[CheckpointSaver, Evaluations]:
    def contents() -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
        return training.model.state_dict(), training.stateful

    saver = CheckpointSaver(host.spec, host.recorder, contents)
    evaluations = Evaluations(training.evaluations, host.recorder, saver.validated)
    for one in (evaluations, saver):  # the best of the weights are known before they are written
        host.gate.call_every(one.cadences, one.between_steps)
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


def _resume(host: RunContext, checkpoint: Checkpoint, training: Training) -> None:
    from tui_trainer.run.checkpoints import restore, restore_random_state

    restore(checkpoint, training.model, training.stateful)
    restore_random_state(checkpoint.random)
    host.recorder.set_status(step=checkpoint.step)
    host.recorder.notice("state", f"resumed from {checkpoint.path}", step=checkpoint.step)


# ---- script_training
# Training with somebody's unmodified script, traced from the moment it has imported torch.


def run_script(host: RunContext) -> Outcome:
    """Run the script as python would, traced from the moment torch is imported. Every exception
    of the script passes but `StopTraining`."""
    spec = host.spec
    if spec.resume is not None:
        raise ConfigurationError(
            "a script goes on by its own means",
            "give the script its own option for it; a run's checkpoints hold weights and "
            "optimizers as safetensors",
        )
    load = load_module if spec.module else load_script
    program = load(spec.script or "", spec.arguments)
    traced: list[Tracer] = []
    around_torch_import(
        lambda: host.waiting_for("importing torch"), lambda: _trace_script(host, traced)
    )
    host.waiting_for("the script's first step")
    host.script_runs = True
    try:
        program.run()
    except StopTraining:  # the gate has left a checkpoint where one was asked for
        return Outcome("stopped", "stopped on request")
    finally:
        for tracer in traced:
            tracer.detach()
    if host.gate.mode in ("stopping", "ended"):
        return Outcome("stopped", "stopped on request")
    return Outcome("finished")


def _trace_script(host: RunContext, traced: list[Tracer]) -> None:
    """Right after the script's own import of torch. A fault of ours must not reach it."""
    try:
        tracer = make_tracer(host)
        tracer.attach()
        traced.append(tracer)
        host.waiting_for("the script's first step")
        host.recorder.describe(versions=with_torch_versions(host.recorder.info.versions))
        saver = CheckpointSaver(host.spec, host.recorder, lambda: _contents_of_script(tracer))
        host.save = saver.write
        host.gate.call_every(saver.cadences, saver.between_steps)
        host.recorder.extra_info = _Where(host, tracer).describe
    except Exception as fault:
        host.recorder.fault("tracing the script", fault)


class _Where:
    """Where the script trains, as soon as its model is known."""

    def __init__(self, host: RunContext, tracer: Tracer) -> None:
        self._host = host
        self._tracer = tracer
        self._said = False

    def describe(self) -> dict[str, Any]:
        """Fields of the `RunInfo`."""
        torch = sys.modules["torch"]
        threads = torch.get_num_threads()
        devices = (device_info(model, threads) for model in self._tracer.roots)
        device = next(devices, None)
        crowded = busy_cores_warning(threads)
        if device is not None and device.kind == "cpu" and crowded and not self._said:
            self._said = True
            self._host.recorder.notice("threads", crowded)
        return {"device": device}


def _contents_of_script(
    tracer: Tracer,
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
    """Weights of the models that the script calls, and its optimizers: what can be seen of it."""
    weights: dict[str, torch.Tensor] = {}
    for number, model in enumerate(tracer.roots):
        prefix = "" if number == 0 else f"{type(model).__name__}#{number + 1}."
        weights.update({f"{prefix}{name}": held for name, held in model.state_dict().items()})
    stateful: dict[str, Stateful] = {}
    for measurer in tracer.registry.measurers:
        optimizer = tracer.registry.optimizer_of(measurer)
        if optimizer is not None:
            stateful[measurer.tracked.name] = optimizer
    return weights, stateful
