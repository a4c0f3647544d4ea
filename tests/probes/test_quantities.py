"""Every quantity compared with a slow, plain reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.examples import examples
from tests.trace.support import (
    EVERYTHING,
    KeepingRecorder,
    SmallGpt,
    batch,
    close,
    gpt_loop,
    mlp,
    plain_loop,
    trace,
)
from tui_trainer.probes.update_ratio import in_turns
from tui_trainer.protocol.absent import Absent, why_absent
from tui_trainer.trace.probe import ProbeOptions


class Reference:
    """Does the steps of `plain_loop` by itself and notes what should have been measured."""

    def __init__(self, steps: int, max_norm: float) -> None:
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.names = [name for name, _ in model.named_parameters()]
        self.steps: list[dict] = []
        for _ in range(steps):
            inputs, targets = batch()
            loss = F.cross_entropy(model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norms = [float(g.double().norm()) for g in gradients]
            total = float(np.sqrt(sum(n * n for n in norms)))
            before = [p.detach().double().clone() for p in model.parameters()]
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            after = [p.detach().double() for p in model.parameters()]
            self.steps.append(
                {
                    "loss": loss.item(),
                    "norms": norms,
                    "total": total,
                    "scale": min(1.0, max_norm / (total + 1e-6)),
                    "weights": [float(p.norm()) for p in after],
                    "ratios": [
                        float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)
                    ],
                }
            )


def traced(steps: int, max_norm: float, options: ProbeOptions = EVERYTHING) -> KeepingRecorder:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder, _ = trace(lambda: plain_loop(model, optimizer, steps, max_norm), options=options)
    return recorder


@pytest.mark.parametrize("max_norm", [0.3, 100.0])
def test_step_norms_clips_and_updates(max_norm):
    truth = Reference(12, max_norm)
    options = ProbeOptions(budget=0.0, cadences={"update_ratio": 1, "weight_norm": 1})
    recorder = traced(12, max_norm, options)
    assert [c.name for c in recorder.table("grad_norm").columns] == truth.names
    for number, expected in enumerate(truth.steps, start=1):
        step = recorder.rows("step")[number]
        close(step["loss"], expected["loss"])
        close(step["grad_norm_preclip"], expected["total"])
        assert step["learning_rate"] == pytest.approx(1e-2)
        close(list(recorder.rows("grad_norm")[number].values()), expected["norms"])
        close(list(recorder.rows("weight_norm")[number].values()), expected["weights"])
        close(list(recorder.rows("update_ratio")[number].values()), expected["ratios"], 1e-4)
        clip = recorder.rows("clip")[number]
        close(clip["max_norm"], max_norm)
        close(clip["norm_before"], expected["total"])
        close(clip["scale"], expected["scale"])
        close(clip["norm_after"], expected["total"] * expected["scale"])


def test_clip_event_names_the_parameters_that_dominate():
    truth = Reference(1, 0.1).steps[0]
    event = traced(1, 0.1).records[0].clip
    assert event is not None
    shares = [n * n / truth["total"] ** 2 for n in truth["norms"]]
    order = sorted(range(4), key=lambda i: -shares[i])
    assert event.parameters == tuple(order)
    close(event.shares, [shares[i] for i in order])
    assert traced(1, 1e3).records[0].clip is None


def test_clip_by_value():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []

    def total() -> float:
        return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())

    def loop():
        for _ in range(3):
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            before = total()
            nn.utils.clip_grad_value_(model.parameters(), 0.05)
            norms.append((before, total()))
            optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("clip", "norm_before"), [before for before, _ in norms])
    close(recorder.series("clip", "norm_after"), [after for _, after in norms])
    close(recorder.series("clip", "scale"), [after / before for before, after in norms])
    close(recorder.series("step", "grad_norm_preclip"), [before for before, _ in norms])
    assert recorder.records[0].clip.kind == "value"


def test_groups_clipped_apart_show_the_hardest():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = []

    def loop():
        inputs, targets = batch()
        F.cross_entropy(model(inputs), targets).backward()
        for layer, limit in ((model[0], 1e-1), (model[2], 1e-3)):
            norm = nn.utils.clip_grad_norm_(layer.parameters(), limit)
            scales.append(min(1.0, limit / (norm.item() + 1e-6)))
        optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("clip", "scale"), [min(scales)])
    norms = list(recorder.rows("grad_norm")[1].values())
    close(recorder.series("step", "grad_norm_preclip"), [np.linalg.norm(norms)])


@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_that_no_longer_gives_every_norm(foreach):
    """First all at once, then one layer alone, then in another way."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []

    def loop():
        for step in range(6):
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            norms.append([p.grad.norm().item() for p in model.parameters()])
            clipped = model[0] if step in (2, 3) else model
            nn.utils.clip_grad_norm_(
                clipped.parameters(), 1e-2, foreach=foreach if step > 4 else None
            )
            optimizer.step()

    recorder, _ = trace(loop)
    for row, expected in zip(recorder.rows("grad_norm").values(), norms, strict=True):
        close(list(row.values()), expected, 1e-4)


