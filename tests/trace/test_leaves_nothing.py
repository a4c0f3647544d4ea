"""Attaching changes nothing: no result, saved model or compiled graph; detaching restores all."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trace.support import (
    EVERYTHING,
    CountingGate,
    KeepingRecorder,
    SmallGpt,
    gpt_loop,
    mlp,
    plain_loop,
    trace,
)
from tui_trainer.probes import PROBES
from tui_trainer.protocol import PHASES
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.convolution(x)))
        return self.head(self.dropout(x.flatten(1)))


def conv_loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    losses = []
    for _ in range(steps):
        images, targets = torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses


CASES = {
    "gpt": (SmallGpt, gpt_loop, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)),
    "conv": (ConvNet, conv_loop, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
}


def train(case: str, steps: int = 30):
    make, loop, optimizer = CASES[case]
    torch.manual_seed(7)
    model = make()
    losses = loop(model, optimizer(model.parameters()), steps)
    return losses, model.state_dict(), torch.get_rng_state()


def press_keys(gate: Gate, over: threading.Event) -> None:
    """Go through the phases of the first step, then pause, step and go through phases for as long
    as the training lasts."""
    for _ in PHASES:
        while gate.mode != "paused":
            if gate.mode == "ended" or over.wait(0.001):
                return
        gate.step_phase()
    controls = [gate.pause, gate.step_phase, gate.step_phase, gate.step, lambda: gate.step(3)]
    number = 0
    while not over.wait(0.003):
        if gate.mode == "ended":
            return
        controls[number % len(controls)]()
        number += 1
    if gate.mode != "ended":
        gate.resume()


@pytest.mark.parametrize("case", CASES)
def test_bit_identical_with_every_probe_pausing_and_stepping(case):
    bare = train(case)
    recorder, gate = KeepingRecorder(), Gate(paused=True)
    recorder.topics = frozenset({"attention_heads", "attention_spectrum", "attention_health"})
    over = threading.Event()
    keys = threading.Thread(target=press_keys, args=(gate, over))
    keys.start()
    with Tracer(recorder, gate, PROBES, EVERYTHING):
        traced = train(case)
    over.set()
    keys.join()
    assert recorder.notices_of("fault") == []
    assert len(recorder.records) == 30
    assert len({report.phase for report in recorder.reports}) > 3
    assert all(torch.equal(a, b) for a, b in zip(bare[0], traced[0], strict=True))
    assert bare[1].keys() == traced[1].keys()
    assert all(torch.equal(bare[1][name], traced[1][name]) for name in bare[1])
    assert torch.equal(bare[2], traced[2])


PATCHED = [
    (torch.nn.Module, "__call__"),
    (torch.nn.Module, "zero_grad"),
    (torch.optim.Optimizer, "zero_grad"),
    (torch.Tensor, "backward"),
    (torch.autograd, "backward"),
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.nn.utils, "clip_grad_value_"),
    (torch.nn.utils.clip_grad, "clip_grad_norm_"),
    (torch.nn.utils.clip_grad, "clip_grad_value_"),
    (torch.amp.grad_scaler.GradScaler, "scale"),
    (torch.amp.grad_scaler.GradScaler, "step"),
    (torch.amp.grad_scaler.GradScaler, "unscale_"),
    (torch.amp.grad_scaler.GradScaler, "update"),
    (torch.nn.functional, "scaled_dot_product_attention"),
]


def standing() -> list[object]:
    from torch.optim import optimizer as o

    hooks = [len(o._global_optimizer_pre_hooks), len(o._global_optimizer_post_hooks)]
    return [vars(owner).get(name) for owner, name in PATCHED] + hooks


def test_detaching_restores_everything():
    before = standing()
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters())
    trace(lambda: gpt_loop(model, optimizer, 3))
    assert standing() == before
    assert "__call__" not in vars(SmallGpt)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_attaching_again_goes_on():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder, gate = KeepingRecorder(), CountingGate()
    tracer = Tracer(recorder, gate, PROBES, EVERYTHING)
    for _ in range(2):
        with tracer:
            plain_loop(model, optimizer, 2)
        plain_loop(model, optimizer, 2)
    assert [record.step for record in recorder.records] == [1, 2, 3, 4]
    assert gate.phases(4) == gate.phases(1)


def test_saved_copied_and_pickled_models_hold_nothing_of_ours():
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters())

    def loop():
        gpt_loop(model, optimizer, 2)
        saved = io.BytesIO()
        torch.save({"model": model, "optimizer": optimizer.state_dict()}, saved)
        for written in (saved.getvalue(), pickle.dumps(model), pickle.dumps(optimizer)):
            assert b"tui_trainer" not in written
        twin = copy.deepcopy(model)
        assert vars(twin).keys() == vars(model).keys()
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)["model"]
        assert torch.equal(loaded.head.weight, model.head.weight)
        # A copy of the root is no root: calling it is no phase.
        boundaries = len(gate.reached_boundaries)
        twin(torch.randint(0, 11, (1, 4)))
        assert len(gate.reached_boundaries) == boundaries

    gate = CountingGate()
    trace(loop, gate=gate)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def compilations(model: nn.Module, compiled_call, steps: int = 4) -> int:
    """How often a backend was asked to compile something."""
    count = 0

    def backend(graph, _inputs):
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    call = compiled_call(model, backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        inputs, targets = torch.randn(4, 6), torch.randint(0, 3, (4,))
        optimizer.zero_grad()
        F.cross_entropy(call(inputs), targets).backward()
        optimizer.step()
    return count


def outer(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def function(model, backend):
    return torch.compile(lambda x: model(x) * 1.0, backend=backend)


@pytest.mark.parametrize("how", [outer, in_place, function])
@pytest.mark.parametrize("options", [EVERYTHING, ProbeOptions()])
@pytest.mark.slow
def test_compiled_graphs_are_compiled_once_as_without_us(how, options):
    torch.manual_seed(0)
    bare = compilations(Net(), how)
    counted = []
    trace(lambda: counted.append(compilations(Net(), how)), options=options)
    assert counted == [bare] == [1]


@pytest.mark.slow
def test_whole_compiled_gpt_is_compiled_once():
    def run() -> int:
        count = 0

        def backend(graph, _inputs):
            nonlocal count
            count += 1
            return graph.forward

        torch._dynamo.reset()
        torch.manual_seed(0)
        model = SmallGpt()
        compiled = torch.compile(model, backend=backend)
        gpt_loop(compiled, torch.optim.AdamW(model.parameters()), 25)
        return count

    bare = run()
    counted = []
    trace(lambda: counted.append(run()))
    assert counted == [bare]


def test_optimizer_that_dies_takes_its_meter_with_it():
    import gc

    recorder, gate = KeepingRecorder(), CountingGate()
    with Tracer(recorder, gate, PROBES, EVERYTHING) as tracer:
        for _ in range(3):
            model = SmallGpt()
            gpt_loop(model, torch.optim.AdamW(model.parameters()), 2)
            del model
            gc.collect()
        assert tracer.registry.measurers == ()
        assert tracer.roots == []
    assert len(recorder.records) == 6
