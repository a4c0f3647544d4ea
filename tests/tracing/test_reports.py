"""What is shown of each phase while the run is stopped at its boundary."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch.nn import functional as F

from tests.tracing.support import EVERYTHING, KeepingRecorder, close, mlp
from tui_trainer.probes import PROBES
from tui_trainer.protocol import PHASES
from tui_trainer.protocol.messages import PhaseReport
from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.tracer import Tracer


def phase_by_phase(gate: Gate, boundaries: int) -> threading.Thread:
    """Somebody who steps through so many phases, and then lets the run go on."""

    def drive() -> None:
        for _ in range(boundaries):
            gate.call_soon(lambda: None, mid_step=True).result(20)
            while gate.mode != "paused":
                if gate.mode == "ended":
                    return
            gate.step_phase()
        gate.resume()

    driver = threading.Thread(target=drive)
    driver.start()
    return driver


def reports_of(
    steps: int = 2,
) -> tuple[dict[tuple[int, str], PhaseReport], list[dict], KeepingRecorder]:
    """Every phase of some steps, one at a time, and what the loop itself saw."""
    gate, recorder = Gate(paused=True), KeepingRecorder()
    seen: list[dict] = []

    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = phase_by_phase(gate, 7 * steps)
    with Tracer(recorder, gate, PROBES, EVERYTHING):
        for _ in range(steps):
            inputs, targets = torch.randn(4, 6), torch.randint(0, 3, (4,))
            optimizer.zero_grad()
            logits = model(inputs)
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            norms = [p.grad.norm().item() for p in model.parameters()]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            seen.append(
                {
                    "inputs": inputs,
                    "logits": logits.detach(),
                    "loss": loss.item(),
                    "norms": norms,
                    "ratios": [
                        ((p.detach() - b).norm() / b.norm()).item()
                        for p, b in zip(model.parameters(), before, strict=True)
                    ],
                }
            )
    gate.end()
    driver.join(20)
    return {(r.step, r.phase): r for r in recorder.reports}, seen, recorder


def quantity(report: PhaseReport, name: str) -> float | str:
    return next(q.value for q in report.quantities if q.name == name)


def test_every_phase_is_reported_with_what_the_loop_saw():
    reports, seen, recorder = reports_of()
    assert set(reports) >= {(step, phase) for step in (1, 2) for phase in PHASES[:-1]}
    for step, truth in enumerate(seen, start=1):
        data = reports[step, "data"]
        assert quantity(data, "inputs") == "float32 4×6"
        assert "targets" in data.summary
        forward = reports[step, "forward"]
        close(quantity(forward, "output mean"), truth["logits"].mean().item())
        close(quantity(forward, "output std"), truth["logits"].std().item())
        close(quantity(reports[step, "loss"], "loss"), truth["loss"])
        backward = reports[step, "backward"]
        total = float(np.linalg.norm(truth["norms"]))
        close(quantity(backward, "total norm"), total)
        (rows,) = backward.rows
        assert recorder.tables[rows.table].name == "grad_norm"
        close(np.frombuffer(rows.values, "<f4"), truth["norms"])
        assert np.frombuffer(rows.steps, "<i8").tolist() == [step]
        clip = reports[step, "clip"]
        close(quantity(clip, "norm before"), total)
        close(quantity(clip, "norm after"), min(total, 0.1), 1e-4)
    update = reports[1, "step"]
    largest = max(seen[0]["ratios"])
    found = [q.value for q in update.quantities if q.name.startswith("update ratio")]
    close(max(found), largest, 1e-4)


def test_zero_grad_report_counts_what_was_released():
    reports, _, _ = reports_of()
    assert quantity(reports[2, "zero_grad"], "gradients released (None)") == 4.0


def test_durations_are_those_of_the_phase():
    reports, _, _ = reports_of()
    assert all(0 <= report.duration_ms < 10_000 for report in reports.values())
    assert reports[1, "backward"].duration_ms > 0


def test_the_batch_that_is_shown_is_the_one_that_is_trained_on_however_a_loop_zeroes():
    torch.manual_seed(0)
    model, recorder, means = mlp(), KeepingRecorder(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(inputs: torch.Tensor) -> None:
        means.append(inputs.mean().item())
        model(inputs).square().mean().backward()
        optimizer.step()

    def zeroes_first() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            inputs = torch.randn(4, 6)
            train(inputs)

    def zeroes_last() -> None:
        optimizer.zero_grad()
        for _ in range(3):
            inputs = torch.randn(4, 6)
            train(inputs)
            optimizer.zero_grad()

    for loop in (zeroes_first, zeroes_last):
        gate = Gate(paused=True)
        driver = phase_by_phase(gate, 17)
        with Tracer(recorder, gate, PROBES, EVERYTHING):
            loop()
        gate.end()
        driver.join(20)
    found = [quantity(r, "input 1 mean") for r in recorder.reports if r.phase == "data"]
    close(found, means)
