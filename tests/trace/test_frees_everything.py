"""What the training frees is free at once: nothing of ours keeps a gradient, an activation or a
loss until the garbage collector comes by."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trace.support import EVERYTHING, CountingGate, KeepingRecorder, SmallGpt
from tui_trainer.probes import PROBES
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer

CLIPPINGS: dict[str, Callable[[nn.Module], object]] = {
    "by norm": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "by norm, parts": lambda model: [
        torch.nn.utils.clip_grad_norm_(p, 0.1) for p in model.parameters()
    ],
    "infinity norm": lambda model: torch.nn.utils.clip_grad_norm_(
        model.parameters(), 0.1, norm_type=float("inf")
    ),
    "by value": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "none": lambda model: None,
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive_after(steps: int, clip: Callable[[nn.Module], object]) -> list[str]:
    """What of a step is still there when the next one begins."""
    torch.manual_seed(0)
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(1, steps + 1):
        tokens = torch.randint(0, 11, (2, 9))
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        clip(model)
        optimizer.step()
        kept = {f"gradient of {n}": weakref.ref(p.grad) for n, p in model.named_parameters()}
        kept |= {"logits": weakref.ref(logits), "loss": weakref.ref(loss)}
        del tokens, logits, loss
        optimizer.zero_grad(set_to_none=True)
        found += [f"step {step}: {name}" for name, it in kept.items() if it() is not None]
    return found


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("options", [EVERYTHING, ProbeOptions()], ids=["everything", "default"])
def test_nothing_of_a_step_outlives_it(no_collector, clipping, options):
    clip = CLIPPINGS[clipping]
    assert alive_after(2, clip) == []
    recorder, gate = KeepingRecorder(), CountingGate()
    with Tracer(recorder, gate, PROBES, options):
        assert alive_after(5, clip) == []
    assert len(recorder.records) == 5
    assert recorder.notices_of("fault") == []


def test_nor_does_it_when_looked_at_in_every_phase(no_collector):
    gate = Gate(paused=True)

    class Steps(KeepingRecorder):
        def report(self, report) -> None:
            super().report(report)
            if report is not None:
                gate.step_phase()

    recorder = Steps()
    with Tracer(recorder, gate, PROBES, EVERYTHING):
        assert alive_after(4, CLIPPINGS["by norm"]) == []
    assert len(recorder.reports) > 4
