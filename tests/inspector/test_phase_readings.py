"""A tensor before and after the phase that a paused run was stepped over."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.inspector.test_inspector import Traced, train
from tui_trainer.inspector import phase_readings
from tui_trainer.inspector.inspector import Inspector
from tui_trainer.inspector.tensor_statistics import moments_of, statistics_of
from tui_trainer.protocol.inspection import BeforePhase, Summarize, TensorRef

WEIGHT, BIAS = TensorRef("0.weight"), TensorRef("1.bias")
GRADIENT, MOMENT = TensorRef("0.weight", "gradient"), TensorRef("0.weight", "state", "exp_avg")
TWICE = TensorRef("3.weight")


def model_of_two() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, False))
    model.append(nn.Linear(3, 3, False))
    model[3].weight = model[2].weight
    return model


def stepped(steps: int, control, look) -> nn.Module:
    """Train, `control(gate)` at each stop, after `look(inspector, phase, step)`."""
    model = model_of_two()
    optimizer = torch.optim.AdamW(model.parameters())
    traced = Traced(lambda *at: None)

    def pausing(phase, step):
        look(traced.inspector, model, phase, step)
        control(traced.gate)

    def loop():
        traced.gate.hooks.pausing = pausing
        traced.gate.pause()
        train(model, optimizer, steps)

    traced.run(loop)
    return model


def before(inspector: Inspector, ref: TensorRef) -> BeforePhase | None:
    summary = inspector.answer(Summarize(ref, entries=0))
    return summary.before


def test_each_phase_shows_every_tensor_as_it_was_before_it():
    found, values, order = {}, {}, []

    def look(inspector, model, phase, step):
        order.append((step, phase))
        layer = model[0]
        values[step, phase] = {
            WEIGHT: layer.weight.detach().numpy().copy(),
            BIAS: model[1].bias.detach().numpy().copy(),
            TWICE: model[2].weight.detach().numpy().copy(),
            GRADIENT: None if layer.weight.grad is None else layer.weight.grad.numpy().copy(),
        }
        for ref in (WEIGHT, GRADIENT, BIAS, TWICE):
            if values[step, phase][ref] is not None and (ref is not BIAS or phase == "step"):
                found[step, phase, ref] = before(inspector, ref)

    model = stepped(3, lambda gate: gate.step_phase(), look)
    assert len(order) > 10
    for now, last in zip(order[1:], order, strict=False):
        for ref in (WEIGHT, GRADIENT, BIAS, TWICE):
            if (*now, ref) not in found:
                continue
            read, old = found[*now, ref], values[last][ref]
            assert (read.step, read.phase) == last
            if old is None:
                assert read.moments is None
                continue
            wanted = old.astype(np.float64)
            assert read.moments.mean == pytest.approx(wanted.mean(), abs=1e-7)
            assert read.moments.std == pytest.approx(wanted.std(), rel=1e-5)
            assert read.moments.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-5)
            assert (read.moments.minimum, read.moments.maximum) == (old.min(), old.max())
    assert found[1, "backward", GRADIENT].moments is None  # backward has made it
    assert found[2, "step", WEIGHT].moments.norm != np.linalg.norm(values[2, "step"][WEIGHT])

    torch.manual_seed(0)
    same = model_of_two()
    train(same, torch.optim.AdamW(same.parameters()), 3)
    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_reads_what_was_inspected_and_other_stops_nothing(monkeypatch):
    found = []

    def look(inspector, model, phase, step):
        if phase == "step":
            found.append((step, before(inspector, WEIGHT), before(inspector, BIAS)))

    stepped(3, lambda gate: gate.step(), look)
    (_, first, _), (step, weight, bias), *_ = found
    assert first is None
    assert (step, weight.step, weight.phase) == (2, 2, "backward")
    assert bias.phase == "backward"
    # Of all tensors only those that were inspected, where there are too many entries.
    monkeypatch.setattr(phase_readings, "MAX_ENTRIES", 1)
    found.clear()

    def look_at_one(inspector, model, phase, step):
        if phase in ("backward", "step"):
            known = before(inspector, BIAS) if (step, phase) == (3, "step") else None
            found.append((step, phase, before(inspector, WEIGHT), known))

    stepped(3, lambda gate: gate.step_phase(), look_at_one)
    assert found[-1][2].phase == "backward"
    assert found[-1][3] is None


@pytest.mark.parametrize("values", [
    [1.0, -2.0, 0.0, math.nan, math.inf, -math.inf, 3.0],
    [math.nan],
    [1e30, 1e30, -1e30],
    [1e-30, 3e-30],
])  # fmt: skip
def test_moments_are_those_of_the_statistics(values):
    tensors = [torch.tensor(values), torch.empty(0), torch.tensor(values).double()[None]]
    for tensor, moments in zip(tensors, moments_of(tensors), strict=True):
        of = statistics_of(tensor, 3)
        ours = (moments.minimum, moments.maximum, moments.mean, moments.std, moments.norm)
        theirs = (of.minimum, of.maximum, of.mean, of.std, of.norm)
        assert ours == pytest.approx(theirs, nan_ok=True)
        assert (moments.zeros, moments.not_finite) == (of.zeros, of.not_finite)
