"""The forward pass of a step run again: the same loss, and everything as it was."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.inspector.custom_function import Halved
from tests.inspector.test_inspector import Traced
from tests.trace.support import SmallGpt, gpt_loop, mlp
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.gradient_check import check_gradient
from tui_trainer.inspector.rerun import StepCapture
from tui_trainer.inspector.tensor_catalog import TensorCatalog
from tui_trainer.protocol.autograd import CheckGradient
from tui_trainer.protocol.inspection import NOT_CAPTURED
from tui_trainer.trace.random_state import random_state

Look = Callable[[StepCapture, str, int], None]


def look_at(loop, look: Look, request: bool = True):
    def inspect(inspector, phase, step):
        look(inspector.capture, phase, step)

    traced = Traced(inspect)
    if request:
        traced.inspector.capture.request()
    return traced.run(loop)


class Everything(nn.Module):
    """Layers with state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(8, 3)
        self.calls = 0
        self.seen: list[int] = []
        self.cache = None
        self.average = torch.zeros(8)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(len(x))
        x = self.norm(self.first(x))
        self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        x = x + 0.01 * torch.randn(x.shape, generator=self.generator)
        x = x * (1 + 0.01 * random.random() + 0.01 * np.random.rand())
        self.cache = x = self.dropout(x)
        return self.last(x)


def train_everything(seed: int = 0, steps: int = 4):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Everything()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []

    def loop():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach().clone())

    return model, loop, losses


def fingerprint(model: nn.Module) -> list[object]:
    state: list[object] = [random_state()["torch"].tolist(), repr(np.random.get_state()[1:])]
    state += [np.random.get_state()[1].tolist(), random.getstate()]
    for module in model.modules():
        for name, value in module.__dict__.items():
            held = value.get_state().tolist() if isinstance(value, torch.Generator) else value
            state.append((name, id(value), repr(held)))
    tensors = [*model.parameters(), *model.buffers(), model.average]
    state += [(id(t), t._version, t.tolist(), id(t.grad)) for t in tensors]
    return state


def test_the_loss_is_that_of_the_step_and_nothing_changes():
    model, loop, losses = train_everything()
    found = []

    def look(capture, phase, step):
        before = fingerprint(model)
        for _ in range(2):
            with capture.rerun() as rerun:
                found.append((phase, step, rerun.same_loss, rerun.notes))
                if rerun.loss is not None:
                    leaves = [p for p in model.parameters() if p.requires_grad]
                    torch.autograd.grad(rerun.loss, leaves)
        assert fingerprint(model) == before

    look_at(loop, look)
    for phase, step, same, notes in found:
        if phase in ("loss", "backward", "clip"):
            assert same is True, (phase, step, notes)
            assert notes == []
        elif phase == "step":
            assert notes == ["with the weights as they are now, after the step"]
        else:
            assert same is None
            assert "without the loss" in notes[0]
    assert {phase for phase, *_ in found} == {
        "data", "zero_grad", "forward", "loss", "backward", "clip", "step"
    }  # fmt: skip
    other, plain, expected = train_everything()
    plain()
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert (model.calls, model.seen) == (other.calls, other.seen)
    assert torch.equal(model.average, other.average)


def gpt(model, optimizer):
    gpt_loop(model, optimizer, 2)