def test_clipping_that_raises_on_non_finite_norms():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []

    def loop():
        for step in range(4):
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            norms.append([p.grad.norm().item() for p in model.parameters()])
            if step == 2:
                model[0].weight.grad[0, 0] = float("inf")
                with pytest.raises(RuntimeError):
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
                model[0].weight.grad.zero_()
                norms[-1][0] = float("inf")  # what the script set in place of the gradient
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2, error_if_nonfinite=True)
            optimizer.step()

    recorder, _ = trace(loop)
    for row, expected in zip(recorder.rows("grad_norm").values(), norms, strict=True):
        close(list(row.values()), expected, 1e-4)


def test_infinity_norm_clipping():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    largest = []

    def loop():
        inputs, targets = batch()
        F.cross_entropy(model(inputs), targets).backward()
        largest.append(max(p.grad.abs().max().item() for p in model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2, norm_type=float("inf"))
        optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("clip", "norm_before"), largest)
    norms = list(recorder.rows("grad_norm")[1].values())
    close(recorder.series("step", "grad_norm_preclip"), [np.linalg.norm(norms)])


@pytest.mark.parametrize("norm_type", [2.0, float("inf"), None])
def test_clipping_with_a_norm_that_the_script_gives(norm_type):
    """The shares are of Σ‖g‖², whatever norm the gradients are clipped by. None: the script
    computes the largest element by itself."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    squares, totals = [], []

    def loop():
        for _ in range(8):  # in the first steps every norm is measured anyway
            optimizer.zero_grad()
            inputs, targets = batch()
            F.cross_entropy(model(inputs), targets).backward()
            gradients = [p.grad for p in model.parameters()]
            squares.append([(g.double() ** 2).sum().item() for g in gradients])
            if norm_type is None:
                total = torch.stack([g.abs().max() for g in gradients]).max()
            else:
                total = nn.utils.get_total_norm(gradients, norm_type)
            totals.append(total.item())
            nn.utils.clip_grads_with_norm_(model.parameters(), 1e-2, total)
            optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("clip", "norm_before"), totals)
    close(recorder.series("step", "grad_norm_preclip"), [sum(each) ** 0.5 for each in squares])
    for record, each, total in zip(recorder.records, squares, totals, strict=True):
        shares = np.array(each) / sum(each)
        close(record.clip.scale, 1e-2 / total, 1e-3)
        assert record.clip.parameters == tuple(np.argsort(-shares).tolist())
        close(record.clip.shares, sorted(shares, reverse=True))


def test_parameter_without_gradient_has_no_norm():
    model = mlp()
    model.unused = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        for _ in range(2):
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model[2](model[1](model[0](inputs))), targets).backward()
            optimizer.step()

    recorder, _ = trace(loop)
    norm = recorder.rows("grad_norm")[2]["unused.weight"]
    assert why_absent(norm) is Absent.NOT_REACHED
    assert recorder.records[1].nonfinite == ()


def test_sparse_gradients():
    torch.manual_seed(0)
    embedding = nn.Embedding(9, 4, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    norms = []

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            embedding(torch.tensor([1, 1, 3])).square().sum().backward()
            norms.append(embedding.weight.grad.to_dense().norm().item())
            optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("grad_norm", "weight"), norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_accumulated_in_full(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(300, 200, bias=False).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    norms = []

    def loop():
        layer(torch.randn(4, 300, dtype=dtype)).sum().backward()
        norms.append(layer.weight.grad.double().norm().item())
        optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("grad_norm", "weight"), norms, 1e-4)
    close(recorder.series("weight_norm", "weight"), [layer.weight.double().norm().item()], 1e-4)


def test_update_ratios_in_turns_are_recorded_once_all_are_measured():
    truth = Reference(12, 0.3)
    options = ProbeOptions(budget=0.0, cadences={"update_ratio": 1}, copy_budget_bytes=200)
    recorder = traced(12, 0.3, options)
    rows = recorder.rows("update_ratio")
    turns = in_turns(list(mlp().parameters()), 200)
    assert len(turns) == 2
    assert list(rows) == [2, 4, 6, 8, 10, 12]
    for step, row in rows.items():
        for offset, turn in enumerate(turns):
            ratios = truth.steps[step - len(turns) + offset]["ratios"]
            close([list(row.values())[i] for i in turn], [ratios[i] for i in turn], 1e-4)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), budget=st.integers(4, 400))
@settings(max_examples=examples(50))
def test_turns_hold_every_parameter_once_within_the_budget(sizes, budget):
    parameters = [torch.empty(size) for size in sizes]
    turns = in_turns(parameters, budget)
    assert [i for turn in turns for i in turn] == list(range(len(sizes)))
    assert all(sum(4 * sizes[i] for i in turn) <= budget or len(turn) == 1 for turn in turns)


def test_nonfinite_is_reported_once_with_the_first_parameter_and_again_after_recovery():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    poison = {3: float("nan"), 4: float("nan"), 6: float("inf")}

    def loop():
        for step in range(1, 8):
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            if step in poison:
                model[2].weight.grad[0, 0] = poison[step]
            if step == 7:
                with torch.no_grad():
                    model[0].bias[1] = float("nan")
            optimizer.step()

    # lr 0: a NaN gradient would still make NaN weights, so those are put back
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.register_step_post_hook(lambda *_: None)

    def healing_loop():
        hook = optimizer.register_step_post_hook(
            lambda o, a, k: (
                model.load_state_dict(kept) if torch.isnan(model[2].weight).any() else None
            )
        )
        loop()
        hook.remove()

    recorder, _ = trace(healing_loop, options=ProbeOptions(budget=0.0, cadences={"weight_norm": 1}))
    reported = {r.step: r.nonfinite for r in recorder.records if r.nonfinite}
    gradients = {step: [f for f in found if f[0] == "gradient"] for step, found in reported.items()}
    assert gradients[3] == [("gradient", "2.weight", "nan", 2)]
    assert 4 not in gradients or gradients[4] == []
    assert gradients[6] == [("gradient", "2.weight", "inf", 5)]
    assert ("weight", "0.bias", "nan", 6) in reported[7]


def test_nan_in_a_gradient_that_is_clipped_but_in_no_optimizer_is_named_at_its_step():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    poisoned = [False]
    model[2].weight.register_hook(lambda g: g * float("nan") if poisoned[0] else g)

    def loop():
        for step in range(1, 7):
            inputs, targets = batch()
            model.zero_grad()
            poisoned[0] = step == 6
            F.cross_entropy(model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    recorder, _ = trace(loop, options=ProbeOptions(budget=0.0))
    found = [(r.step, *each[:3]) for r in recorder.records for each in r.nonfinite]
    assert [each for each in found if each[1] == "gradient"] == [(6, "gradient", "2.weight", "nan")]


def test_a_late_finding_has_the_last_finite_step():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loop():
        for step in range(1, 10):
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            if step >= 6:
                model[2].weight.grad[0, 0] = float("nan")
            optimizer.step()

    cadences = {"grad_norm": 4, "weight_norm": 4}
    recorder, _ = trace(loop, options=ProbeOptions(budget=0.0, cadences=cadences))
    reported = {r.step: r.nonfinite for r in recorder.records if r.nonfinite}
    assert reported == {
        7: (  # the weights are NaN by then, and so is the loss: the others are measured at once
            ("loss", "", "nan", 6),
            ("gradient", "0.weight", "nan", 5),
            ("weight", "0.weight", "nan", 5),
        ),
    }


@pytest.mark.parametrize("clips", [False, True])
def test_weights_that_become_nan_are_seen_at_their_step_whatever_the_cadence(clips: bool):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        for step in range(1, 10):
            inputs, targets = batch()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            (loss * float("nan") if step >= 6 else loss).backward()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    cadences = {"grad_norm": 4, "weight_norm": 64}
    recorder, _ = trace(loop, options=ProbeOptions(budget=0.0, cadences=cadences))
    found = [(r.step, *each[:3]) for r in recorder.records for each in r.nonfinite]
    assert found == [
        (6, "loss", "", "nan"),
        (6, "gradient", "0.weight", "nan"),
        (6, "weight", "0.weight", "nan"),
    ]
    measured = [step for step in recorder.rows("weight_norm") if step > 1]
    assert measured == [6, 7, 8]


def test_non_finite_loss():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        inputs, targets = batch()
        (F.cross_entropy(model(inputs), targets) * float("inf")).backward()
        optimizer.step()

    recorder, _ = trace(loop)
    assert ("loss", "", "inf", None) in recorder.records[0].nonfinite


def test_memory_by_the_clock(monkeypatch):
    monkeypatch.setattr("tui_trainer.probes.step.monotonic", lambda: 100.0)
    recorder = traced(5, 1.0)
    rows = recorder.rows("memory")
    assert list(rows) == [1]
    assert recorder.table("memory").every == 0
    assert rows[1]["host_bytes"] > 1e7
    assert np.isnan(rows[1]["device_bytes"])


def test_overhead_is_recorded_by_probe():
    torch.manual_seed(0)
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters())
    recorder, _ = trace(lambda: gpt_loop(model, optimizer, 20))
    rows = recorder.rows("overhead_ms")
    assert list(rows) == [10, 20]
    assert rows[20]["attention"] > 0
    assert rows[20]["tracer"] > 0
    assert all(value >= 0 for value in rows[20].values())
    assert all(record.own_ms > 0 for record in recorder.records)
