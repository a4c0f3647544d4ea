"""Trainings that are changed at chosen steps, on the calling thread."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tui_trainer.config.live_settings import parse_changes
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.training import resolve
from tui_trainer.probes import PROBES
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import Poll
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.checkpoints import load_checkpoint
from tui_trainer.run.environment import initial_info
from tui_trainer.run.task_training import (
    editable,
    enable_edits_and_travel,
    restore_checkpoint,
    schedule_between_steps,
    train_loop,
)
from tui_trainer.settings.edits import LiveEdits, SettingEdit
from tui_trainer.tasks.definition import Training, build, find_task
from tui_trainer.trace.gate import Gate, Refusal, StopTraining
from tui_trainer.trace.random_state import random_state
from tui_trainer.trace.tracer import Tracer
from tui_trainer.travel.time_travel import TimeTravel

TINY = {
    "gpt": {"layers": 1, "heads": 2, "width": 16, "block_size": 8, "batch_size": 4,
            "warmup_steps": 3, "eval_batches": 1, "sample_length": 1, "threads": 1,
            "device": "cpu", "dropout": 0.1},
    "vit": {"layers": 1, "heads": 2, "width": 16, "batch_size": 4, "warmup_steps": 3,
            "eval_batches": 1, "threads": 1, "device": "cpu", "dropout": 0.1},
}  # fmt: skip


def tiny(task: str = "gpt", **changes: object) -> Training:
    definition = find_task(task)
    preset = next(iter(definition.presets))
    return build(definition, resolve(definition, preset, {**TINY[task], "steps": 12, **changes}))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(some: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return some.keys() == other.keys() and all(torch.equal(some[n], other[n]) for n in some)


def until(holds: Callable[[], object]) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Edited:
    """A traced loop whose settings are changed after the steps of `at`: by texts of changes, by
    `undo`, or by a function that is given this object."""

    def __init__(self, loop: Callable[[], None], at: Mapping[int, Any], training=None) -> None:
        spec = RunSpec(name="r", directory=str(Path.cwd()), task="gpt")
        self.recorder = Recorder(initial_info(spec))
        self.gate = Gate()
        self.tracer = Tracer(self.recorder, self.gate, PROBES)
        self.edits = LiveEdits(self.tracer, self.gate, self.recorder)
        if training is not None:
            self.edits.task = editable(training)
        self.listed = {}
        self.answers: list[str] = []
        self.gate.hooks.fault = self.recorder.fault

        def change(step: int) -> None:
            self.listed[step] = {s.name: s.value for s in self.edits.settings().settings}
            match at.get(step):
                case None:
                    pass
                case str() as text:
                    self.apply(text)
                case act:
                    act(self)

        self.gate.after_step.append(change)
        try:
            with self.tracer:
                loop()
        finally:
            self.recorder.close(60)

    def apply(self, text: str) -> None:
        changes = None if text == "undo" else parse_changes(text.split())
        self.answers.append(self.edits.apply(SettingEdit(0, changes, "you")))

    @property
    def notices(self) -> list[str]:
        events = self.recorder.update_for(Poll()).events
        return [e.text for e in events if isinstance(e, Notice) and e.kind in ("edit", "fault")]


class Run:
    """A task that trains on a thread of its own, controlled from the test's."""

    def __init__(self, training: Training, folder: Path, memory: int = 1 << 30, every: int = 1):
        spec = RunSpec(name="r", directory=str(folder), task="gpt")
        self.training, self.spec = training, spec
        self.recorder = Recorder(initial_info(spec))
        self.gate = Gate(paused=True)
        self.gate.hooks.fault = self.recorder.fault
        self.tracer = Tracer(self.recorder, self.gate, PROBES)
        self.edits = LiveEdits(self.tracer, self.gate, self.recorder)
        self.travel = TimeTravel(self.tracer, self.gate, self.recorder, self.edits, memory)
        self.travel.every = every
        enable_edits_and_travel(self, training)
        self.saver = schedule_between_steps(self, training)[0]
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._train)

    def resume(self, folder: Path) -> None:
        """Continue from the newest checkpoint of the run in `folder`, as after a kill."""
        checkpoint = load_checkpoint(folder)
        self.gate.continue_from(checkpoint.step)
        self.tracer.step = checkpoint.step + 1
        self.tracer.register(self.training.model, [self.training.stateful["optimizer"]])
        self.gate.due_after(self.travel._after_step, checkpoint.step + 1)
        restore_checkpoint(self, checkpoint, self.training)

    def save_with(self, saver: object) -> None:
        pass

    def _train(self) -> None:
        try:
            with self.tracer:
                train_loop(self, self.training)
        except StopTraining:
            pass
        except BaseException as failure:
            self.failure = failure
        finally:
            self.gate.end()

    def __enter__(self) -> Run:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Refusal):
            self.gate.stop()
        self._thread.join(240)
        self.recorder.close(60)
        if self.failure is not None:
            raise self.failure

    def at(self, step: int) -> dict[str, object]:
        """Wait until it is paused at the end of a step; everything that its state consists of."""
        deadline = time.monotonic() + 240
        gate = self.gate
        while not (gate.mode == "paused" and (gate.completed, gate.phase) == (step, "step")):
            assert self._thread.is_alive(), (self.failure, self.log)
            assert time.monotonic() < deadline, (gate.mode, gate.boundary, gate.phase, self.log)
            time.sleep(0.002)
        return self.gate.call_soon(self._state).result(240)

    def _state(self) -> dict[str, object]:
        training = self.training
        states = {name: part.state_dict() for name, part in training.stateful.items()}
        state = {
            "weights": weights(training.model),
            "states": states,
            "random": random_state(),
            "edits": self.edits.state_dict(),
        }
        return copy.deepcopy(state)

    def to(self, step: int) -> dict[str, object]:
        self.gate.run_until(step)
        return self.at(step)

    def phase(self) -> None:
        """Go to the next phase boundary."""
        before = self.gate.boundary
        self.gate.step_phase()
        until(lambda: self.gate.boundary != before and self.gate.mode == "paused")

    def back(self, step: int | None = None) -> dict[str, object]:
        wanted = self.gate.completed - 1 if step is None else step
        self.travel.back(step)
        return self.at(wanted)

    def change(self, text: str) -> None:
        self.edits.change(parse_changes(text.split()))

    @property
    def losses(self) -> list[float]:
        self.recorder.flush(60)
        table = self.recorder.read(lambda history: history.table(schema.STEP))
        steps, values = table.tail(1000)
        assert steps.tolist() == list(range(1, len(steps) + 1))
        return values[:, 0].tolist()

    @property
    def log(self) -> list[str]:
        events = self.recorder.update_for(Poll()).events
        return [event.text for event in events if isinstance(event, Notice)]


def same(a: object, b: object) -> bool:
    """Whether two states are equal to the last bit."""
    match a:
        case torch.Tensor():
            return isinstance(b, torch.Tensor) and torch.equal(a, b)
        case np.ndarray():
            return np.array_equal(a, b)
        case dict():
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        case list() | tuple():
            return len(a) == len(b) and all(map(same, a, b))
        case _:
            return a == b
