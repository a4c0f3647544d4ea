"""What is shown of each phase while the run is stopped at its boundary."""

from __future__ import annotations

import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.trace.support import EVERYTHING, KeepingRecorder, close, mlp, trace
from tui_trainer.probes import PROBES, update_ratio
from tui_trainer.protocol import PHASES
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.messages import PhaseReport
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.live_values import LiveValues
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.step import Clipping
from tui_trainer.trace.tracer import Tracer


def phase_by_phase(gate: Gate, boundaries: int) -> threading.Thread:
    """Step through this many phases on another thread, then resume."""

    def drive() -> None:
        for _ in range(boundaries):
            gate.call_soon(lambda: None, mid_step=True).result(240)
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
    options: ProbeOptions = EVERYTHING,
) -> tuple[dict[tuple[int, str], PhaseReport], list[dict], KeepingRecorder]:
    """Every phase of some steps, one at a time, and what the loop itself saw."""
    gate, recorder = Gate(paused=True), KeepingRecorder()
    seen: list[dict] = []

    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = phase_by_phase(gate, 7 * steps)
    with Tracer(recorder, gate, PROBES, options):
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
    driver.join(240)
    return {(r.step, r.phase): r for r in recorder.reports}, seen, recorder


def quantity(report: PhaseReport, name: str) -> float | str:
    return next(q.value for q in report.quantities if q.name == name)


def test_phase_reports_agree_with_the_loop():
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


SMALL_COPIES = ProbeOptions(budget=0.0, copy_budget_bytes=200)
"""The weights of these models take 332 bytes: at speed they are measured in two turns."""


def test_the_update_of_a_single_step_covers_all_parameters_despite_the_copy_budget():
    reports, seen, recorder = reports_of(3, SMALL_COPIES)
    rows = recorder.rows("update_ratio")
    for step in (1, 2, 3):
        report = reports[step, "step"]
        found = {q.name: q.value for q in report.quantities}
        ratios = [v for name, v in found.items() if name.startswith("update ratio")]
        close(sorted(ratios), sorted(seen[step - 1]["ratios"]), 1e-4)
        close(list(rows[step].values()), seen[step - 1]["ratios"], 1e-4)
        assert found["norm of the update"] > 0
        assert report.summary == f"step {step} is complete"


@pytest.mark.parametrize("careful", [False, True])
def test_a_step_that_is_paused_in_backward_is_measured_in_full(careful: bool):
    """Its gradients stay on the screen when the step is completed, although none was due in it.
    `careful`: gradients are read at once in this script, since it changes them by itself."""
    torch.manual_seed(0)
    tables = ("grad_norm", "weight_norm", "update_ratio")
    options = ProbeOptions(budget=0.0, cadences=dict.fromkeys(tables, 8))
    model, recorder, gate = mlp(), KeepingRecorder(), Gate()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def go_on() -> None:
        while gate.mode != "paused":
            time.sleep(0.001)
        seen.append((gate.phase, gate.step_in_progress))
        gate.step()
        while gate.mode != "paused":
            time.sleep(0.001)
        seen.append((gate.phase, gate.step_in_progress))
        gate.resume()

    driver = threading.Thread(target=go_on)
    driver.start()
    with Tracer(recorder, gate, PROBES, options):
        for step in range(1, 15):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,)))
            hook = model[0].weight.register_hook(
                lambda _, at=step: gate.pause() if at == 12 else None
            )
            loss.backward()
            hook.remove()
            if careful:
                for parameter in model.parameters():
                    parameter.grad.mul_(0.5)
            optimizer.step()
    gate.end()
    driver.join(240)
    assert seen == [("backward", 12), ("step", 12)]
    for name in tables:
        assert 12 in recorder.rows(name)
        assert 11 not in recorder.rows(name)
    (shown,) = next(r.rows for r in recorder.reports if r.phase == "backward")
    close(list(recorder.rows("grad_norm")[12].values()), np.frombuffer(shown.values, "<f4"))


def test_a_step_that_a_breakpoint_stops_at_is_measured_in_full_without_a_module():
    torch.manual_seed(0)
    tables = ("grad_norm", "weight_norm", "update_ratio")
    options = ProbeOptions(budget=0.0, cadences=dict.fromkeys(tables, 8))
    weights = [torch.randn(6, 3, requires_grad=True), torch.zeros(3, requires_grad=True)]
    optimizer = torch.optim.SGD(weights, lr=0.1)

    def loop() -> None:
        for _ in range(15):
            optimizer.zero_grad()
            logits = torch.randn(4, 6) @ weights[0] + weights[1]
            F.cross_entropy(logits, torch.randint(0, 3, (4,))).backward()
            optimizer.step()

    gate = Gate()
    gate.break_steps = frozenset((12,))
    recorder, _ = trace(loop, options=options, gate=gate)
    for name in tables:
        assert {11, 12, 13}.intersection(recorder.rows(name)) == {12}


