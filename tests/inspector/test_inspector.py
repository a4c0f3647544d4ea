"""Which tensors are found, what is refused with which reason, and that nothing changes."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trace.support import EVERYTHING, KeepingRecorder, SmallGpt, gpt_loop, mlp
from tui_trainer.client.answers.tensors import find_tensor
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.inspector import PART_BYTES, Inspector, TensorCopy
from tui_trainer.probes import PROBES
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.autograd import CheckGradient, DescribeGraph
from tui_trainer.protocol.heat_map import HeatMapWindow
from tui_trainer.protocol.inspection import (
    DescribeUse,
    ExplainUpdate,
    ListTensors,
    RankRequest,
    ReadTensor,
    Summarize,
    TensorList,
    TensorRef,
    TensorSummary,
)
from tui_trainer.trace.gate import Gate, Refusal
from tui_trainer.trace.tracer import Tracer


class Traced:
    """A loop under a tracer, looked into at the end of each phase that `look` is given."""

    def __init__(self, look) -> None:
        self.gate = Gate()
        self.tracer = Tracer(KeepingRecorder(), self.gate, PROBES, EVERYTHING)
        self.inspector = Inspector(self.tracer)
        self.seen: list[str] = []
        reached = self.gate.reached

        def look_at(phase, step):
            self.seen.append(f"{step} {phase}")
            reached(phase, step)
            with self.tracer.suspended():
                look(self.inspector, phase, step)

        self.gate.reached = look_at

    def run(self, loop):
        with self.tracer:
            result = loop()
        assert self.tracer.recorder.notices_of("fault") == []
        return result


def refs(inspector: Inspector) -> list[str]:
    listed = inspector.answer(ListTensors())
    assert isinstance(listed, TensorList)
    return [each.ref.text for each in listed.tensors]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
        optimizer.step()


def test_tensors_are_there_once_the_loop_has_made_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    found = {}

    def look(inspector, phase, step):
        found[f"{step} {phase}"] = refs(inspector)

    Traced(look).run(lambda: train(model, optimizer))
    plain = ["0.weight", "1.weight", "1.bias"]
    buffers = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert found["1 forward"] == [*plain, *buffers]
    assert found["1 backward"][:2] == ["0.weight", "gradient of 0.weight"]
    state = [f"{key} of 0.weight" for key in ("step", "exp_avg", "exp_avg_sq")]
    assert found["1 step"][:5] == ["0.weight", "gradient of 0.weight", *state]
    assert found["2 zero_grad"][:5] == ["0.weight", *state, "1.weight"]


def test_a_shared_parameter_is_found_by_all_of_its_names():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    found = []

    def look(inspector, phase, step):
        if (step, phase) == (1, "backward"):
            refs = (TensorRef("1.weight"), TensorRef("1.weight", "gradient"))
            shapes = [inspector.answer(Summarize(ref)).tensor.shape for ref in refs]
            found.extend([inspector.answer(ListTensors()).tensors, *shapes])

    optimizer = torch.optim.SGD(model.parameters())
    Traced(look).run(lambda: train(model, optimizer, 1))
    listed, *shapes = found
    assert shapes == [(6, 6), (6, 6)]
    assert find_tensor(listed, "1.weight", None).ref == TensorRef("0.weight")
    assert find_tensor(listed, "1.weight", "gradient").also == ("1.weight",)
    assert [each.ref.name for each in listed if each.is_named(["gradient", "1.w"])] == ["0.weight"]


def test_values_are_those_of_the_moment():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checked = []

    def look(inspector, phase, step):
        if (step, phase) != (2, "backward"):
            return
        for ref, tensor in (
            (TensorRef("0.weight"), model[0].weight),
            (TensorRef("0.weight", "gradient"), model[0].weight.grad),
            (TensorRef("0.weight", "state", "momentum_buffer"),
             optimizer.state[model[0].weight]["momentum_buffer"]),
        ):  # fmt: skip
            summary = inspector.answer(
                Summarize(ref, window=HeatMapWindow(100, 100, reduction="mean"))
            )
            assert isinstance(summary, TensorSummary)
            assert summary.statistics.norm == pytest.approx(float(tensor.detach().norm()))
            assert summary.heat.cells == tensor.detach().numpy().tobytes()
            whole = inspector.answer(ReadTensor(ref))
            assert isinstance(whole, TensorCopy)
            assert whole.part(0) == tensor.detach().numpy().tobytes()
            checked.append(ref)

    Traced(look).run(lambda: train(model, optimizer))
    assert len(checked) == 3


def test_only_what_is_asked_for_is_computed():
    def look(inspector, phase, step):
        ref = TensorRef("0.weight")
        assert inspector.answer(Summarize(ref, statistics=False)).statistics is None
        assert inspector.answer(Summarize(ref)).heat is None

    model = mlp()
    Traced(look).run(lambda: train(model, torch.optim.SGD(model.parameters(), lr=0.1)))


def test_large_tensors_are_sent_in_parts():
    model = nn.Linear(1200, 1000)
    parts = []

    def look(inspector, phase, step):
        if phase == "step":
            whole = inspector.answer(ReadTensor(TensorRef("weight")))
            expected = model.weight.detach().numpy().tobytes()
            parts.extend([whole.part(0), whole.part(PART_BYTES), whole.part(2 * PART_BYTES)])
            assert b"".join(parts) == expected

    def loop():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(2, 1200)).sum().backward()
        optimizer.step()

    Traced(look).run(loop)
    assert [len(part) for part in parts] == [PART_BYTES, 4 * 1200 * 1000 - PART_BYTES, 0]


REFUSED = [
    (TensorRef("0.weigth"), "no parameter or buffer 0.weigth"),
    (TensorRef("0.weight", "buffer"), "no parameter or buffer 0.weight"),
    (TensorRef("0.bias", "gradient"), "0.bias has no gradient: it is frozen"),
    (TensorRef("0.bias", "state", "exp_avg"), "no optimizer holds 0.bias"),
    (TensorRef("0.weight", "state", "exp_avg"), "adam has no state for 0.weight"),
    (TensorRef("0.weight", "gradient"), "no gradient now"),
]


@pytest.mark.parametrize(("ref", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_is_not_there_is_refused_with_the_reason(ref, why):
    model = mlp()
    model[0].bias.requires_grad_(False)
    refused = []

    def look(inspector, phase, step):
        if (step, phase) == (1, "forward"):
            with pytest.raises(InspectionError, match=why):
                inspector.answer(Summarize(ref))
            refused.append(ref)

    weights = [model[0].weight, *model[2].parameters()]
    Traced(look).run(lambda: train(model, torch.optim.Adam(weights)))
    assert refused == [ref]


def test_a_loss_scale_that_is_still_on_a_gradient_is_noted():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    notes = {}

    def look(inspector, phase, step):
        if phase in ("backward", "step"):
            answer = inspector.answer(Summarize(TensorRef("0.weight", "gradient")))
            notes[phase] = answer.tensor.note

    def loop():
        scaler.scale(model(torch.randn(4, 6)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    Traced(look).run(loop)
    assert notes["backward"] == "still multiplied by the loss scale 1,024"
    assert notes["step"] == ""


def test_a_shard_is_shown_as_such():
    class Sharded(torch.Tensor):
        _local_tensor: torch.Tensor

    model = mlp()
    checked = []

    def look(inspector, phase, step):
        if (step, phase) == (1, "forward"):
            shard = model[0].weight.detach()[:2].clone()
            gradient = torch.zeros(8, 6).as_subclass(Sharded)
            gradient._local_tensor = shard
            model[0].weight.grad = gradient
            try:
                answer = inspector.answer(Summarize(TensorRef("0.weight", "gradient")))
                checked.append((answer.tensor.shape, answer.tensor.note))
            finally:
                model[0].weight.grad = None

    Traced(look).run(lambda: train(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert checked == [((2, 6), "the shard of this process")]


# ---------------------------------------------------------------- nothing changes


def look_into_everything(inspector: Inspector) -> int:
    """Every request, of every tensor there is."""
    listed = inspector.answer(ListTensors())
    for each in listed.tensors:
        for reduction in ("mean_abs", "mean", "max_abs"):
            inspector.answer(Summarize(each.ref, window=HeatMapWindow(8, 8, reduction=reduction)))
        inspector.answer(ReadTensor(each.ref))
    return len(listed.tensors)


def run_again(inspector: Inspector) -> int:
    """Every request for which the forward pass runs again; how many were answered."""
    done = 0
    requests = [ListTensors(modules=True), DescribeGraph(), DescribeUse()]
    requests += [CheckGradient("head.weight", ((1, 2),)), ExplainUpdate("head.weight", (1, 2))]
    requests += [ExamineAttention("0", window=HeatMapWindow(8, 8), weights=True, residual=True)]
    requests += [
        Summarize(TensorRef(n, k)) for n in ("blocks.0", "head") for k in ("input", "output")
    ]
    for request in requests:
        with contextlib.suppress(InspectionError):
            inspector.answer(request)
            done += 1
    kinds = {type(each) for each in requests} | {ReadTensor}  # of which there is one above
    assert kinds == set(get_args(RankRequest))
    return done


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


@pytest.mark.slow
def test_a_training_is_bit_identical_with_everything_inspected_at_every_phase():
    outcomes = []
    looked, again = [], []
    for inspected in (False, True):
        torch.manual_seed(7)
        model = SmallGpt()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def look(inspector, phase, step, inspected=inspected):
            if inspected:
                looked.append(look_into_everything(inspector))
                if step in (2, 3):  # the batch is kept from the first request on
                    again.append(run_again(inspector))

        losses = Traced(look).run(lambda m=model, o=optimizer: gpt_loop(m, o, 3))
        found = [*losses, *model.state_dict().values(), *states(optimizer), torch.get_rng_state()]
        outcomes.append([copy.deepcopy(each) for each in found])
    assert max(looked) > 40
    assert max(again) == 10
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_nothing_of_a_training_is_touched_or_kept():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    gradients = []

    def look(inspector, phase, step):
        before = [(p.grad, p._version, p.requires_grad) for p in model.parameters()]
        known = set(optimizer.state)
        look_into_everything(inspector)
        for parameter, (gradient, version, trainable) in zip(
            model.parameters(), before, strict=True
        ):
            assert parameter.grad is gradient
            assert parameter._version == version
            assert parameter.requires_grad == trainable
        assert set(optimizer.state) == known
        gradients.extend(weakref.ref(p.grad) for p in model.parameters() if p.grad is not None)

    traced = Traced(look)
    traced.run(lambda: train(model, optimizer))
    optimizer.zero_grad()
    gc.collect()
    assert gradients
    assert all(reference() is None for reference in gradients)


def test_requests_from_another_thread_at_a_moving_gate():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gate = Gate()
    tracer = Tracer(KeepingRecorder(), gate, PROBES, EVERYTHING)
    inspector = Inspector(tracer)
    answers = []

    def ask():
        while True:
            try:
                future = gate.call_soon(lambda: look_into_everything(inspector), when_paused=True)
                answers.append(future.result(240))
            except (Refusal, InspectionError):
                return
            except BaseException:
                if gate.mode == "ended":
                    return
                raise

    asking = threading.Thread(target=ask)
    with tracer:
        asking.start()
        train(model, optimizer, 20)
        while not answers and asking.is_alive():  # on a busy machine it may come late
            train(model, optimizer, 1)
        gate.end()
    asking.join(240)
    assert not asking.is_alive()
    assert answers
    assert tracer.recorder.notices_of("fault") == []