def accumulated(model, optimizer):
    for _ in range(2):
        for _ in range(3):
            tokens = torch.randint(0, 11, (3, 9))
            out = model(tokens[:, :-1])
            loss = F.cross_entropy(out.transpose(1, 2), tokens[:, 1:]) / 3
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shifted(model, optimizer):
    """As in language models that take the targets from the inputs."""
    for _ in range(2):
        tokens = torch.randint(0, 11, (3, 9))
        logits = model(tokens).float()
        cut = logits[..., :-1, :].contiguous()
        loss = nn.CrossEntropyLoss()(cut.view(-1, 11), tokens[..., 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def of_the_output_alone(model, optimizer):
    for _ in range(2):
        model(torch.randint(0, 11, (3, 9))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(2):
        tokens = torch.randint(0, 11, (3, 9))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def two_losses(model, optimizer):
    for _ in range(2):
        tokens = torch.randint(0, 11, (3, 9))
        flat = model(tokens).flatten(0, 1)
        first = F.cross_entropy(flat, tokens.flatten())
        second = F.mse_loss(flat, torch.zeros(27, 11))
        (first + second).backward()
        optimizer.step()
        optimizer.zero_grad()


LOOPS = [gpt, accumulated, shifted, of_the_output_alone, scaled, two_losses]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda each: each.__name__)
def test_losses_of_common_loops_are_found(loop):
    torch.manual_seed(1)
    model = SmallGpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same = []

    def look(capture, phase, step):
        if phase == "backward":
            with capture.rerun() as rerun:
                same.append((rerun.same_loss, rerun.notes))

    look_at(lambda: loop(model, optimizer), look)
    assert same
    assert all(found for found, _ in same), same


def batch():
    return torch.randn(4, 6), torch.randn(4, 3)


def by_hand(model):
    x, y = batch()
    return (model(x) - y).abs().mean()


def in_place(model):
    x, y = batch()
    errors = (y - model(x)).clone()
    errors[0] *= 2.0
    errors[:, 1] = errors[:, 1] * 0.5
    return errors.square_().sum(1).mean()


def regularised(model):
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    return F.cross_entropy(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())


def with_own_targets(model):
    """Targets from the model itself, without gradients, as in DQN and in distillation."""
    x, _ = batch()
    found = model(x)
    with torch.no_grad():
        best = found.softmax(-1).max(-1, keepdim=True).values * 0.9
    return F.huber_loss(found, best + found.detach().roll(1, 0)) + found.logsumexp(-1).mean()


def with_a_mask(model):
    x, y = batch()
    mask = y > 0
    return torch.where(mask, (model(x) - y) ** 2, 0.0).sum() / mask.sum().clamp(min=1)


def read_out(model):
    x, y = batch()
    error = (model(x) - y).square().mean()
    return error / max(error.item(), 1e-8)


def with_dropout(model):
    x, y = batch()
    return (F.dropout(model(x), 0.5) - y).pow(2).mean()


OWN_LOSSES = [by_hand, in_place, regularised, with_own_targets, with_a_mask, read_out, with_dropout]


@pytest.mark.parametrize("compute", OWN_LOSSES, ids=lambda each: each.__name__)
def test_losses_of_their_own_are_computed_again(compute):
    """Also in float64, where the gradient check compares them with differences."""
    torch.manual_seed(1)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same, notes, checked = [], [], []

    def loop():
        loss = compute(model)
        loss.backward()
        optimizer.step()

    def look(capture, phase, step):
        if phase == "backward":
            with capture.rerun() as rerun:
                same.append(rerun.same_loss)
                notes.extend(rerun.notes)
                weight = rerun.model[0].weight
                gradient = torch.autograd.grad(rerun.loss, weight)[0]
                checked.append(torch.allclose(gradient, weight.grad, rtol=1e-6, atol=1e-8))
            catalog = TensorCatalog(capture._tracer())
            found = check_gradient(
                capture._tracer(), catalog, capture, CheckGradient("0.weight", ((1, 2),))
            )
            entry = found.entries[0]
            checked.append(compute is read_out or entry.steps[entry.best].central_error < 1e-6)

    look_at(loop, look)
    assert same == [True]
    assert checked == [True, True]
    assert notes == ["numbers that the script read out of tensors are those of the step"] * (
        compute is read_out
    )
    assert torch._C._len_torch_function_stack() == 0


def of_another_function(model):
    x, y = batch()
    return (Halved.apply(model(x)) - y).abs().mean()


def into_a_buffer(model):
    x, y = batch()
    losses = torch.zeros(2)
    losses[0] = (model(x) - y).abs().mean()
    return losses.sum()


def of_two_calls(model):
    x, y = batch()
    first = model(x)
    return (first - model(y @ torch.ones(3, 6))).square().mean()


def under_a_mode(model):
    x, y = batch()
    with torch.device("cpu"):
        return (model(x) - y).abs().mean()


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        (of_another_function, "or by a function that is not torch's"),
        (into_a_buffer, "__setitem__ writes into a tensor that the model has not computed"),
        (of_two_calls, "more than the output of the last call of a model"),
        (under_a_mode, "without the loss: sub between the model and its loss is not repeated"),
    ],
)
def test_why_a_loss_is_not_computed_again(compute, why):
    torch.manual_seed(1)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    notes = []

    def loop():
        compute(model).backward()
        optimizer.step()

    def look(capture, phase, step):
        if phase == "backward":
            with capture.rerun() as rerun:
                notes.extend(rerun.notes)

    look_at(loop, look)
    assert why in "\n".join(notes)
    assert torch._C._len_torch_function_stack() == 0


