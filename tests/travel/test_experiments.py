"""Experiments measure what the training would do, and leave it as it was to the last bit."""

from __future__ import annotations

import copy
import ctypes
import math
import threading
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.travel.support import Run, same, tiny
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.protocol.formatting import bytes_, cost_text
from tui_trainer.protocol.travel import (
    ExperimentCost,
    FindLearningRate,
    MeasureLandscape,
    WhatIf,
)
from tui_trainer.trace.gate import Refusal
from tui_trainer.trace.random_state import restore_random_state
from tui_trainer.travel import memory
from tui_trainer.travel.experiments import Experiments
from tui_trainer.travel.snapshots import (
    SnapshotStore,
    TrainingParts,
    TrainingSnapshot,
    TrainingState,
)
from tui_trainer.travel.time_travel import TimeTravel


def ask(run, experiment):
    return run.travel.experiment(experiment, lambda result: result).result(240)


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16", "optimizer": "sgd"}])
def test_what_if_says_what_happens_then_and_changes_nothing(options, tmp_path):
    with Run(tiny(**options), tmp_path) as run:
        seen = run.to(4)
        answer = ask(run, WhatIf(parse_changes(["lr=0.05"]), 3))
        assert same(seen, run.at(4))
        ask(run, FindLearningRate(1e-5, 10.0, 5))
        ask(run, MeasureLandscape("random", 3, 0.1))
        ask(run, MeasureLandscape("gradient", 3))
        assert same(seen, run.at(4))
        run.to(7)
        present, changed = answer.curves
        assert present.x == (5.0, 6.0, 7.0)
        assert present.loss == pytest.approx(run.losses[4:7], rel=1e-5)
        run.back(4)
        run.to(7)
    with Run(tiny(**options), tmp_path, memory=0) as other:
        other.to(4)
        other.change("lr=0.05")
        other.to(7)
        assert changed.loss == pytest.approx(other.losses[4:7], rel=1e-5)
        assert changed.loss != pytest.approx(present.loss, rel=1e-5)
    assert not [line for line in run.log if "differs" in line or "Error" in line]


class ByHand:
    """A training without us, in the state of a step."""

    def __init__(self, seen, **options):
        self.training = tiny("vit", **options)
        self.seen = seen
        self.weights = list(self.training.model.parameters())
        self.optimizer = self.training.stateful["optimizer"]

    def begin(self):
        self.training.model.load_state_dict(self.seen["weights"])
        for name, part in self.training.stateful.items():
            part.load_state_dict(copy.deepcopy(self.seen["states"][name]))
        restore_random_state(self.seen["random"])
        self.training.model.train()
        return iter(self.training.stateful["batches"])

    def loss(self, batches):
        images, labels = next(batches)
        return torch.nn.functional.cross_entropy(self.training.model(images), labels)

    def losses(self, rates):
        found, batches = [], self.begin()
        for rate in rates:
            self.optimizer.zero_grad()
            loss = self.loss(batches)
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            found.append(float(loss.detach()))
        return found

    def gradients(self):
        loss = self.loss(self.begin())
        return torch.autograd.grad(loss, self.weights)

    @torch.no_grad()
    def loss_at(self, origin, direction, along):
        batches = self.begin()
        for parameter, start, way in zip(self.weights, origin, direction, strict=True):
            parameter.copy_(start + along * way)
        return float(self.loss(batches))


def test_rates_and_directions_have_the_losses_of_a_loop_by_hand(tmp_path):
    with Run(tiny("vit", clip="off"), tmp_path) as run:
        early = run.to(2)
        seen = run.to(5)
        found = ask(run, FindLearningRate(1e-4, 1e-1, 5)).curves[0]
        asked = (
            MeasureLandscape("gradient", 3, 0.5),
            MeasureLandscape("random", 3, 0.5),
            MeasureLandscape("snapshots", 4, 1.0, 2, 5),
        )
        gradient, random, between = (ask(run, each).curves[0] for each in asked)
        run.to(6)
        recorded, rate = run.losses[5], run.training.schedule.at(5)
    hand = ByHand(seen, clip="off")
    assert found.loss == pytest.approx(hand.losses(found.x), rel=1e-5)
    assert len(found.x) == 5
    here = [parameter.clone() for parameter in map(seen["weights"].get, names_of(hand))]
    before = [parameter.clone() for parameter in map(early["weights"].get, names_of(hand))]
    assert gradient.loss[1] == random.loss[1] == pytest.approx(recorded, rel=1e-5)
    assert between.loss[2] == pytest.approx(recorded, rel=1e-5), "where the next step begins"
    downhill = [-rate * each for each in hand.gradients()]
    assert gradient.loss[2] == pytest.approx(hand.loss_at(here, downhill, 0.5), rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(each.shape, generator=generator) for each in here]
    scaled = [d / d.norm() * w.norm() for d, w in zip(drawn, here, strict=True)]
    assert random.loss[2] == pytest.approx(hand.loss_at(here, scaled, 0.5), rel=1e-5)
    way = [b - a for a, b in zip(before, here, strict=True)]
    assert between.loss[3] == pytest.approx(hand.loss_at(before, way, 2.0), rel=1e-5)


