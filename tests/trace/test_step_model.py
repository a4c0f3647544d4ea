"""What belongs to which step: losses, gradients and clippings, in any order of a script."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trace.support import batch, close, mlp, trace
from tui_trainer.protocol.absent import Absent, why_absent


def loss_of(model, scale=1.0):
    inputs, targets = batch()
    return F.cross_entropy(model(inputs), targets) * scale


def total_of(parameters):
    """√Σ‖g‖² in float64."""
    norms = [p.grad.double().norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


def reason(value):
    found = why_absent(value)
    return None if found is None else Absent(found)


def sgd(*models):
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.05)


def test_a_clip_after_the_step_is_no_clip_of_it():
    model, totals = mlp(), []
    optimizer = sgd(model)

    def loop():
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            totals.append(total_of(model.parameters()))
            optimizer.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    recorder, _ = trace(loop)
    close(recorder.series("step", "grad_norm_preclip"), totals)
    assert all(record.clip is None for record in recorder.records)
    assert not any(t.name == "clip" and recorder.rows("clip") for t in recorder.tables)
    (said,) = recorder.notices_of("clip_after_step")
    assert "after optimizer.step()" in said


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_that_is_thrown_away_is_a_skipped_iteration(set_to_none):
    model, losses, thrown = mlp(), [], []
    optimizer = sgd(model)

    def loop():
        for number in range(6):
            loss = loss_of(model, 1e5 if number == 3 else 1.0)
            loss.backward()
            if number == 3:
                thrown.append((float(loss), total_of(model.parameters())))
            else:
                losses.append(float(loss))
                optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    recorder, _ = trace(loop)
    close(recorder.series("step", "loss"), losses)
    (skipped,) = recorder.skips
    assert (skipped.step, skipped.reason) == (4, "hand")
    step = recorder.table("step")
    values = dict(zip([c.name for c in step.columns], dict(skipped.rows)[step.id], strict=True))
    close([values["loss"], values["grad_norm_preclip"]], thrown[0])


def test_gradients_left_at_the_end_are_an_unfinished_step():
    model = mlp()
    optimizer = sgd(model)

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        optimizer.zero_grad()
        loss_of(model).backward()

    recorder, _ = trace(loop)
    assert [record.step for record in recorder.records] == [1, 2]
    (skipped,) = recorder.skips
    assert (skipped.step, skipped.reason) == (3, "end")


def test_the_first_evaluation_of_a_closure_is_the_step():
    model, losses, totals, calls = mlp(), [], [], []
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    inputs, targets = batch()

    def loop():
        for _ in range(3):
            evaluations = []

            def closure(evaluations=evaluations):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                evaluations.append((float(loss.detach()), total_of(model.parameters())))
                return loss

            optimizer.step(closure)
            losses.append(evaluations[0][0])
            totals.append(evaluations[0][1])
            calls.append(len(evaluations))

    recorder, gate = trace(loop)
    close(recorder.series("step", "loss"), losses)
    close(recorder.series("step", "grad_norm_preclip"), totals)
    assert recorder.series("step", "evaluations") == calls
    assert {"forward", "loss", "backward"} <= set(gate.phases(2))


def test_a_loop_without_an_optimizer_has_steps():
    model, losses = mlp(), []

    def loop():
        for _ in range(4):
            loss = loss_of(model)
            losses.append(float(loss))
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            model.zero_grad()

    recorder, _ = trace(loop)
    close(recorder.series("step", "loss"), losses)
    assert recorder.info["optimizers"] == ("by hand",)
    assert {reason(rate) for rate in recorder.series("step", "learning_rate")} == {
        Absent.NO_LEARNING_RATE
    }


@pytest.mark.parametrize("clips", [False, True])
def test_updates_by_hand_that_are_too_small_to_be_seen(clips):
    model, losses = torch.nn.Linear(4, 1), []

    def loop():
        for number in range(12):
            model.zero_grad()
            # Then gradients vanish: updates through `.data` leave the weights as they are.
            scale = 1.0 if number < 4 else 1e-12 if number < 8 else 0.0
            loss = model(torch.randn(8, 4)).square().mean() * scale
            losses.append(float(loss.detach()))
            loss.backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.1)
        model.zero_grad()

    recorder, _ = trace(loop)
    close(recorder.series("step", "loss"), losses)
    assert not recorder.notices_of("clip_after_step")


def test_an_optimizer_that_is_given_a_group_goes_on():
    model, totals = mlp(), []
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.01)

    def loop():
        for number in range(6):
            if number == 3:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": list(model[0].parameters())})
            optimizer.zero_grad()
            loss_of(model).backward()
            totals.append(total_of(model.parameters()))
            optimizer.step()

    recorder, _ = trace(loop)
    assert recorder.info["optimizers"] == ("adam",)
    found = {
        r.step: v for r in recorder.records for t, v in r.rows if recorder.tables[t].name == "step"
    }
    close([found[step][2] for step in range(1, 7)], totals)
    assert all(p.trainable and p.optimizer == "adam" for p in recorder.info["parameters"])


def test_a_layer_that_is_replaced():
    model = mlp()
    optimizer = sgd(model)

    def loop():
        for number in range(6):
            if number == 3:
                model[2] = nn.Linear(8, 3)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    recorder, _ = trace(loop)
    assert recorder.info["optimizers"] == ("sgd",)
    last = recorder.records[-1]
    rows = {recorder.tables[t].name: (recorder.tables[t], v) for t, v in last.rows}
    table, values = rows["grad_norm"]
    norms = dict(zip([c.name for c in table.columns], values.tolist(), strict=True))
    close(norms["2.weight"], float(model[2].weight.grad.norm()))
    assert reason(norms["2.weight (replaced)"]) is Absent.NOT_IN_MODEL


def test_zeros_left_on_frozen_and_replaced_parameters_are_no_gradients():
    model = mlp()
    optimizer = sgd(model)
    totals = []

    def loop():
        for number in range(8):
            if number == 3:
                model[0].requires_grad_(False)
            if number == 5:
                model[2] = nn.Linear(8, 3)
                optimizer.add_param_group({"params": model[2].parameters()})
            optimizer.zero_grad(set_to_none=False)
            loss_of(model).backward()
            totals.append(total_of(p for p in model.parameters() if p.requires_grad))
            optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("step", "grad_norm_preclip"), totals)
    by_step = {}
    for record in recorder.records:
        for number, values in record.rows:
            table = recorder.tables[number]
            if table.name == "grad_norm":
                names = [column.name for column in table.columns]
                by_step[record.step] = dict(zip(names, map(reason, values.tolist()), strict=True))
    assert by_step[3]["0.weight"] is None
    assert by_step[5]["0.weight"] is Absent.FROZEN
    assert by_step[8]["0.bias"] is Absent.FROZEN
    assert by_step[8]["2.weight (replaced)"] is Absent.NOT_IN_MODEL
    assert by_step[8]["2.weight"] is None
    trainable = {p.name: p.trainable for p in recorder.info["parameters"]}
    assert (trainable["0.weight"], trainable["2.weight"]) == (False, True)


def test_absent_gradients_have_a_reason():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(6, 3)
            self.unused = nn.Linear(6, 3)
            self.frozen = nn.Linear(6, 3).requires_grad_(False)
            self.empty = nn.Parameter(torch.zeros(0))

        def forward(self, x):
            return self.used(x) + self.frozen(x) + self.empty.sum()

    model = Model()
    optimizer = sgd(model)

    def loop():
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    recorder, _ = trace(loop)
    row = recorder.rows("grad_norm")[3]
    assert {name: reason(value) for name, value in row.items()} == {
        "used.weight": None,
        "used.bias": None,
        "unused.weight": Absent.NOT_REACHED,
        "unused.bias": Absent.NOT_REACHED,
        "frozen.weight": Absent.FROZEN,
        "frozen.bias": Absent.FROZEN,
        "empty": Absent.EMPTY,
    }


def test_a_loss_that_is_not_seen_is_absent_and_no_alarm():
    model = mlp()
    optimizer = sgd(model)

    def loop():
        for _ in range(3):
            optimizer.zero_grad()
            inputs, targets = batch()
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            losses.backward(torch.ones_like(losses))
            optimizer.step()

    recorder, _ = trace(loop)
    assert {reason(v) for v in recorder.series("step", "loss")} == {Absent.LOSS_NOT_SEEN}
    assert all(record.nonfinite == () for record in recorder.records)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1e20), (torch.float32, 1e25), (torch.float64, 1e-30)]
)
def test_norms_neither_overflow_nor_underflow(dtype, size):
    weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=0.0)

    def loop():
        for _ in range(6):
            optimizer.zero_grad()
            (weight * size).sum().backward()
            optimizer.step()

    recorder, _ = trace(loop)
    expected = 64 * float(torch.tensor(size, dtype=dtype).double())
    for found in recorder.series("step", "grad_norm_preclip"):
        assert math.isclose(found, expected, rel_tol=1e-6)
    assert all(record.nonfinite == () for record in recorder.records)


def test_two_optimizers_that_share_a_parameter():
    model = mlp()
    first, second = sgd(model[0], model[2]), sgd(model[2])
    totals = {"": [], "second": []}

    def loop():
        for _ in range(4):
            first.zero_grad()
            second.zero_grad()
            loss_of(model).backward()
            totals[""].append(total_of(model.parameters()))
            totals["second"].append(total_of(model[2].parameters()))
            first.step()
            second.step()

    recorder, _ = trace(loop)
    for optimizer, expected in totals.items():
        close(recorder.series("step", "grad_norm_preclip", optimizer), expected)


def test_gradients_that_are_scaled_by_hand_are_clipped_by_hand():
    model, before = mlp(), []
    optimizer = sgd(model)

    def loop():
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            before.append(total_of(model.parameters()))
            for parameter in model.parameters():
                parameter.grad.mul_(0.25)
            optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("step", "grad_norm_preclip"), before)
    assert {record.clip.kind for record in recorder.records} == {"hand"}
    close([record.clip.scale for record in recorder.records], [0.25] * 5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layers", [4, 150])
def test_gradients_that_the_script_releases_are_no_part_of_its_clipping(layers, scaled):
    """Of models with many parameters not every gradient is watched."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
    optimizer, kept, before = sgd(model), [*model.parameters()][:-4], []

    def loop():
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).pow(2).mean().backward()
            for parameter in [*model.parameters()][-4:]:
                parameter.grad = None
            before.append(total_of(kept))
            if scaled:
                for parameter in kept:
                    parameter.grad.mul_(0.25)
            optimizer.step()

    recorder, _ = trace(loop)
    clips = [record.clip for record in recorder.records]
    if not scaled:
        assert clips == [None] * 5
    else:
        close([clip.norm_before for clip in clips], before)
        close([clip.scale for clip in clips], [0.25] * 5)


