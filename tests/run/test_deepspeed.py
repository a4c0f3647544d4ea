"""DeepSpeed's own clipping, in modules that stand for its own."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trace.support import CountingGate, KeepingRecorder
from tui_trainer.probes import PROBES
from tui_trainer.protocol.absent import Absent, why_absent
from tui_trainer.run.frameworks import DEEPSPEED_UTILITIES, DEEPSPEED_ZERO, _DeepSpeed
from tui_trainer.trace.module_calls import Patches
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer


def clip_grad_norm_(
    parameters: Any, max_norm: float, norm_type: float = 2, mpu: Any = None
) -> torch.Tensor:
    given = list(parameters)
    total = torch.stack([p.grad.norm() for p in given]).norm()
    for parameter in given:
        parameter.grad.data.mul_(max_norm / total)
    return total


class Zero:
    """An optimizer that trains one partition with the parameters in it."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)
        self.partition = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.optimizer = torch.optim.Adam([self.partition.requires_grad_()])

    def unscale_and_clip_grads(self, gradient: torch.Tensor, total: torch.Tensor) -> None:
        gradient.mul_(0.1 / total)

    def step(self) -> None:
        gradient = torch.cat([p.grad.reshape(-1) for p in self.parameters])
        self.partition.grad = gradient
        self.unscale_and_clip_grads(gradient, gradient.norm())
        self.optimizer.step()


@pytest.mark.parametrize("partitioned", [False, True])
def test_clipping(partitioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    utilities, zero = ModuleType(DEEPSPEED_UTILITIES), ModuleType(next(iter(DEEPSPEED_ZERO)))
    utilities.clip_grad_norm_ = clip_grad_norm_  # type: ignore[attr-defined]
    zero.DeepSpeedZeroOptimizer = Zero  # type: ignore[attr-defined]
    for module in (utilities, zero):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = torch.nn.Linear(4, 1)
    recorder, gate, patches = KeepingRecorder(), CountingGate(), Patches()
    losses, norms = [], []
    with Tracer(recorder, gate, PROBES, ProbeOptions(budget=0.0)) as tracer:
        run: Any = SimpleNamespace(recorder=recorder)
        observer = _DeepSpeed(run, SimpleNamespace(), patches, tracer)  # type: ignore[arg-type]
        observer.observe_clipping()
        observer.observe_zero(zero.__name__, "DeepSpeedZeroOptimizer")
        optimizer = (
            Zero(model.parameters()) if partitioned else torch.optim.Adam(model.parameters())
        )
        for _ in range(4):
            model.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            losses.append(loss.item())
            loss.backward()
            if not partitioned:
                norms.append(
                    utilities.clip_grad_norm_(
                        parameters=model.parameters(), max_norm=0.1, mpu=None
                    ).item()
                )
            optimizer.step()
    patches.restore()
    assert not recorder.notices_of("fault")
    assert utilities.clip_grad_norm_ is clip_grad_norm_
    assert recorder.series("step", "loss") == pytest.approx(losses)
    totals = recorder.series("step", "grad_norm_preclip")
    if partitioned:
        assert {why_absent(total) for total in totals} == {Absent.CHANGED_BY_FRAMEWORK}
    else:
        assert totals == pytest.approx(norms)
        assert [r.clip.norm_before for r in recorder.records if r.clip] == pytest.approx(norms)