@pytest.mark.parametrize("kind", ["norm", "value", "hand"])
def test_clips_within_a_step_are_those_of_the_table(kind):
    def clipping(before, after):
        return Clipping(kind, 2.0, before, after, None, kind == "norm", {})

    def live(*clips):
        measurers = [SimpleNamespace(clips=list(clips))]
        return LiveValues(SimpleNamespace(registry=SimpleNamespace(measurers=measurers))).clip()

    after = None if kind == "norm" else torch.tensor(2.0)
    known = live(clipping(torch.tensor(8.0), after), clipping(torch.tensor(2.0), after))
    close([known["norm_before"], known["norm_after"], known["scale"]], [8.0, 2.0, 0.25])
    assert math.isnan(live(clipping(torch.tensor(math.nan), after))["scale"])
    unknown = live(clipping(absent(Absent.CHANGED_BY_HAND), after))
    assert not {"norm_before", "scale"}.intersection(unknown)


def test_a_parameter_that_no_optimizer_updates_is_not_taken_for_one_that_is_lost():
    torch.manual_seed(0)
    model, recorder, gate = mlp(), KeepingRecorder(), Gate(paused=True)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    driver = phase_by_phase(gate, 12)
    with Tracer(recorder, gate, PROBES, EVERYTHING):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
            optimizer.step()
    gate.end()
    driver.join(240)
    report = next(r for r in recorder.reports if (r.step, r.phase) == (2, "step"))
    assert report.summary == "step 2 is complete"
    named = [q.name for q in report.quantities if q.name.startswith("update ratio")]
    assert sorted(named) == ["update ratio of 2.bias", "update ratio of 2.weight"]


def test_weights_too_large_to_copy_are_reported(monkeypatch):
    monkeypatch.setattr(update_ratio, "MAX_HOST_BYTES", 300)
    reports, _, _ = reports_of(2, SMALL_COPIES)
    summary = reports[2, "step"].summary
    assert summary.startswith(
        "step 2 is complete; its update is not shown: a copy of the weights takes"
    )
    assert not any("update" in q.name for q in reports[2, "step"].quantities)


def test_a_copy_without_memory_is_reported_and_switches_nothing_off(monkeypatch):
    monkeypatch.setattr(update_ratio, "room_before_pause", lambda *_: 1 << 60)
    copied = []

    def no_room(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor)
        if len(copied) == 4:  # the last parameter of the first step
            raise torch.OutOfMemoryError("out of memory")
        return tensor.clone()

    monkeypatch.setattr(update_ratio, "_copy", no_room)
    reports, seen, recorder = reports_of(2, SMALL_COPIES)
    assert "could not be allocated: out of memory" in reports[1, "step"].summary
    assert "update ratio of 0.weight" in {q.name for q in reports[2, "step"].quantities}
    close(list(recorder.rows("update_ratio")[2].values()), seen[1]["ratios"], 1e-4)
    assert recorder.notices_of("fault") == []


def test_clipping_together_reports_every_optimizer():
    torch.manual_seed(0)
    model, recorder, gate = mlp(), KeepingRecorder(), Gate(paused=True)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    norms = []
    driver = phase_by_phase(gate, 15)
    with Tracer(recorder, gate, PROBES, EVERYTHING):
        for _ in range(2):
            inputs, targets = torch.randn(4, 6), torch.randint(0, 3, (4,))
            first.zero_grad()
            second.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            norms.append([p.grad.norm().item() for p in model.parameters()])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            first.step()
            second.step()
    gate.end()
    driver.join(240)
    report = [r for r in recorder.reports if r.phase == "clip"][-1]
    total = float(np.linalg.norm(norms[-1]))
    assert total > 0.1
    close(quantity(report, "norm before"), total)
    close(quantity(report, "norm after"), 0.1, 1e-4)
    close(quantity(report, "scale"), 0.1 / total, 1e-4)
    close(quantity(report, "norm before (second)"), float(np.linalg.norm(norms[-1][2:])))
    shares = {name: quantity(report, f"share of {name}") for name, _ in model.named_parameters()}
    close(list(shares.values()), [(n / total) ** 2 for n in norms[-1]])


def test_zero_grad_report_counts_what_was_released():
    reports, _, _ = reports_of()
    assert quantity(reports[2, "zero_grad"], "gradients released (None)") == 4.0


def test_durations_are_those_of_the_phase():
    reports, _, _ = reports_of()
    assert all(0 <= report.duration_ms < 10_000 for report in reports.values())
    assert reports[1, "backward"].duration_ms > 0


def test_the_reported_batch_is_the_one_trained_on_wherever_the_loop_zeroes():
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
        driver.join(240)
    found = [quantity(r, "inputs mean") for r in recorder.reports if r.phase == "data"]
    close(found, means)