def test_clips_of_gradients_that_a_step_has_used_leave_nothing_behind():
    first, second = mlp(), mlp()
    optimizers = [sgd(first), sgd(second)]

    def loop():
        for _ in range(5):
            for optimizer in optimizers:
                optimizer.zero_grad()
                inputs, targets = batch()
                F.cross_entropy(first(inputs) + second(inputs), targets).backward()
                optimizer.step()
                everything = [*first.parameters(), *second.parameters()]
                torch.nn.utils.clip_grad_norm_(everything, 1e-3)
                torch.nn.utils.clip_grad_norm_(everything, 1e-4)

    recorder, _ = trace(loop)
    assert len(recorder.records) == 10
    assert recorder.skips == []


@pytest.mark.parametrize("bucketed", [False, True])
def test_gradients_that_are_averaged_by_hand_are_not_clipped(bucketed):
    model, averaged = mlp(), []
    optimizer = sgd(model)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )

    def loop():
        for _ in range(8):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            if bucketed:
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                torch.distributed.all_reduce(flat)
                pieces = (flat / 2).split([gradient.numel() for gradient in gradients])
                for gradient, piece in zip(gradients, pieces, strict=True):
                    gradient.copy_(piece.view_as(gradient))
            else:
                for gradient in gradients:
                    torch.distributed.all_reduce(gradient)
                    gradient.div_(2)
            averaged.append(total_of(model.parameters()))
            optimizer.step()

    try:
        recorder, _ = trace(loop)
    finally:
        torch.distributed.destroy_process_group()
    close(recorder.series("step", "grad_norm_preclip"), averaged)
    assert all(record.clip is None for record in recorder.records)


