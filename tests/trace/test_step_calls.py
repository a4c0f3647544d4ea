"""Scripts that have an optimizer and update their weights by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trace.support import KeepingRecorder, trace

SETUP = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters())
losses = []

def update():
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad

def backward():
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).square().mean()
    losses.append(loss.item())
    loss.backward()

"""
BY_HAND = """
for _ in range(6):
    backward()
    update()
"""


def traced(body: str) -> tuple[KeepingRecorder, dict[str, Any]]:
    names: dict[str, Any] = {"__name__": "__main__"}
    code = compile(SETUP + body, "<script>", "exec")
    recorder, _ = trace(lambda: exec(code, names))
    return recorder, names


OF_OTHERS = {
    "none": "",
    "of a scheduler": """
schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
if losses is None:
    schedule.step()
""",
    "of an environment": """
class Environment:
    def step(self): pass
game = Environment()
game.step()
""",
}


@pytest.mark.parametrize("before", OF_OTHERS.values(), ids=OF_OTHERS)
def test_an_optimizer_that_never_steps(before: str) -> None:
    recorder, names = traced(before + BY_HAND)
    assert recorder.series("step", "loss", _key(recorder)) == pytest.approx(names["losses"])
    assert not recorder.skips
    assert "by hand" in recorder.info["optimizers"]
    assert any("never calls step() of its optimizer (adam)" in t for _, t in recorder.notices)


def _key(recorder: KeepingRecorder) -> str:
    return next(r.optimizer for r in reversed(recorder.records))


@pytest.mark.parametrize(
    "never",
    [
        "if losses is None:\n    optimizer.step()",
        "def helper(o):\n    o.step()",
        "class Helper:\n    def run(self):\n        self.optimizer.step()",
        "scaler = torch.amp.GradScaler('cpu')\nif losses is None:\n    scaler.step(optimizer)",
    ],
    ids=["in a branch", "in a function", "in a method", "of a scaler"],
)
def test_a_step_that_is_written_and_never_called(never: str) -> None:
    recorder, names = traced(f"{never}\n{BY_HAND}")
    assert [skip.reason for skip in recorder.skips] == ["hand"] * 3
    assert recorder.series("step", "loss") == pytest.approx(names["losses"][3:])
    assert recorder.info["optimizers"] == ("by hand",)


def test_a_step_that_no_code_was_seen_to_call() -> None:
    recorder, names = traced(
        """
make_step = getattr(optimizer, "st" + "ep")
for _ in range(4):
    backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    make_step()
"""
    )
    assert recorder.series("step", "loss") == pytest.approx(names["losses"])
    assert recorder.info["optimizers"] == ("adam",)
    norms = recorder.series("step", "grad_norm_preclip")
    assert len(norms) == 4
    assert min(norms) > 0.1


def test_perturbed_weights_are_no_step() -> None:
    recorder, names = traced(
        """
for _ in range(4):
    backward()
    kept = [p.detach().clone() for p in model.parameters()]
    update()
    backward()
    with torch.no_grad():
        for parameter, before in zip(model.parameters(), kept):
            parameter.copy_(before)
    optimizer.step()
"""
    )
    assert recorder.series("step", "loss") == pytest.approx(names["losses"][1::2])
    assert [skip.step for skip in recorder.skips] == [1, 2, 3, 4]
    assert recorder.info["optimizers"] == ("adam",)


def test_gradients_that_are_copied_to_weights_in_another_precision() -> None:
    recorder, names = traced(
        """
masters = [p.detach().clone().double().requires_grad_() for p in model.parameters()]
optimizer = torch.optim.Adam(masters, lr=0.01)
norms = []
for _ in range(4):
    model.zero_grad()
    for _ in range(2):
        loss = model(torch.randn(2, 4)).square().mean()
        losses.append(loss.item())
        loss.backward()
    for master, parameter in zip(masters, model.parameters()):
        master.grad = parameter.grad.double()
    norms.append(nn.utils.clip_grad_norm_(masters, 1e-3).item())
    optimizer.step()
    with torch.no_grad():
        for master, parameter in zip(masters, model.parameters()):
            parameter.copy_(master)
"""
    )
    losses = names["losses"]
    sums = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert recorder.series("step", "loss") == pytest.approx(sums)
    assert recorder.series("step", "grad_norm_preclip") == pytest.approx(names["norms"])
    assert not recorder.skips


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_with_steps_of_its_own_around_another(with_closure: bool) -> None:
    """As SAM is written: both are optimizers of the same parameters."""
    recorder, names = traced(
        f"""
class Around(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {{}})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
    def perturb(self):
        self.kept = [p.detach().clone() for p in model.parameters()]
        update()
        self.zero_grad()
    def second_step(self):
        for parameter, before in zip(model.parameters(), self.kept):
            parameter.data = before
        self.base_optimizer.step()
    def step(self, closure):
        self.perturb()
        torch.enable_grad()(closure)()
        self.second_step()

optimizer = Around(model.parameters())
for _ in range(5):
    backward()
    if {with_closure}:
        optimizer.step(backward)
    else:
        optimizer.perturb()
        backward()
        optimizer.second_step()
"""
    )
    assert recorder.series("step", "loss") == pytest.approx(names["losses"][1::2])
    assert recorder.info["optimizers"] == ("sgd",)
    assert not [text for _, text in recorder.notices if "never calls step" in text]
