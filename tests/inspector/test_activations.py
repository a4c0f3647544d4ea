"""Inputs and outputs of modules, against a plain forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.inspector.test_inspector import Traced
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.inspector import TensorCopy
from tui_trainer.protocol.inspection import ListTensors, ReadTensor, Summarize, TensorRef


class Net(nn.Module):
    """A layer whose output is overwritten by the next one, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.act = nn.ReLU(inplace=True)
        self.again = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        x = self.again(self.again(x))
        return self.lstm(x[:, None])[0][:, -1]


def test_they_are_those_of_the_step():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    found, listed, refused = {}, [], []
    with torch.no_grad():
        expected = model.first(x)
        after = model.again(F.relu(expected))

    def look(inspector, phase, step):
        if (step, phase) != (1, "backward"):
            return
        listed.extend(inspector.answer(ListTensors(modules=True)).tensors)
        for ref in (TensorRef("first", "input"), TensorRef("first", "output"),
                    TensorRef("again", "output"), TensorRef("lstm", "output", "2")):  # fmt: skip
            copied = inspector.answer(ReadTensor(ref))
            assert isinstance(copied, TensorCopy)
            summary = inspector.answer(Summarize(ref))
            found[ref.text] = (copied.part(0), summary)
        for ref, why in (
            (TensorRef("lsm", "output"), "no module lsm"),
            (TensorRef("first", "output", "3"), "has 1 of them"),
        ):
            with pytest.raises(InspectionError, match=why):
                inspector.answer(Summarize(ref))
            refused.append(ref)

    def loop():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    traced = Traced(look)
    traced.inspector.capture.request()
    traced.run(loop)
    assert found["input of first"][0] == x.numpy().tobytes()
    assert found["output of first"][0] == expected.numpy().tobytes()
    assert found["output of again"][0] == after.numpy().tobytes()
    assert found["output of first"][1].statistics.norm == pytest.approx(float(expected.norm()))
    assert found["output of again"][1].tensor.note == "called 2 times in this step: the first one"
    assert found["output 2 of lstm"][1].tensor.shape == (1, 4, 3)
    names = [each.ref.text for each in listed]
    assert names[:3] == ["input of model", "input of first", "output of first"]
    assert names[-1] == "output of model"
    assert [each.shape for each in listed if each.ref.name == "again"] == [(4, 8), (4, 8)]
    assert len(refused) == 2
