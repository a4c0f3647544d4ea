"""Under a GradScaler: losses and norms as they would be without it; skipped steps are no steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.trace.support import batch, close, mlp, trace


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_losses_and_norms_are_unscaled(unscale, clip, fused):
    if clip and not unscale:
        pytest.skip("clipping scaled gradients is a mistake of the script's")
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []

    def loop():
        for _ in range(4):
            inputs, targets = batch()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            expected.append((loss.item(), [g.norm().item() for g in gradients]))
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            scaler.step(optimizer)
            scaler.update()

    recorder, _ = trace(loop)
    close(recorder.series("step", "loss"), [loss for loss, _ in expected])
    for row, (_, norms) in zip(recorder.rows("grad_norm").values(), expected, strict=True):
        close(list(row.values()), norms)
    assert recorder.notices_of("skipped_step") == []
    if clip:
        totals = [float(torch.tensor(norms).norm()) for _, norms in expected]
        close(recorder.series("clip", "norm_before"), totals)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("fused", [False, True])
def test_skipped_step_is_reported(unscale, clip, fused):
    if clip and not unscale:
        pytest.skip("clipping scaled gradients is a mistake of the script's")
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop():
        for number in range(4):
            inputs, targets = batch()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            if number == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if clip == "norm":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            elif clip == "value":
                torch.nn.utils.clip_grad_value_(model.parameters(), 1e-2)
            scaler.step(optimizer)
            scaler.update()

    recorder, gate = trace(loop)
    losses = recorder.series("step", "loss")
    if fused:  # it is called, and skips the update itself: a step that changes nothing
        (said,) = recorder.notices_of("skipped_step")
        assert said.endswith("loss scale 1024")
        assert recorder.skips == []
        assert [record.step for record in recorder.records] == [1, 2, 3, 4]
        assert [abs(loss) < 10 for loss in losses] == [True, False, True, True]
    else:
        (skip,) = recorder.skips
        assert (skip.step, skip.reason, skip.loss_scale) == (2, "scaler", 1024.0)
        assert "loss scale 1024" in skip.text
        assert [record.step for record in recorder.records] == [1, 2, 3]
        assert all(abs(loss) < 10 for loss in losses)
        assert gate.phases(2).count("step") == 1


def test_two_optimizers_skip_by_themselves():
    torch.manual_seed(0)
    models = [mlp(), mlp()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, fused=True) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def loop():
        for number in range(3):
            for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                inputs, targets = batch()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                scaler.scale(loss * (float("inf") if number == index == 1 else 1)).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
            scaler.update()

    recorder, _ = trace(loop)
    assert [text for text in recorder.notices_of("skipped_step") if text.endswith("scale 64")]
    assert len(recorder.notices_of("skipped_step")) == 1


def test_disabled_scaler_is_no_scaler():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def loop():
        for _ in range(3):
            inputs, targets = batch()
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(inputs), targets)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

    recorder, _ = trace(loop)
    assert len(recorder.records) == 3
    assert recorder.notices_of("skipped_step") == []
