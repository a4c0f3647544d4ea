"""The loss of a script along a direction equals a loop by hand, and nothing changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.inspector.test_inspector import Traced
from tests.inspector.test_rerun import Everything, fingerprint
from tests.travel.support import same
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.protocol.travel import MeasureLandscape
from tui_trainer.trace.gate import Refusal
from tui_trainer.travel.script_landscape import measure_landscape
from tui_trainer.travel.snapshots import (
    SnapshotStore,
    TrainingParts,
    TrainingSnapshot,
    TrainingState,
)

DIRECTIONS = ("gradient", "random", "snapshots")


class Tied(torch.nn.Module):
    """Parameters that are shared, frozen, of another group, or in no optimizer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.again = torch.nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.last = torch.nn.Linear(6, 3)
        self.unused = torch.nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(self.frozen(self.again(self.first(x)).tanh()))


def optimizer_of(model):
    groups = [{"params": model.last.parameters(), "lr": 0.3}]
    if isinstance(model, Tied):
        groups.append({"params": [model.first.weight, model.first.bias]})
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def measured(make, phases):
    """(phase → direction → the curve of step 3, losses of the steps, what is needed by hand)"""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model, snapshots = make(), SnapshotStore(1 << 20)
    optimizer = optimizer_of(model)
    parts = TrainingParts([model], [optimizer])
    found, losses, batches = {}, [], []

    def loop():
        for step in range(1, 4):
            batches.append((torch.randn(4, 6), torch.randint(0, 3, (4,))))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batches[-1][0]), batches[-1][1])
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            snapshots.add(TrainingSnapshot(step, TrainingState.take(parts), None))

    def look(inspector, phase, step):
        if step < 3 or phase not in phases:
            return
        before = fingerprint(model)
        results = {
            direction: measure_landscape(
                inspector.capture, [optimizer], snapshots,
                MeasureLandscape(direction, 4 if direction == "snapshots" else 3, 0.5, 1, 2),
                lambda: True,
            )
            for direction in DIRECTIONS
        }  # fmt: skip
        assert fingerprint(model) == before
        found[phase] = results

    traced = Traced(look)
    traced.inspector.capture.request()
    model.average = getattr(model, "average", torch.zeros(1))
    traced.run(loop)
    return found, losses, batches[-1], snapshots


def curve(result):
    return result.curves[0]


def test_losses_are_those_of_a_loop_by_hand():
    found, losses, (inputs, targets), snapshots = measured(Tied, ("backward",))
    results = found["backward"]
    assert curve(results["gradient"]).x == (-0.5, 0.0, 0.5)
    assert curve(results["gradient"]).loss[1] == losses[2], "the loss of the step itself"
    assert curve(results["random"]).loss[1] == losses[2]
    assert results["gradient"].text == "the loss is lowest at 0.5, on the batch of step 3"
    saved = {}
    for step in (1, 2):
        model = Tied()
        with torch.no_grad():
            for own, held in zip(
                TrainingParts([model], []).tensors(),
                snapshots.before(step).state.tensors,
                strict=True,
            ):
                own.copy_(held)
        saved[step] = model
    weights = [p for p in saved[2].parameters() if p.requires_grad]
    loss = F.cross_entropy(saved[2](inputs), targets)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    rates = {id(p): 0.3 for p in saved[2].last.parameters()}
    rates |= {id(saved[2].first.weight): 0.1, id(saved[2].first.bias): 0.1}
    downhill = [
        torch.zeros_like(p) if g is None else -rates.get(id(p), 0.0) * g
        for p, g in zip(weights, gradients, strict=True)
    ]
    assert len(set(rates.values())) == 2
    before = [p.detach().clone() for p in saved[1].parameters() if p.requires_grad]
    here = [p.detach().clone() for p in weights]
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(p.shape, generator=generator) for p in here]
    scaled = [d / d.norm() * p.norm() for d, p in zip(drawn, here, strict=True)]

    @torch.no_grad()
    def loss_at(origin, direction, along):
        for parameter, start, way in zip(weights, origin, direction, strict=True):
            parameter.copy_(start + along * way)
        return float(F.cross_entropy(saved[2](inputs), targets))

    between = [b - a for a, b in zip(before, here, strict=True)]
    for result, origin, direction in (
        ("gradient", here, downhill),
        ("random", here, scaled),
        ("snapshots", before, between),
    ):
        line = curve(results[result])
        by_hand = [loss_at(origin, direction, along) for along in line.x]
        assert line.loss == pytest.approx(by_hand, rel=1e-5), result
    assert curve(results["snapshots"]).x == pytest.approx((-0.5, 0.0, 0.5, 1.0))


def test_modules_with_state_of_every_kind_are_as_they_were():
    found, losses, _, snapshots = measured(Everything, ("loss", "backward", "step"))
    _, plain, _, unasked = measured(Everything, ())
    assert losses == plain
    ends = [each.before(3).state for each in (snapshots, unasked)]
    assert all(map(torch.equal, *(end.tensors for end in ends)))
    assert same(ends[0].optimizers, ends[1].optimizers)
    assert same(ends[0].random, ends[1].random)
    for phase in ("loss", "backward"):
        line = curve(found[phase]["gradient"])
        assert line.loss[1] == losses[2]
        assert line.loss[0] > line.loss[1] > line.loss[2], "against the gradient it falls"
    assert "with the weights as they are now, after the step" in found["step"]["gradient"].text


def test_what_cannot_be_measured_is_refused():
    found = []

    def look(inspector, phase, step):
        asked = (
            (MeasureLandscape(points=500), lambda: True),
            (MeasureLandscape("snapshots"), lambda: True),
            (MeasureLandscape(points=3), lambda: False),
        )
        for each, wanted in asked if phase == "backward" else ():
            try:
                snapshots = SnapshotStore(0)
                measure_landscape(inspector.capture, [optimizer], snapshots, each, wanted)
            except (InspectionError, Refusal) as error:
                found.append(error.message)

    model = torch.nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    traced = Traced(look)

    def loop():
        for _ in range(2):
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()

    traced.run(loop)
    assert found == [
        "the batch of this step was not kept",
        "the batch of this step was not kept",
        "the batch of this step was not kept",
        "500 is not possible",
        "there is no snapshot of step 0",
        "the experiment was cancelled",
    ]
