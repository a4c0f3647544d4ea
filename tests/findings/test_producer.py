"""Where a value that is not finite came from: the module, operation, batch or weight, by its name
and, where it is one line, its place in the source."""

from __future__ import annotations

import copy
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.findings.test_trainings import Net, batch, findings_of, nan_at_20, train
from tests.trace.support import KeepingRecorder
from tui_trainer.history.records import Producer
from tui_trainer.probes import PROBES
from tui_trainer.probes.nonfinite import ARMED_BY_GROWTH, ARMED_STEPS, OutputSums
from tui_trainer.trace import nonfinite_origin
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.nonfinite_origin import LossOperations
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer

BAD_STEP = 20
ALWAYS = ProbeOptions(budget=0.0, watch_nonfinite=True)
UNWATCHED = ProbeOptions(budget=0.0)


class UnitLength(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


class Normed(nn.Module):
    """Divides zero by zero at BAD_STEP."""

    def __init__(self):
        super().__init__()
        self.first, self.unit, self.head = nn.Linear(8, 32), UnitLength(), nn.Linear(32, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        hidden = F.relu(self.first(x))
        if self.calls == BAD_STEP:
            hidden = hidden * 0
        return self.head(self.unit(hidden))


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return next(first + i for i, line in enumerate(lines) if text in line)


def records_of(run, options=ALWAYS, probes=PROBES):
    torch.manual_seed(0)
    recorder = KeepingRecorder()
    with Tracer(recorder, Gate(), probes, options):
        run()
    assert not recorder.notices_of("fault")
    return recorder.records


def first_producer(run, **kwargs):
    return next(r.producer for r in records_of(run, **kwargs) if r.producer is not None)


def test_module_operation_and_line_are_named():
    found = first_producer(lambda: train(net=Normed()))
    place = f"test_producer.py:{line_of(UnitLength, 'return x / ')}"
    assert found == Producer("module", "unit", "UnitLength", "div", place)


def test_operation_and_line_are_named_without_watching_modules():
    found = first_producer(lambda: train(net=Normed()), options=ProbeOptions(budget=0.0))
    place = f"test_producer.py:{line_of(UnitLength, 'return x / ')}"
    assert found == Producer("operation", "first", "", "div", place)


def test_module_is_named_where_the_graph_says_nothing():
    class Overflowing(nn.Module):
        def forward(self, x):
            return (x.detach() * 1e38 * 1e38).nan_to_num(posinf=float("inf")) + x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.far = nn.Linear(8, 4), Overflowing()

        def forward(self, x):
            return self.far(self.first(x))

    found = first_producer(lambda: train(net=Model(), steps=3))
    assert (found.source, found.name, found.kind) == ("module", "far", "Overflowing")
    assert found.place == f"test_producer.py:{line_of(Model.forward, 'self.far(')}"


def test_operation_between_two_modules_belongs_to_the_one_around_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 4)})

        def forward(self, x):
            return self.body["b"]((self.body["a"](x).detach() - 1e3).sqrt())

    found = first_producer(lambda: train(net=Model(), steps=3))
    assert (found.source, found.name) == ("module", "body")


def inf_batch(net, x, y, step):
    return F.cross_entropy(net(x * float("inf") if step == BAD_STEP else x), y)


@pytest.mark.parametrize("options", [ALWAYS, UNWATCHED], ids=["watched", "unwatched"])
def test_batch_that_is_not_finite_is_named(options):
    assert first_producer(lambda: train(loss=inf_batch), options=options).source == "input"


@pytest.mark.parametrize("options", [ALWAYS, UNWATCHED], ids=["watched", "unwatched"])
def test_weight_that_is_not_finite_is_named(options):
    def loss(net, x, y, step):
        if step == BAD_STEP:
            with torch.no_grad():
                net.second.weight[0, 0] = float("nan")
        return F.cross_entropy(net(x), y)

    found = first_producer(lambda: train(loss=loss), options=options)
    assert (found.source, found.name) == ("weight", "second.weight")


def test_finding_names_the_origin_in_words():
    (found,) = [f for f in findings_of(lambda: train(loss=inf_batch)) if f.cause is None]
    assert (found.rule, found.onset, found.phase) == ("non-finite", BAD_STEP, "data")
    assert "the batch has values that are not finite" in found.text


def test_outputs_that_are_never_finite_are_no_origin():
    class Masked(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.full_like(x[:, :1], -float("inf"))], 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mask, self.unit = nn.Linear(8, 4), Masked(), Normed()

        def forward(self, x):
            return self.unit(F.pad(F.softmax(self.mask(self.first(x)), 1), (0, 3)))

    found = first_producer(lambda: train(net=Model()))
    assert found.name == "unit.unit"


def test_graph_is_not_read_where_saved_tensors_have_hooks():
    class Checkpointed(Net):
        def forward(self, x):
            hidden = checkpoint(self.first, x, use_reentrant=False)
            return self.head(F.relu(hidden))

    seen = records_of(
        lambda: train(net=Checkpointed(), loss=inf_batch), options=ProbeOptions(budget=0.0)
    )
    assert len(seen) == 60
    assert all(r.producer is None for r in seen[:BAD_STEP])


