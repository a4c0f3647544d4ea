"""A fault of ours never reaches the training; what is not a fault passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.trace.support import (
    EVERYTHING,
    CountingGate,
    KeepingRecorder,
    SmallGpt,
    gpt_loop,
    mlp,
    plain_loop,
)
from tui_trainer.probes import PROBES
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.gate import Gate, StopTraining
from tui_trainer.trace.probe import Options, Probe, TableSpec
from tui_trainer.trace.tracer import Tracer

MOMENTS = (
    "__init__",
    "before_forward",
    "after_forward",
    "gradients",
    "before_update",
    "after_update",
    "rows",
)


def failing(moment: str) -> type[Probe]:
    def fail(self: Probe, *args: object) -> Sequence[torch.Tensor]:
        raise ZeroDivisionError(f"in {moment}")

    class Failing(Probe):
        name = "failing"

    def __init__(self, tracked, options):
        Probe.__init__(self, tracked, options)
        self.tables = (TableSpec("failing", (Column("x"),)),)

    Failing.__init__ = __init__
    setattr(Failing, moment, fail)
    return Failing


@pytest.mark.parametrize("moment", MOMENTS)
def test_probe_that_raises_is_switched_off_and_said_once(moment):
    def train() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = SmallGpt()
        return gpt_loop(model, torch.optim.AdamW(model.parameters()), 6)

    bare = train()
    recorder = KeepingRecorder()
    with Tracer(recorder, CountingGate(), (failing(moment), *PROBES), EVERYTHING):
        traced = train()
    assert all(torch.equal(a, b) for a, b in zip(bare, traced, strict=True))
    (said,) = recorder.said("fault")
    assert "failing" in said
    assert f"in {moment}" in said
    assert len(recorder.rows("grad_norm")) == 6


def test_probe_that_gives_nonsense_does_not_reach_the_training():
    class Nonsense(Probe):
        name = "nonsense"

        def after_update(self):
            return ["no tensor"]

    recorder = KeepingRecorder()
    model = mlp()
    with Tracer(recorder, CountingGate(), (Nonsense, *PROBES), EVERYTHING):
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert len(recorder.said("fault")) == 1


def test_recorder_that_raises_does_not_reach_the_training():
    class Broken(KeepingRecorder):
        def record(self, record):
            raise OSError("gone")

    recorder, model = Broken(), mlp()
    losses: list[torch.Tensor] = []
    with Tracer(recorder, CountingGate(), PROBES, EVERYTHING):
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, losses=losses)
    assert len(losses) == 3
    assert len(recorder.said("fault")) == 1


def test_stop_reaches_the_script_as_an_interrupt_after_the_step():
    recorder, gate, model = KeepingRecorder(), Gate(), mlp()
    gate.after_step.append(lambda step: gate.stop() if step == 3 else None)
    losses: list[torch.Tensor] = []
    with (
        Tracer(recorder, gate, PROBES, EVERYTHING),
        pytest.raises(KeyboardInterrupt) as stopped,
    ):
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 100, losses=losses)
    assert isinstance(stopped.value, StopTraining)
    assert [record.step for record in recorder.records] == [1, 2, 3]
    assert torch.is_grad_enabled()


def test_gradients_are_enabled_for_work_at_the_gate_and_afterwards():
    gate, model = Gate(), mlp()
    found = []
    gate.after_step.append(lambda step: found.append(torch.is_grad_enabled()))
    with Tracer(KeepingRecorder(), gate, PROBES, Options()):
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
        assert torch.is_grad_enabled()
    assert found == [True, True]
