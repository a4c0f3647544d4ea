"""The operation and line that made a value not finite, found by running the step again."""

from __future__ import annotations

import inspect
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trace.support import KeepingRecorder
from tui_trainer.history.records import Producer
from tui_trainer.inspector.checked_rerun import CheckedRerun
from tui_trainer.inspector.inspector import Inspector
from tui_trainer.probes import PROBES
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer

BAD_STEP = 6


class Spread(nn.Module):
    """The square root has no slope where all values of a row are equal."""

    def forward(self, x):
        far = (x - x.mean(1, keepdim=True)).square()
        spread = far.sum(1, keepdim=True).sqrt()
        return x + spread


class UnitLength(nn.Module):
    def forward(self, x):
        scale = x.norm(dim=1, keepdim=True)
        shifted = x + 0.0
        return shifted / scale


class MaskedAttention(nn.Module):
    """Scores of 0 and -inf; a row of zeros as input hides every position."""

    def forward(self, x):
        scores = torch.zeros_like(x).masked_fill(x == 0, -torch.inf)
        kept = scores + 1.0
        return x * torch.softmax(kept, 1)


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)
        self.middle, self.drop, self.head = middle, nn.Dropout(0.2), nn.Linear(16, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        hidden = self.middle(self.first(x))
        return self.head(self.drop(self.norm(hidden)))


def train(net, bad=0.0, careful=False):
    """A row of the batch of BAD_STEP is `bad`. `careful`: without a step where the loss is nan."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(1, 10):
        x, y = torch.randn(12, 8), torch.randint(0, 4, (12,))
        if step == BAD_STEP:
            x[3] = bad
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        if not careful or torch.isfinite(loss):
            optimizer.step()
    return net


def producers_of(run, reruns=3, seed=0):
    torch.manual_seed(seed)
    recorder = KeepingRecorder()
    with Tracer(recorder, Gate(), PROBES, ProbeOptions(budget=0.0)) as tracer:
        inspector = Inspector(tracer)
        if reruns:
            watch = CheckedRerun(tracer, reruns)
            inspector.capture.checked = tracer.origins.rerun = watch
        run()
    assert not recorder.notices_of("fault")
    return [each.producer for each in recorder.records if each.producer is not None]


def place(owner, text):
    lines, first = inspect.getsourcelines(owner)
    return f"test_checked_rerun.py:{next(first + i for i, s in enumerate(lines) if text in s)}"


@pytest.mark.parametrize(
    ("middle", "operation", "text"),
    [
        (UnitLength(), "div", "return shifted / scale"),
        (MaskedAttention(), "softmax", "torch.softmax(kept"),
    ],
)
def test_operation_of_the_forward_is_named_with_its_line(middle, operation, text):
    found = producers_of(lambda: train(Net(middle)))[0]
    kind = type(middle).__name__
    assert found == Producer("module", "middle", kind, operation, place(type(middle), text), True)


def test_operation_whose_backward_is_at_fault_is_named_before_the_gradients_are_used():
    found = producers_of(lambda: train(Net(Spread())))[0]
    line = place(Spread, ".sqrt()")
    assert found == Producer("operation", "middle", "Spread", "sqrt", line, True, True)


def test_batch_that_is_not_finite_is_not_taken_for_an_operation():
    found = producers_of(lambda: train(Net(nn.ReLU()), bad=torch.inf))[0]
    assert found.source == "input"
    assert not found.rerun


def test_without_reruns_the_graph_of_the_loss_is_read():
    found = producers_of(lambda: train(Net(UnitLength())), reruns=0)[0]
    assert found.operation == "div"
    assert not found.rerun


@pytest.mark.parametrize("middle", [UnitLength, Spread])
def test_training_goes_on_as_without_it(middle):
    nets = []
    for reruns in (0, 3):
        producers_of(lambda: nets.append(train(Net(middle()), careful=True)), reruns)
    plain, watched = nets
    assert plain.calls == watched.calls
    states = zip(plain.state_dict().items(), watched.state_dict().items(), strict=True)
    for (name, expected), (_, found) in states:
        assert torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0)), name


def test_nothing_of_a_batch_is_kept_after_the_step():
    net = Net(nn.ReLU())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with Tracer(KeepingRecorder(), Gate(), (), ProbeOptions(budget=0.01)) as tracer:
        watch = CheckedRerun(tracer, 3)
        inspector = Inspector(tracer)
        inspector.capture.checked = tracer.origins.rerun = watch
        x = torch.randn(12, 8)
        F.cross_entropy(net(x), torch.randint(0, 4, (12,))).backward()
        optimizer.step()
        kept = weakref.ref(x)
        del x
        assert kept() is None