def test_watching_changes_no_bit():
    def trained(watch):
        torch.manual_seed(1)
        net = Net(dropout=0.3)
        run = lambda: train(net=net, steps=20)  # noqa: E731
        if watch:
            torch.manual_seed(1)
            recorder = KeepingRecorder()
            with Tracer(recorder, Gate(), PROBES, ALWAYS):
                torch.manual_seed(2)
                run()
        else:
            torch.manual_seed(2)
            run()
        return copy.deepcopy(net.state_dict())

    with_us, without = trained(True), trained(False)
    assert all(torch.equal(with_us[name], without[name]) for name in without)


def test_nothing_is_summed_once_the_first_steps_are_over(monkeypatch):
    observed = 0
    original = OutputSums.before_forward

    def before_forward(self, root):
        nonlocal observed
        observed += 1
        original(self, root)

    monkeypatch.setattr(OutputSums, "before_forward", before_forward)
    call = torch.nn.Module.__call__
    records_of(lambda: train(steps=12), options=ProbeOptions())
    assert 0 < observed <= 5
    assert torch.nn.Module.__call__ is call


class Branches(nn.Module):
    """Two linear layers, of which `bad` makes inf at BAD_STEP; the result is that of the second."""

    def __init__(self, bad):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.calls, self.bad = 0, bad

    def forward(self, x):
        self.calls += 1
        layer = getattr(self, self.bad)
        if self.calls == BAD_STEP:
            with torch.no_grad():
                layer.weight.fill_(3e38)  # finite, and too large for a sum of products
        return self.head(F.relu(self.second(F.relu(self.first(10 * x)))))


@pytest.mark.parametrize("bad", ["first", "second", "head"])
@pytest.mark.parametrize("held", [1 << 26, 0], ids=["kept", "summed"])
def test_the_first_layer_is_named_whether_tensors_are_kept_or_summed(bad, held, monkeypatch):
    monkeypatch.setattr("tui_trainer.probes.nonfinite.MAX_HELD_BYTES", held)
    found = first_producer(lambda: train(net=Branches(bad), rate=0.0, steps=BAD_STEP + 1))
    assert (found.source, found.name, found.kind) == ("module", bad, "Linear")


def far_from_zero(net, scale):
    return 0.01 * torch.sqrt((net.first.weight[0] * scale).square().sum())


def test_operation_outside_of_the_model_is_named_by_its_backward():
    def run():
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 1e-3)
        for step in range(1, BAD_STEP + 1):
            optimizer.zero_grad()
            x, y = batch()
            scale = 0.0 if step == BAD_STEP else 1.0
            (F.cross_entropy(net(x), y) + far_from_zero(net, scale)).backward()
            optimizer.step()

    place = f"test_producer.py:{line_of(far_from_zero, 'return ')}"
    found = first_producer(run, options=UNWATCHED)
    assert found == Producer("operation", "", "", "sqrt", place, backward=True)


@pytest.mark.parametrize(
    ("power", "watched"),
    [
        (lambda x: x**2, False),
        (lambda x: x**1.0, False),
        (lambda x: x**0.5, True),
        (lambda x: x ** torch.tensor([2.0, 1.0, 3.0]), True),
        (lambda x: 2**x, True),
        (lambda x: (x ** (1 + 1j)).real, True),
    ],
    ids=["square", "itself", "root", "tensor exponent", "tensor as exponent", "complex exponent"],
)
def test_powers_of_any_exponent_are_watched_unless_their_slope_is_finite(power, watched):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

    def unpacked(_):
        raise AssertionError("a saved tensor was read")

    operations = LossOperations()
    operations.model_returned()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpacked):
        loss = power(x).sum()
    operations.watch(loss)
    assert bool(operations._handles) == watched
    operations.backward_ended()