def names_of(hand):
    return [name for name, _ in hand.training.model.named_parameters()]


def test_a_last_step_that_is_skipped_ends_the_search_for_a_rate():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def loop():
        for step in range(6):
            optimizer.zero_grad()
            (weight * weight).sum().backward()
            if step != 2:  # as a GradScaler does
                optimizer.step()

    task = types.SimpleNamespace(loop=loop, stateful={})
    parts = TrainingParts([], [optimizer])
    found = Experiments(task, None, parts, SnapshotStore(0))._losses(3, [0.1, 0.1, 0.1])
    assert found == pytest.approx([1, 0.8**2, 0.8**4])


def test_the_learning_rate_and_the_loss_along_directions(tmp_path):
    with Run(tiny("vit"), tmp_path) as run:
        run.to(2)
        seen = run.to(5)
        found = ask(run, FindLearningRate(1e-6, 1e3, 6)).curves[0]
        ratios = [b / a for a, b in zip(found.x, found.x[1:], strict=False)]
        assert ratios == pytest.approx([10 ** (9 / 5)] * len(ratios))
        assert all(map(math.isfinite, found.loss[:3]))
        along = ask(run, MeasureLandscape("gradient", 5, 1.0)).curves[0]
        assert along.x == (-1.0, -0.5, 0.0, 0.5, 1.0)
        assert along.loss[1] > along.loss[2] > along.loss[3], "against the gradient it falls"
        between = ask(run, MeasureLandscape("snapshots", 4, 1.0, 2, 5)).curves[0]
        assert between.x == pytest.approx((-1.0, 0.0, 1.0, 2.0))
        assert between.loss[2] == pytest.approx(along.loss[2], rel=1e-5)
        with pytest.raises(Refusal, match="there is no snapshot of step 9"):
            ask(run, MeasureLandscape("snapshots", 3, 1.0, 9, 5))
        with pytest.raises(Refusal, match="adamw has no momentum"):
            ask(run, WhatIf(parse_changes(["momentum=0.5"]), 2))
        assert same(seen, run.at(5))


def test_a_viewer_that_leaves_during_an_experiment_ends_it_and_not_the_training(tmp_path):
    training = tiny(steps=2000)
    with Run(training, tmp_path) as run:
        seen = run.to(3)
        for asked in (FindLearningRate(1e-9, 1e-8, 900), WhatIf(parse_changes(["lr=1e-5"]), 900)):
            begun, left, loop = threading.Event(), threading.Event(), training.loop
            training.loop = lambda begun=begun, left=left, loop=loop: (
                begun.set(), left.wait(240), loop()
            )  # fmt: skip
            answer = run.travel.experiment(asked, lambda result: result)
            assert begun.wait(240)
            training.loop = loop
            assert answer.cancel()
            left.set()
            assert same(seen, run.at(3))
        run.phase()
        with pytest.raises(Refusal, match="an experiment begins at the end of a step"):
            ask(run, FindLearningRate())
        run.to(5)


def test_what_an_experiment_takes_is_known_before(tmp_path):
    with Run(tiny(), tmp_path) as run:
        run.to(5)
        snapshot = run.travel.snapshots.before(5).state.nbytes
        costs = [
            run.gate.call_soon(lambda asked=asked: run.travel.cost(asked)).result(60)
            for asked in (
                WhatIf(parse_changes(["lr=1"]), 50),
                FindLearningRate(steps=3),
                MeasureLandscape(points=9),
            )
        ]
        assert [cost.steps for cost in costs] == [14, 3, 9], "the training has 12 steps"
        sizes = [each.nbytes for each in run.training.model.parameters()]
        along = snapshot + sum(sizes) + max(sizes)
        assert [cost.bytes for cost in costs] == [snapshot, snapshot, along]
        assert {(cost.device, cost.device_bytes) for cost in costs} == {("", 0)}
        assert all(cost.seconds > 0 and cost.free > 0 for cost in costs)
        assert not any(cost.large for cost in costs)
        timeline = run.gate.call_soon(run.travel.timeline).result(60)
        assert timeline.snapshot_bytes == snapshot
        assert timeline.step_s > 0
        run.travel._step_s = lambda: 40.0
        run.travel.snapshots.forget_after(2)
        with pytest.raises(Refusal, match="repeats 2 steps from step 2, which takes about 80 s"):
            run.travel.back(4)
        assert run.travel.back(4, confirmed=True).endswith(
            "repeating 2 steps from step 2, about 80 s"
        )
        run.at(4)
        text = run.travel.keep(10 * snapshot)
        assert text.endswith(f"{bytes_(snapshot, 0)} each: up to 10")


