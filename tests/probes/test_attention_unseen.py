"""Attention that cannot be observed has a reason, which is withdrawn once it is observed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.probes.test_attention import Separate, Stack
from tests.trace.support import KeepingRecorder, trace
from tui_trainer.probes.attention import health as probe
from tui_trainer.trace.probe import ProbeOptions

OPTIONS = ProbeOptions(budget=0.0, cadences={"attention_health": 1})


def in_heads(layer, x):
    shape = (*x.shape[:2], 4, -1)
    return [p(x).view(shape).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]


class ByHand(Separate):
    def forward(self, x):
        q, k, v = in_heads(self, x)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(x.shape)


class Imported(Separate):
    def forward(self, x):
        y = scaled_dot_product_attention(*in_heads(self, x))
        return y.transpose(1, 2).reshape(x.shape)


class Twice(Separate):
    def forward(self, x):
        return super().forward(x) + super().forward(2 * x)


class Turning(Separate):
    by_hand = True

    def forward(self, x):
        return (ByHand if self.by_hand else Separate).forward(self, x)


class ReasonsRecorder(KeepingRecorder):
    """A recorder that keeps every reason for missing attention health."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def describe(self, **changes):
        super().describe(**changes)
        reason = self.info.get("unseen", {}).get("attention_health", "")
        if reason != (self.reasons[-1] if self.reasons else ""):
            self.reasons.append(reason)


def step(model, optimizer):
    model(torch.randn(3, 5, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def record(make, steps=4):
    model = Stack(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = ReasonsRecorder()
    trace(
        lambda: [step(model, optimizer) for _ in range(steps)], options=OPTIONS, recorder=recorder
    )
    return recorder


def test_attention_by_hand_or_imported_by_name_is_reported_as_unseen():
    for make in (ByHand, Imported):
        recorder = record(make)
        assert recorder.rows("attention_health") == {}
        assert recorder.info["unseen"]["attention_health"] == probe.NOT_CALLED
        assert "scaled_dot_product_attention" in probe.NOT_CALLED
        assert "attention" not in recorder.info["unseen"]


def test_several_calls_per_layer_are_reported():
    assert record(Twice).info["unseen"]["attention_health"] == probe.NOT_ONCE


def test_one_unusual_forward_is_not_reported():
    assert record(ByHand, steps=1).reasons == []
    assert record(Separate).reasons == []


def test_the_reason_is_withdrawn_when_attention_is_seen_later(monkeypatch):
    model = Stack(Turning)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = ReasonsRecorder()

    def loop():
        for by_hand in (True, True, False, True, True, False, True, True, True, True):
            monkeypatch.setattr(Turning, "by_hand", by_hand)
            step(model, optimizer)

    trace(loop, options=OPTIONS, recorder=recorder)
    assert recorder.reasons == [probe.NOT_CALLED, "", probe.NOT_CALLED]
    assert sorted(recorder.rows("attention_health")) == [3, 6]
    assert recorder.info["unseen"]["attention_health"] == probe.NOT_CALLED


def test_of_two_optimizers_the_one_without_attention_is_reported():
    torch.manual_seed(0)
    first, second = Stack(Separate), Stack(ByHand)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (first, second)]
    recorder = KeepingRecorder()

    def loop():
        for _ in range(6):
            for model, optimizer in zip((first, second), optimizers, strict=True):
                step(model, optimizer)

    trace(loop, options=OPTIONS, recorder=recorder)
    unseen = recorder.info["unseen"]
    assert unseen["attention_health@optimizers[1]"] == probe.NOT_CALLED
    assert "attention_health" not in unseen
    assert len(recorder.info["attention"]) == 4
    assert {3, 5, 7, 9, 11} <= recorder.rows("attention_health").keys()
    assert recorder.rows("attention_health", "optimizers[1]") == {}


def test_the_calls_of_another_model_are_not_counted():
    """An encoder and its decoder with optimizers apart: the encoder comes first in every step."""
    torch.manual_seed(0)
    encoder, decoder = Stack(Separate), Stack(Separate)
    encoder.head = nn.Linear(8, 8)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (encoder, decoder)]
    recorder = KeepingRecorder()

    def loop():
        for _ in range(4):
            decoder(encoder(torch.randn(3, 5, 8))).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    trace(loop, options=OPTIONS, recorder=recorder)
    health = {t.optimizer for t in recorder.tables if t.name == "attention_health"}
    assert health == {"", "optimizers[1]"}
    of_decoder = next(
        t.optimizer
        for t in recorder.tables
        if t.name == "attention_health" and t.columns[0].name.startswith("decoder.")
    )
    assert recorder.rows("attention_health", of_decoder) == {}
    assert probe.OTHER_MODEL in recorder.info["unseen"].values()
