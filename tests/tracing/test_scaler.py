"""Under a GradScaler: losses and norms as they would be without it; skipped steps are no steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.tracing.support import batch, close, mlp, trace


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
    assert recorder.said("skipped_step") == []
    if clip:
        totals = [float(torch.tensor(norms).norm()) for _, norms in expected]
        close(recorder.series("clip", "norm_before"), totals)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_step_is_said(fused):
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
            scaler.step(optimizer)
            scaler.update()

    recorder, gate = trace(loop)
    (said,) = recorder.said("skipped_step")
    assert "1024" in said
    if not fused:  # a fused optimizer is called, and skips the update itself
        assert [record.step for record in recorder.records] == [1, 2, 3]
        assert all(abs(loss) < 10 for loss in recorder.series("step", "loss"))
        assert gate.phases(2).count("step") == 1


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
    assert recorder.said("skipped_step") == []
