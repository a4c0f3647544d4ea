"""The update of a parameter in a traced loop: predicted before the step, actual after it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.inspector.test_inspector import Traced, train
from tests.trace.support import mlp
from tui_trainer.inspector import optimizer_updates
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.protocol.inspection import NOT_OBSERVED, ExplainUpdate, UpdateExplanation
from tui_trainer.trace.gate import Gate

ENTRY = ExplainUpdate("0.weight", (2, 3))


def explanations(request: ExplainUpdate, loop, phases=("backward", "clip", "step"), stepping=False):
    """(step, phase) to the explanation, or to the reason why there is none."""
    found = {}

    def look(inspector, phase, step):
        if phase in phases:
            try:
                with torch.no_grad():
                    answer = inspector.answer(request)
                assert isinstance(answer, UpdateExplanation)
                found[step, phase] = answer
            except InspectionError as error:
                found[step, phase] = error.message

    with pytest.MonkeyPatch.context() as patch:
        if stepping:
            patch.setattr(Gate, "stops_soon", property(lambda _: True))
        Traced(look).run(loop)
    return found


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_entry_as_predicted_and_as_it_was(kind):
    torch.manual_seed(0)
    model = mlp()
    weights = {}

    def loop():
        optimizer = OPTIMIZERS[kind](model.parameters())
        for step in range(1, 5):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
            weights[step] = [float(model[0].weight.detach()[2, 3])]
            optimizer.step()
            weights[step].append(float(model[0].weight.detach()[2, 3]))

    found = explanations(ENTRY, loop)
    assert len(found) == 8
    for (step, phase), answer in found.items():
        old, new = weights[step]
        assert answer.old == old
        assert answer.optimizer == kind
        assert answer.count == (0 if kind == "sgd" else step)
        assert answer.group == 0
        assert answer.settings["lr"] in (0.1, 0.01)
        assert abs(answer.predicted - new) <= 4 * answer.precision
        if phase == "step":
            assert answer.actual == new
            assert answer.difference <= 4 * answer.precision
        else:
            assert answer.actual is None
        assert sum(term.name == "w" for term in answer.terms) >= 1
        assert answer.terms[-1].value == answer.predicted


def test_a_whole_tensor_in_norms_while_stepping():
    torch.manual_seed(0)
    model = mlp()

    def loop():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        train(model, optimizer, 3)

    request = ExplainUpdate("0.weight")
    found = explanations(request, loop)
    assert found[1, "step"] == NOT_OBSERVED
    found = explanations(request, loop, stepping=True)
    answer = found[2, "step"]
    assert answer.actual == pytest.approx(answer.predicted, rel=1e-6)
    assert answer.difference < 4 * answer.precision
    assert answer.terms[0].numbers == ""
    assert answer.terms[-2].value == pytest.approx(0.01 * math.sqrt(48), rel=0.5)


def test_a_step_before_the_first_request_was_not_observed():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = explanations(ENTRY, lambda: train(model, optimizer, 2), phases=("step",))
    assert found[1, "step"] == NOT_OBSERVED
    assert found[2, "step"].actual is not None


def test_what_cannot_be_explained():
    torch.manual_seed(0)
    model = mlp()
    model[0].bias.requires_grad_(False)

    def message(request, optimizer, phase="backward"):
        weights = [p for p in model.parameters() if p.requires_grad]
        made = optimizer(weights)
        return explanations(request, lambda: train(model, made, 1), (phase,))[1, phase]

    def sgd(weights):
        return torch.optim.SGD(weights, lr=0.1)

    assert message(ExplainUpdate("0.bias"), sgd) == "no optimizer holds 0.bias, and it is frozen"
    assert "no entry [2, 6]" in message(ExplainUpdate("0.weight", (2, 6)), sgd)
    assert "no entry [2]" in message(ExplainUpdate("0.weight", (2,)), sgd)
    assert "Adagrad is not explained" in message(ENTRY, torch.optim.Adagrad)
    assert message(ENTRY, sgd, "forward") == "0.weight has no gradient yet"
    assert "no parameter or buffer x" in message(ExplainUpdate("x"), sgd)


def test_a_large_tensor_is_explained_by_entry_only(monkeypatch):
    monkeypatch.setattr(optimizer_updates, "MAX_ELEMENTS", 10)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    request = ExplainUpdate("0.weight")
    found = explanations(request, lambda: train(model, optimizer, 1), ("backward",))
    assert "48 entries; the update of a whole tensor is explained up to 10" in found[1, "backward"]


def test_a_loss_scale_is_taken_off_the_gradient():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 6)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

    found = explanations(ENTRY, loop)
    before, after = found[2, "backward"], found[2, "step"]
    assert "1,024" in before.notes[0]
    assert abs(before.predicted - after.actual) <= 4 * before.precision
    assert after.difference <= 4 * after.precision


def test_the_observation_ends_by_itself_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(optimizer_updates, "STEPS_OBSERVED", 3)
    outcomes = []
    for asked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def look(inspector, phase, step, asked=asked):
            if asked and phase == "backward" and step == 1:
                inspector.answer(ENTRY)

        traced = Traced(look)
        traced.run(lambda m=model, o=optimizer: train(m, o, 6))
        assert traced.tracer.observers.updates is None
        outcomes.append([*(p.detach().clone() for p in model.parameters()), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
