"""The two kinds of things that are trained: a task, and somebody's script."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tui_trainer.config.errors import ConfigurationError, near_miss
from tui_trainer.config.resolve import from_flat
from tui_trainer.config.spec import RunSpec
from tui_trainer.protocol.describe import DeviceInfo
from tui_trainer.run.evaluating import Evaluations
from tui_trainer.run.importing import around_torch_import
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.saving import Saver
from tui_trainer.run.script import load_module, load_script
from tui_trainer.tasks.definition import TaskDefinition, Training, build, find_task
from tui_trainer.tracing.gate import StopTraining

if TYPE_CHECKING:
    import torch

    from tui_trainer.run.checkpoints import Checkpoint, Stateful
    from tui_trainer.run.host import Host
    from tui_trainer.tracing.tracer import Tracer


def make_tracer(host: Host, first_step: int = 1) -> Tracer:
    """The tracer with every probe, not attached yet. Imports torch."""
    from tui_trainer.probes import PROBES
    from tui_trainer.tracing.probe import Options
    from tui_trainer.tracing.tracer import Tracer

    options = Options(budget=host.spec.budget, attention_pattern=host.spec.attention_pattern)
    tracer = Tracer(host.recorder, host.gate, PROBES, options)
    tracer.step = first_step
    return tracer


# ---------------------------------------------------------------- tasks


def train_task(host: Host) -> Outcome:
    """Build the task and train it to its end. Every exception passes but `StopTraining`."""
    definition = _definition(host.spec.task)
    config = from_flat(definition.config, host.spec.configuration)
    host.waiting_for("importing torch")
    import torch

    host.recorder.describe(versions=_versions(host))
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
            _resume(host, checkpoint, training)
        host.waiting_for("")
        outcome = Outcome("finished")
        try:
            training.loop()
        except StopTraining as stopped:
            outcome = Outcome("stopped", "stopped on request")
            if stopped.checkpoint:
                saver.write(host.gate.completed)
    finally:
        tracer.detach()
    if outcome.state == "finished" and host.gate.completed:
        evaluations.at_end(host.gate.completed)
        saver.write(host.gate.completed)
    return outcome


def _definition(name: str) -> TaskDefinition:
    try:
        return find_task(name)
    except KeyError:
        from importlib.metadata import entry_points

        known = [entry.name for entry in entry_points(group="tui_trainer.tasks")]
        raise ConfigurationError(f"there is no task {name!r}", near_miss(name, known)) from None


def describe_training(host: Host, training: Training, threads: int) -> None:
    """Tell viewers what has been built."""
    host.gate.steps_per_epoch = training.steps_per_epoch
    host.recorder.describe(
        device=_device(training.model, threads),
        total_steps=training.total_steps,
        steps_per_epoch=training.steps_per_epoch,
        items_per_step=training.items_per_step,
        item_unit=training.item_unit,
        facts=dict(training.facts),
    )


def _between_steps(host: Host, training: Training) -> tuple[Saver, Evaluations]:
    def contents() -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
        return training.model.state_dict(), training.stateful

    saver = Saver(host.spec, host.recorder, contents)
    evaluations = Evaluations(training.evaluations, host.recorder, saver.validated)
    host.gate.between_steps += [evaluations.between_steps, saver.between_steps]
    host.save = saver.write
    return saver, evaluations


def _checkpoint_to_resume(spec: RunSpec) -> Checkpoint | None:
    if spec.resume is None:
        return None
    from tui_trainer.run.checkpoints import load

    return load(spec.resume)


def _resume(host: Host, checkpoint: Checkpoint, training: Training) -> None:
    from tui_trainer.run.checkpoints import restore
    from tui_trainer.run.randomness import restore_random_state

    restore(checkpoint, training.model, training.stateful)
    restore_random_state(checkpoint.random)
    host.recorder.status(step=checkpoint.step)
    host.recorder.notice("state", f"resumed from {checkpoint.path}", step=checkpoint.step)


def _versions(host: Host) -> dict[str, str]:
    import torch

    versions = {**host.recorder.info.versions, "torch": str(torch.__version__)}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _device(model: torch.nn.Module, threads: int) -> DeviceInfo | None:
    import torch

    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    device = parameter.device
    if device.type != "cuda":
        return DeviceInfo(device.type, _processor(device.type), threads=threads)
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo("cuda", properties.name, properties.total_memory, threads)


def _processor(kind: str) -> str:
    import platform

    if kind != "cpu":
        return kind
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- scripts


def run_script(host: Host) -> Outcome:
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
    except StopTraining as stopped:
        if stopped.checkpoint and host.save is not None:
            host.save(host.gate.completed)
        return Outcome("stopped", "stopped on request")
    finally:
        for tracer in traced:
            tracer.detach()
    if host.gate.mode in ("stopping", "ended"):
        return Outcome("stopped", "stopped on request")
    return Outcome("finished")


def _trace_script(host: Host, traced: list[Tracer]) -> None:
    """Right after the script's own import of torch. A fault of ours must not reach it."""
    try:
        tracer = make_tracer(host)
        tracer.attach()
        traced.append(tracer)
        host.waiting_for("the script's first step")
        host.recorder.describe(versions=_versions(host))
        saver = Saver(host.spec, host.recorder, lambda: _contents_of_script(tracer))
        host.save = saver.write
        host.gate.between_steps.append(saver.between_steps)
        host.recorder.describe_along = lambda: _device_of_script(tracer)
    except Exception as fault:
        host.recorder.fault("tracing the script", fault)


def _device_of_script(tracer: Tracer) -> dict[str, Any]:
    """Where the script trains, as soon as its model is known."""
    torch = sys.modules["torch"]
    devices = (_device(model, torch.get_num_threads()) for model in tracer.roots)
    return {"device": next(devices, None)}


def _contents_of_script(
    tracer: Tracer,
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
    """Weights of the models that the script calls, and its optimizers: what can be seen of it."""
    weights: dict[str, torch.Tensor] = {}
    for number, model in enumerate(tracer.roots):
        prefix = "" if number == 0 else f"{type(model).__name__}#{number + 1}."
        weights.update({f"{prefix}{name}": held for name, held in model.state_dict().items()})
    stateful: dict[str, Stateful] = {}
    for meter in tracer.registry.meters:
        optimizer = tracer.registry.optimizer_of(meter)
        if optimizer is not None:
            stateful[meter.subject.name] = optimizer
    return weights, stateful
