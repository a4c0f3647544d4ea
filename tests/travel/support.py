"""Trainings that are changed at chosen steps, on the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tui_trainer.config.live_settings import parse_changes
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.training import resolve
from tui_trainer.probes import PROBES
from tui_trainer.protocol.messages import Notice, Poll
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.environment import initial_info
from tui_trainer.run.training import editable
from tui_trainer.tasks.definition import Training, build, find_task
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.tracer import Tracer
from tui_trainer.travel.edits import Entry, LiveEdits

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
        self.answers.append(self.edits.apply(Entry(0, changes, "you")))

    @property
    def notices(self) -> list[str]:
        events = self.recorder.update_for(Poll()).events
        return [e.text for e in events if isinstance(e, Notice) and e.kind in ("edit", "fault")]
