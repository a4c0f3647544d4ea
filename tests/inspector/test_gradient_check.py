"""Gradients of autograd against numerical ones, on the batch of a step; nothing changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.inspector.custom_function import Halved
from tests.inspector.test_inspector import Traced
from tests.inspector.test_rerun import Everything, fingerprint
from tests.trace.support import SmallGpt, mlp
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.gradient_check import steadiest
from tui_trainer.protocol.autograd import CheckGradient, GradientCheck, GradientStep


def checks(model, compute, request: CheckGradient, phases=("backward",), around=lambda: None):
    """phase → the check of the second step, or why there is none."""
    found: dict[str, GradientCheck | str] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            compute(model).backward()
            optimizer.step()

    def look(inspector, phase, step):
        if step == 2 and phase in phases:
            before = around()
            try:
                answer = inspector.answer(request)
                assert isinstance(answer, GradientCheck)
                found[phase] = answer
            except InspectionError as error:
                found[phase] = error.message
            assert around() == before

    traced = Traced(look)
    traced.inspector.capture.request()
    traced.run(loop)
    return found


def classify(model):
    return F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,)))


@pytest.mark.parametrize("make", [mlp, Everything], ids=["mlp", "everything"])
def test_right_gradients_agree_to_many_digits_and_nothing_changes(make):
    torch.manual_seed(0)
    model = make()
    model.average = torch.zeros(8)
    name = "0.weight" if make is mlp else "last.weight"
    request = CheckGradient(name, entries=3)
    found = checks(model, classify, request, ("loss", "backward", "step"),
                   lambda: fingerprint(model))  # fmt: skip
    for phase, check in found.items():
        assert isinstance(check, GradientCheck), check
        assert check.dtype == "float64"
        assert len(check.entries) == 3
        assert check.copied_bytes == 8 * sum(p.numel() for p in model.parameters())
        for entry in check.entries:
            best = entry.steps[entry.best]
            assert best.central_error < 1e-6, (phase, entry)
            assert min(step.forward_error for step in entry.steps) < 1e-4
        if phase == "backward":
            assert check.notes == ()
            own = [entry.autograd for entry in check.entries]
            assert check.step_gradient == pytest.approx(own, rel=1e-3, abs=1e-6)
    assert "after the step" in found["step"].notes[0]


def test_the_error_of_forward_differences_falls_with_h_and_that_of_central_ones_with_its_square():
    torch.manual_seed(0)
    found = checks(mlp(), classify, CheckGradient("0.weight", ((2, 3),)))["backward"]
    (entry,) = found.entries
    assert entry.index == (2, 3)
    errors = {step.h: step for step in entry.steps}
    assert errors[1e-3].forward_error / errors[1e-2].forward_error == pytest.approx(0.1, rel=0.3)
    assert errors[1e-2].central_error / errors[1e-1].central_error == pytest.approx(0.01, rel=0.3)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient  # 2x would be right


class WithWrongBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Wrong.apply(self.linear(x))


def test_a_wrong_backward_shows():
    torch.manual_seed(0)
    check = checks(WithWrongBackward(), classify, CheckGradient("linear.weight"))["backward"]
    assert max(entry.steps[entry.best].central_error for entry in check.entries) > 0.05


def test_recurrent_layers_and_tied_weights():
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    def sequence(model):
        return F.cross_entropy(model(torch.randn(4, 7, 6)), torch.randint(0, 3, (4,)))

    check = checks(Recurrent(), sequence, CheckGradient("lstm.weight_hh_l0"))["backward"]
    assert max(entry.steps[entry.best].central_error for entry in check.entries) < 1e-6

    tied = SmallGpt()
    tied.head.weight = tied.embedding.weight

    def text(model):
        tokens = torch.randint(0, 11, (3, 9))
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    check = checks(tied, text, CheckGradient("embedding.weight"))["backward"]
    assert max(entry.steps[entry.best].central_error for entry in check.entries) < 1e-5


def test_a_model_too_large_for_float64_is_checked_in_its_own_type():
    torch.manual_seed(0)
    model = mlp()
    request = CheckGradient("0.weight", max_bytes=100)
    check = checks(model, classify, request, around=lambda: [p.tolist() for p in model.parameters()]
                   )["backward"]  # fmt: skip
    assert check.dtype == "float32"
    assert check.copied_bytes == 8 * 6 * 4
    assert "checked in their own type" in check.notes[0]
    assert max(entry.steps[entry.best].central_error for entry in check.entries) < 0.05


def test_what_cannot_be_checked():
    torch.manual_seed(0)

    def why(request, compute=classify):
        return checks(mlp(), compute, request)["backward"]

    assert "no parameter or buffer x" in why(CheckGradient("x"))
    assert "no entry [9, 9]" in why(CheckGradient("0.weight", ((9, 9),)))

    def unknown(model):
        return (Halved.apply(model(torch.randn(4, 6))) - torch.randn(4, 3)).abs().mean()

    assert "a function that is not torch's" in why(CheckGradient("0.weight"), unknown)


def test_the_steadiest_step_lies_between_curvature_and_rounding():
    def steps(*values):
        return [GradientStep(10.0**-k, 0.0, c, 0.0, 0.0) for k, c in enumerate(values, 1)]

    assert steadiest(steps(2.0, 1.1, 1.0001, 1.00009, 1.3), 1e-12) == 3
    # Two that agree by chance where the rounding is large.
    assert steadiest(steps(2.0, 1.1, 1.0001, 1.0002, 1.0002), 1e-9) == 3
    assert steadiest(steps(math.nan), 1.0) == 0