def test_modes_of_the_script_end_as_they_began():
    """Begun between the model and backward, and ended after it, or never."""
    torch.manual_seed(1)
    model = mlp()
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    def loop():
        x, y = batch()
        found = model(x)
        with Mode():
            loss = (found - y).abs().mean()
            loss.backward()
            after = torch.ones(2) + 1
            seen.append(after)
        model(x)  # no backward follows
        assert torch._C._len_torch_function_stack() == 1
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    same = []

    def look(capture, phase, step):
        if phase == "backward":
            with capture.rerun() as rerun:
                same.append(rerun.same_loss)

    look_at(loop, look)
    assert same == [True]
    assert torch.Tensor.add in seen
    assert torch._C._len_torch_function_stack() == 0


def test_a_step_that_was_not_captured_says_from_when_on():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}

    def loop():
        for _ in range(2):
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
            optimizer.step()

    def look(capture, phase, step):
        if phase == "backward":
            try:
                with capture.rerun() as rerun:
                    found[step] = rerun.same_loss
            except InspectionError as error:
                found[step] = error.message

    look_at(loop, look, request=False)
    assert found == {1: NOT_CAPTURED, 2: True}


def test_a_batch_that_was_overwritten_is_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 6)
    refused = []

    def loop():
        loss = model(x).square().mean()
        loss.backward()
        x.zero_()
        optimizer.step()

    def look(capture, phase, step):
        if phase == "step":
            with pytest.raises(InspectionError, match="overwritten"), capture.rerun():
                pass
            refused.append(step)

    look_at(loop, look)
    assert refused == [1]


def test_a_forward_that_fails_leaves_everything_as_it_was():
    model, loop, _ = train_everything(steps=1)
    checked = []

    def look(capture, phase, step):
        if phase == "backward":
            before = fingerprint(model)

            def fail(module, result):
                if module is model.last:
                    raise MemoryError("no memory")

            with pytest.raises(MemoryError), capture.rerun(returned=fail):
                pass
            assert fingerprint(model) == before
            checked.append(step)

    look_at(loop, look)
    assert checked == [1]


def test_nothing_is_kept_while_nobody_asks():
    _, loop, _ = train_everything()
    kept = []
    look_at(loop, lambda capture, phase, step: kept.append(capture.call), request=False)
    assert kept
    assert all(call is None for call in kept)


def test_a_run_that_may_pause_keeps_what_it_needs():
    _, loop, _ = train_everything(steps=2)
    same = []

    def look(capture, phase, step):
        if (step, phase) == (1, "step"):
            tracer = capture._tracer()
            tracer.gate.throttle(1e6)  # arms the gate, as a step or a pause does
        if (step, phase) == (2, "clip"):
            with capture.rerun() as rerun:
                same.append(rerun.same_loss)

    look_at(loop, look, request=False)
    assert same == [True]
