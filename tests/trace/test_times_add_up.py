"""The times of phases, and of what lies between them, add up to the step in every kind of loop."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from tests.trace.support import CountingGate, KeepingRecorder, trace

STEPS = 6


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 4), torch.randn(4, 2)


def evaluate(model: torch.nn.Module, batches: int = 3) -> None:
    model.eval()
    with torch.no_grad():
        for _ in range(batches):
            inputs, targets = batch()
            F.mse_loss(model(inputs), targets)
    model.train()


def save(model: torch.nn.Module) -> None:
    torch.save(model.state_dict(), io.BytesIO())


def backward(model: torch.nn.Module) -> torch.Tensor:
    inputs, targets = batch()
    loss = F.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


def plain() -> None:
    model, optimizer = make()
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def like_a_trainer() -> None:
    """Accumulation, clipping, a scheduler, `zero_grad` at the end, evaluation and checkpoints."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for step in range(STEPS):
        for _ in range(3):
            backward(model).item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        if step % 2:
            evaluate(model)
            save(model)


def evaluates_within_a_step() -> None:
    model, optimizer = make()
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model)
        evaluate(model)
        optimizer.step()
        save(model)


def with_closure() -> None:
    model, _ = make()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    inputs, targets = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        evaluate(model)


def two_optimizers() -> None:
    model, _ = make()
    first, second = (torch.optim.SGD(part.parameters(), lr=0.01) for part in (model[0], model[2]))
    for _ in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        backward(model)
        torch.nn.utils.clip_grad_norm_(model[2].parameters(), 0.1)
        first.step()
        second.step()


def skips_batches() -> None:
    model, optimizer = make()
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model)
        if step == 2:
            optimizer.zero_grad()
            continue
        optimizer.step()


def discards_behind_the_next_forward() -> None:
    """That the gradients of a batch are thrown away is seen once the next one is under way."""
    model, optimizer = make()
    for step in range(STEPS):
        inputs, targets = batch()
        loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        if step != 2:
            optimizer.step()


def scaled() -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch()
        scaler.scale(F.mse_loss(model(inputs), targets)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def by_hand() -> None:
    model, optimizer = make()
    del optimizer
    for _ in range(STEPS):
        backward(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        model.zero_grad()
        evaluate(model)


LOOPS: list[Callable[[], None]] = [
    plain,
    like_a_trainer,
    evaluates_within_a_step,
    with_closure,
    two_optimizers,
    skips_batches,
    discards_behind_the_next_forward,
    scaled,
    by_hand,
]


def times_of(recorder: KeepingRecorder) -> list[tuple[float, dict[str, float]]]:
    """(duration, times that are there) of each step."""
    found = []
    for optimizer in dict.fromkeys(table.optimizer for table in recorder.tables):
        steps = recorder.rows("step", optimizer)
        for step, row in recorder.rows("phase_ms", optimizer).items():
            there = {name: ms for name, ms in row.items() if not math.isnan(ms)}
            found.append((steps[step]["step_ms"], there))
    return found


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_times_add_up_to_the_step(loop, monkeypatch):
    """Whatever passes between two readings of the clock: here a second between any two."""
    clock = itertools.count(1.0).__next__
    monkeypatch.setattr("tui_trainer.trace.phase_clocks.perf_counter", clock)
    recorder, _ = trace(loop)
    found = times_of(recorder)
    assert len(found) >= STEPS - 1
    for step_ms, times in found:
        assert sum(times.values()) == pytest.approx(step_ms, rel=1e-4)
        assert min(times.values()) > 0


def test_evaluations_and_checkpoints_have_their_own_time():
    recorder, _ = trace(like_a_trainer)
    for step, row in recorder.rows("phase_ms").items():
        follows = step > 1 and step % 2 == 1  # the evaluation of the step before
        assert (row["eval"] > 0) == follows
        assert (row["checkpoint"] > 0) == follows


def test_saving_as_safetensors_is_a_checkpoint(tmp_path):
    def loop():
        model, optimizer = make()
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            if step % 2:
                safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))

    original = safetensors.torch.save_file
    recorder, _ = trace(loop)
    assert safetensors.torch.save_file is original
    for step, row in recorder.rows("phase_ms").items():
        assert (row["checkpoint"] > 0) == (step > 1 and step % 2 == 1)


def test_time_in_the_gate_is_no_time_of_the_step():
    gate = CountingGate()
    gate.call_every([1], lambda step: torch.randn(100, 100).svd())
    recorder, _ = trace(like_a_trainer, gate=gate)
    assert gate.idle_s > 0
    for step_ms, times in times_of(recorder):
        assert sum(times.values()) == pytest.approx(step_ms, rel=0.01)


def test_torch_save_is_restored():
    original = torch.save
    trace(plain)
    assert torch.save is original
