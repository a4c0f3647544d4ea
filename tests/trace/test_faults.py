"""A fault of ours never reaches the training; what is not a fault passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tui_trainer
from tests.trace.support import (
    EVERYTHING,
    CountingGate,
    KeepingRecorder,
    SmallGpt,
    close,
    gpt_loop,
    mlp,
    plain_loop,
)
from tui_trainer.probes import PROBES
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.gate import Gate, StopTraining
from tui_trainer.trace.phases import Phases
from tui_trainer.trace.probe import Probe, ProbeOptions, TableSpec
from tui_trainer.trace.probe_set import ProbeSet
from tui_trainer.trace.step_measurer import StepMeasurer
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
def test_probe_that_raises_is_switched_off_and_reported_once(moment):
    def train() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = SmallGpt()
        return gpt_loop(model, torch.optim.AdamW(model.parameters()), 6)

    bare = train()
    recorder = KeepingRecorder()
    with Tracer(recorder, CountingGate(), (failing(moment), *PROBES), EVERYTHING):
        traced = train()
    assert all(torch.equal(a, b) for a, b in zip(bare, traced, strict=True))
    (said,) = recorder.notices_of("fault")
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
    assert len(recorder.notices_of("fault")) == 1


def test_recorder_that_raises_does_not_reach_the_training():
    class Broken(KeepingRecorder):
        def record(self, record):
            raise OSError("gone")

    recorder, model = Broken(), mlp()
    losses: list[torch.Tensor] = []
    with Tracer(recorder, CountingGate(), PROBES, EVERYTHING):
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, losses=losses)
    assert len(losses) == 3
    assert len(recorder.notices_of("fault")) == 1


METHODS = [
    *((Phases, name) for name in ("before_forward", "before_backward", "before_step", "leave")),
    *((Phases, name) for name in ("boundary", "complete_step", "next_step")),
    *((StepMeasurer, name) for name in ("prepare", "before_backward", "after_update")),
    *((StepMeasurer, name) for name in ("reached_by_backward", "read_gradients", "positions_of")),
    *((ProbeSet, name) for name in ("before_forward", "before_update")),
]
"""What the tracer calls in the course of a step."""


def fail_at(monkeypatch, owner, name, recorder, steps):
    """Let `owner.name` raise once after each of these numbers of steps."""
    original, left = getattr(owner, name), set(steps)

    def raising(self, *args, **kwargs):
        if recorder.steps_made in left:
            left.remove(recorder.steps_made)
            raise ZeroDivisionError(f"in {name}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, raising)


class CountingRecorder(KeepingRecorder):
    """Knows how many steps the loop has made."""

    steps_made = 0


def counted_loop(recorder, steps):
    """A training loop whose clip and step may fail in us."""
    torch.manual_seed(3)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        plain_loop(model, optimizer, 1)
        recorder.steps_made += 1
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("owner", "name"), METHODS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_fault_ends_the_measurement_of_its_step(monkeypatch, owner, name):
    whole = CountingRecorder()
    with Tracer(whole, CountingGate(), PROBES, EVERYTHING):
        expected = counted_loop(whole, 7)
    recorder = CountingRecorder()
    fail_at(monkeypatch, owner, name, recorder, {3})
    with Tracer(recorder, Gate(), PROBES, EVERYTHING) as tracer:
        recorder.notices.clear()
        found = counted_loop(recorder, 7)
        assert tracer.step == 8
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    (fault,) = recorder.notices_of("fault")
    assert f"in {name}" in fault
    for table in ("grad_norm", "clip"):
        known, rows = whole.rows(table), recorder.rows(table)
        assert rows.keys() >= {1, 2, 3, 5, 6, 7}
        for step in (1, 2, 3, 5, 6, 7):
            close(list(rows[step].values()), list(known[step].values()))
    losses = recorder.rows("step")
    assert all(losses[n]["loss"] == whole.rows("step")[n]["loss"] for n in (1, 2, 3, 5, 6, 7))


def test_faults_in_step_after_step_switch_the_tracer_off(monkeypatch):
    recorder = CountingRecorder()
    fail_at(monkeypatch, StepMeasurer, "after_update", recorder, {1, 2, 3, 4, 5})
    with Tracer(recorder, CountingGate(), PROBES, EVERYTHING) as tracer:
        counted_loop(recorder, 6)
        assert tracer.training_thread == 0
    first, second = recorder.notices_of("fault")
    assert "step 2 is not measured" in first
    assert "switched off" in second
    assert [record.step for record in recorder.records] == [1]


def test_faults_now_and_then_do_not_switch_the_tracer_off(monkeypatch):
    recorder = CountingRecorder()
    fail_at(monkeypatch, StepMeasurer, "after_update", recorder, {1, 2, 4, 5, 7, 8})
    with Tracer(recorder, CountingGate(), PROBES, EVERYTHING):
        counted_loop(recorder, 10)
    assert [record.step for record in recorder.records] == [1, 4, 7, 10]


def test_readings_that_cannot_be_transferred_switch_their_probe_off():
    class Refusing(torch.Tensor):
        """As a tensor that is spread over several processes."""

        def item(self):
            raise NotImplementedError("no item")

    class Strange(Probe):
        name = "strange"

        def after_update(self):
            return [torch.tensor(1.0).as_subclass(Refusing)]

    recorder, model = KeepingRecorder(), mlp()
    with Tracer(recorder, CountingGate(), (Strange, *PROBES), EVERYTHING):
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    (fault,) = recorder.notices_of("fault")
    assert "probe strange is switched off" in fault
    assert len(recorder.rows("grad_norm")) == 4


def test_nothing_lists_all_objects_of_the_process():
    """While `gc.get_objects()` runs, a tuple that another thread is just making has two owners, and
    that thread gets a SystemError."""
    package = Path(tui_trainer.__file__).parent
    assert not [p for p in package.rglob("*.py") if "get_objects" in p.read_text("utf-8")]


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
    with Tracer(KeepingRecorder(), gate, PROBES, ProbeOptions()):
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
        assert torch.is_grad_enabled()
    assert found == [True, True]