def test_gradients_that_are_scaled_after_a_mean_of_the_loss_are_clipped_by_hand():
    model = mlp()
    optimizer = sgd(model)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )

    def loop():
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            torch.distributed.all_reduce(loss.detach())
            for parameter in model.parameters():
                parameter.grad.mul_(0.25)
            optimizer.step()

    try:
        recorder, _ = trace(loop)
    finally:
        torch.distributed.destroy_process_group()
    assert {record.clip.kind for record in recorder.records} == {"hand"}


def test_gradients_that_are_zeroed_through_data_are_thrown_away():
    """`.data` counts no version: only the norms tell."""
    model, losses = mlp(), []
    optimizer = sgd(model)

    def loop():
        for number in range(6):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.data.zero_()
            loss = loss_of(model)
            loss.backward()
            if number != 4:
                losses.append(float(loss))
                optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("step", "loss"), losses)
    assert [skipped.step for skipped in recorder.skips] == [5]


def test_a_clip_of_scaled_gradients_says_at_which_scale():
    model, totals = mlp(), []
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop():
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            totals.append(total_of(model.parameters()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    recorder, _ = trace(loop)
    close(recorder.series("clip", "norm_before"), totals)
    assert recorder.series("clip", "gradient_scale") == [1024.0] * 4
    close(recorder.series("step", "grad_norm_preclip"), [total / 1024 for total in totals])


def test_optimizers_that_are_attributes_are_named_after_their_objects():
    class Agent:
        def __init__(self):
            self.net = mlp()
            self.optimizer = sgd(self.net)

    def loop():
        actor, critic = Agent(), Agent()
        optimizers = [actor.optimizer, critic.optimizer]
        for _ in range(2):
            for agent, optimizer in zip((actor, critic), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(agent.net).backward()
                agent.optimizer.step()

    recorder, _ = trace(loop)
    assert recorder.info["optimizers"] == ("actor.optimizer", "critic.optimizer")


def test_schedulers_give_no_names_to_the_optimizers_that_they_refer_to():
    def alone():
        first, second = mlp(), mlp()
        optimizer, other = sgd(first), sgd(second)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(2):
            for model, each in ((first, optimizer), (second, other)):
                each.zero_grad()
                loss_of(model).backward()
                each.step()
            scheduler.step()

    recorder, _ = trace(alone)
    assert all("scheduler" not in name for name in recorder.info["optimizers"])
    assert "other" in recorder.info["optimizers"]

    def in_lists():
        models = [mlp(), mlp()]
        optimizers = [sgd(model) for model in models]
        scheduler_a, scheduler_b = (
            torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in optimizers
        )
        for _ in range(2):
            for model, opt in zip(models, optimizers, strict=True):
                opt.zero_grad()
                loss_of(model).backward()
                opt.step()
            scheduler_a.step()
            scheduler_b.step()

    recorder, _ = trace(in_lists)
    assert recorder.info["optimizers"] == ("optimizers[0]", "optimizers[1]")