def test_a_loss_with_a_tensor_as_exponent_is_measured_at_every_step():
    def run():
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 1e-3)
        for _ in range(6):
            x, _ = batch()
            ((net(x) - 1).abs() ** torch.tensor(1.5)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    records = records_of(run, options=UNWATCHED)
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_sigmoid_by_hand_whose_exponential_overflows_is_named():
    x = torch.tensor([1.0, 100.0], requires_grad=True)
    operations = LossOperations()
    operations.model_returned()
    loss = (1 / (1 + x.exp())).sum()
    operations.watch(loss)
    loss.backward()
    operations.backward_ended()
    assert x.grad.isnan().tolist() == [False, True]
    assert operations.origin() == "exp"


def test_a_fault_while_the_loss_is_looked_at_switches_nothing_off(monkeypatch):
    def fails(node):
        if node.name() == "SqrtBackward0":
            raise TypeError
        return False

    monkeypatch.setattr("tui_trainer.trace.nonfinite_origin._is_plain_power", fails)
    x = torch.ones(3, requires_grad=True)
    operations = LossOperations()
    operations.model_returned()
    operations.watch(x.sqrt().log().sum())
    assert not operations._handles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("converted", [True, False], ids=["float32 loss", "loss of the dtype"])
def test_products_that_overflow_in_float16_are_named(dtype, converted):
    x = torch.full((4,), 1e-3, dtype=dtype, requires_grad=True)
    operations = LossOperations()
    operations.model_returned()
    loss = (x * 300 * 300).to(torch.float32 if converted else dtype).sum()
    operations.watch(loss)
    assert bool(operations._handles) == (dtype is torch.float16)
    loss.backward()
    operations.backward_ended()
    assert operations.origin() == ("mul" if dtype is torch.float16 else "")


def test_a_fault_while_gradients_are_kept_does_not_end_the_backward():
    x = torch.ones(3, requires_grad=True)
    operations = LossOperations()
    operations.model_returned()
    loss = x.sqrt().exp().sum()
    operations.watch(loss)
    operations._room = None
    loss.backward()
    assert x.grad is not None
    assert operations.origin() == ""


def test_the_operations_of_a_loss_are_searched_for_only_now_and_then(monkeypatch):
    looked_at = 0
    searched = nonfinite_origin._is_plain_power

    def counted(node):
        nonlocal looked_at
        looked_at += 1
        return searched(node)

    monkeypatch.setattr(nonfinite_origin, "_is_plain_power", counted)
    x = torch.ones(3, requires_grad=True)
    operations = LossOperations()

    def watched(loss):
        nonlocal looked_at
        looked_at = 0
        operations.model_returned()
        value = loss()
        operations.watch(value)
        found = len(operations._handles)
        operations.backward_ended()
        return found

    def plain():
        return (x - 1).mul(2).sqrt().mean()

    def penalised():
        return plain() + x.log().sum()

    for _ in range(nonfinite_origin.FIRST_SEARCHES):
        assert watched(plain) == 1
        assert looked_at
    assert watched(plain) == 1
    assert not looked_at
    assert watched(penalised) == 2, "a term was added"
    assert looked_at
    for number in range(1, nonfinite_origin.SEARCH_EVERY - 1):
        assert watched(lambda: x.sqrt().mul(2).mul(3).mean()) == 1, number
    assert not looked_at
    assert watched(lambda: x.log().mul(2).mul(3).mean()) == 1, "another operation at its place"
    assert looked_at
    for _ in range(nonfinite_origin.SEARCH_EVERY):
        watched(lambda: x.log().mul(2).mul(3).mean())
        if looked_at:
            break
    assert looked_at, "in case that something else has changed"


def test_nothing_is_kept_of_the_loss_after_the_step():
    torch.manual_seed(0)
    with Tracer(KeepingRecorder(), Gate(), PROBES, UNWATCHED) as tracer:
        train(loss=nan_at_20, steps=BAD_STEP - 1)
        outside = tracer.origins.outside
        assert not outside._kept
        assert not outside._handles


def test_further_forwards_of_a_step_are_watched():
    def accumulating():
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for step in range(1, 6):
            for part in range(3):
                x, y = batch(8)
                x = x * float("inf") if (step, part) == (3, 2) else x
                (F.cross_entropy(net(x), y) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()

    records = records_of(accumulating, probes=PROBES)
    assert [r.step for r in records if r.producer is not None][:1] == [3]


def test_a_spike_arms_for_less_time_than_what_is_not_finite():
    kept = []

    class Kept(OutputSums):
        def __init__(self, *given):
            super().__init__(*given)
            kept.append(self)

    probes = [Kept if kind is OutputSums else kind for kind in PROBES]
    records_of(lambda: train(steps=20), options=UNWATCHED, probes=probes)
    (outputs,) = kept
    assert not outputs.armed
    left = []
    for norm in (1e6, math.nan):
        facts = SimpleNamespace(loss=1.0, total_norm=norm, nonfinite=[], producer=None)
        outputs.rows(np.empty(0), facts)
        assert outputs.armed
        left.append(outputs._armed_until - outputs._steps)
    assert left == [ARMED_BY_GROWTH, ARMED_STEPS]


class LogBeside(nn.Module):
    """Has no parameters."""

    def forward(self, x, scale):
        return torch.log10(x.abs() * scale)


def test_line_is_named_in_a_module_without_parameters_beside_the_model():
    beside = LogBeside()

    def loss(net, x, y, step):
        scale = 0.0 if step == BAD_STEP else 1.0
        return beside(net(x), scale).clamp(max=5).square().mean()

    def run():
        held = beside  # as a script's own variable
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 1e-3)
        for step in range(1, BAD_STEP + 1):
            optimizer.zero_grad()
            loss(net, *batch(), step).backward()
            optimizer.step()
        assert held is beside

    found = first_producer(run, options=UNWATCHED)
    assert found.operation == "log10"
    assert found.place == f"test_producer.py:{line_of(LogBeside, 'return ')}"