class Allocated(TorchDispatchMode):
    """The most bytes that malloc has held after an operation."""

    def __init__(self):
        super().__init__()
        self._mallinfo = ctypes.CDLL(None).mallinfo2
        self._mallinfo.restype = type(
            "mallinfo2", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in MALLINFO]}
        )
        self.before = self.most = self.held()

    def held(self):
        info = self._mallinfo()
        return info.uordblks + info.hblkhd

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.most = max(self.most, self.held())
        return result


MALLINFO = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd",
    "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc")
@pytest.mark.parametrize("direction", ["gradient", "random", "snapshots"])
def test_losses_along_a_direction_take_no_more_memory_than_was_said(direction):
    model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loop():
        optimizer.zero_grad()
        model(torch.ones(2, 300)).square().mean().backward()
        optimizer.step()

    parts, snapshots = TrainingParts([model], [optimizer]), SnapshotStore(1 << 30)
    for step in (1, 2):
        loop()
        snapshots.add(TrainingSnapshot(step, TrainingState.take(parts), None))
    optimizer.zero_grad()
    task = types.SimpleNamespace(loop=loop, stateful={}, model=model, total_steps=9)
    edits = types.SimpleNamespace(snapshot=dict, restore=list)
    travel, asked = travel_of(parts, task), MeasureLandscape(direction, 3, 1.0, 1, 2)
    said = travel.cost(asked).bytes
    with Allocated() as allocated:
        Experiments(task, edits, parts, snapshots).run(asked)
    assert said / 2 < allocated.most - allocated.before < 1.05 * said


def travel_of(parts, task=None):
    gate = types.SimpleNamespace(completed=3)
    travel = TimeTravel(None, gate, None, types.SimpleNamespace())
    travel.task, travel._parts, travel._step_s = task, lambda: parts, lambda: 0.1
    return travel


def test_copies_on_an_accelerator_are_counted_there_and_bounded(monkeypatch):
    model = torch.nn.Linear(1000, 1000, device="meta")
    frozen = torch.nn.Linear(1000, 1000, device="meta").requires_grad_(False)
    parts = TrainingParts([model, frozen], [torch.optim.SGD(model.parameters(), lr=0.1)])
    free = {"cpu": 10**9, "meta": None}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])
    size = 4 * 1001 * 1000
    task = travel_of(parts, types.SimpleNamespace(total_steps=100))
    script = travel_of(parts)
    found = task.cost(MeasureLandscape(points=9))
    assert (found.device, found.device_bytes, found.device_free) == ("meta", size, None)
    assert found.bytes == parts.nbytes() + 4 * 1000 * 1000
    assert task.cost(FindLearningRate()).device_bytes == 0
    found = script.cost(MeasureLandscape(points=9))
    assert (found.device_bytes, found.bytes) == (2 * size, 4 * 1000 * 1000)
    assert not found.large
    text = "9 evaluations in about 1 s, with 3.8 MB of memory and 7.6 MB on meta"
    assert cost_text(found) == text
    free["meta"] = 3 * size
    found = script.cost(MeasureLandscape(points=9))
    assert found.large
    assert found.possible
    free["meta"] = size
    with pytest.raises(Refusal, match=r"too little memory: 9 .* of which .* 3.8 MB on meta are"):
        memory.require_memory(script.cost(MeasureLandscape(points=9)))
    free["meta"], free["cpu"] = None, 10**6
    with pytest.raises(Refusal, match="too little memory"):
        memory.require_memory(task.cost(FindLearningRate()))
    with pytest.raises(Refusal, match=r"a copy of the present state takes 7.7 MB"):
        memory.require_room(parts)
    for asked in (WhatIf(()), FindLearningRate()):
        with pytest.raises(Refusal, match="the steps of a script cannot be made twice"):
            script.cost(asked)


def test_costs_are_large_beyond_a_minute_or_half_of_the_memory():
    assert ExperimentCost(100, 61.0, 1, 100).large
    assert ExperimentCost(100, None, 51, 100).large
    small = ExperimentCost(100, 3.2, 50 << 20, 100 << 20)
    assert not small.large
    assert cost_text(small) == "100 steps in about 4 s, with 50.0 MB of memory"
