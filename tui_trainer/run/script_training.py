"""Training with somebody's unmodified script, traced from the moment it has imported torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.run.devices import device_of, no_core_left, with_torch
from tui_trainer.run.importing import around_torch_import
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.saving import Saver
from tui_trainer.run.script import load_module, load_script
from tui_trainer.run.surroundings import Surroundings, make_tracer
from tui_trainer.tracing.gate import StopTraining

if TYPE_CHECKING:
    import torch

    from tui_trainer.run.checkpoints import Stateful
    from tui_trainer.tracing.tracer import Tracer


def run_script(host: Surroundings) -> Outcome:
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


def _trace_script(host: Surroundings, traced: list[Tracer]) -> None:
    """Right after the script's own import of torch. A fault of ours must not reach it."""
    try:
        tracer = make_tracer(host)
        tracer.attach()
        traced.append(tracer)
        host.waiting_for("the script's first step")
        host.recorder.describe(versions=with_torch(host.recorder.info.versions))
        saver = Saver(host.spec, host.recorder, lambda: _contents_of_script(tracer))
        host.save = saver.write
        host.gate.work_every(saver.cadences, saver.between_steps)
        host.recorder.describe_along = _Where(host, tracer).describe
    except Exception as fault:
        host.recorder.fault("tracing the script", fault)


class _Where:
    """Where the script trains, as soon as its model is known."""

    def __init__(self, host: Surroundings, tracer: Tracer) -> None:
        self._host = host
        self._tracer = tracer
        self._said = False

    def describe(self) -> dict[str, Any]:
        """Fields of the `RunInfo`."""
        torch = sys.modules["torch"]
        threads = torch.get_num_threads()
        devices = (device_of(model, threads) for model in self._tracer.roots)
        device = next(devices, None)
        crowded = no_core_left(threads)
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
    for meter in tracer.registry.meters:
        optimizer = tracer.registry.optimizer_of(meter)
        if optimizer is not None:
            stateful[meter.subject.name] = optimizer
    return weights, stateful
