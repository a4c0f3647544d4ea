"""The shipped tasks and a script, traced with everything on and played with, against bare ones."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.trace.support import EVERYTHING, KeepingRecorder
from tests.trace.test_leaves_nothing import press_keys
from tui_trainer.probes import PROBES
from tui_trainer.tasks.definition import build, find_task
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.tracer import Tracer

STEPS = 30
SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"block_size": 16, "width": 16, "heads": 2, "layers": 2, "batch_size": 4},
    "vit": {"channels": "1", "image_size": 8, "patch_size": 2, "width": 16, "heads": 2, "layers": 2,
            "batch_size": 8, "shift": 1},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value": {"clip": "value", "clip_value": 0.05, "optimizer": "sgd"},
    "fp16": {"dtype": "fp16", "clip": "off", "implementation": "foreach"},
    "fp16 fused": {"dtype": "fp16", "clip": "norm", "implementation": "fused"},
}

SCRIPT = """
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

torch.manual_seed(5)
model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
losses = []
for step in range(50):
    for _ in range(2):
        loss = nn.functional.mse_loss(model(torch.randn(4, 6)), torch.randn(4, 2)) / 2
        loss.backward()
    clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.detach().clone())
"""

Outcome = tuple[dict[str, torch.Tensor], list[torch.Tensor]]


def train_task(name: str, variant: str) -> Outcome:
    definition = find_task(name)
    config = definition.config(
        steps=STEPS, dropout=0.1, warmup_steps=5, device="cpu", threads=1,
        **SMALL[name] | VARIANTS[variant],
    )  # fmt: skip
    training = build(definition, config)
    if config.dtype == "fp16":  # so high that the first steps are skipped
        scaler = training.stateful["scaler"]
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**24})
    losses: list[torch.Tensor] = []
    backward = torch.Tensor.backward

    def noting(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(self.detach().clone())
        backward(self, *args, **kwargs)

    torch.Tensor.backward = noting  # type: ignore[method-assign]
    try:
        training.loop()
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    assert len(losses) == STEPS
    return training.model.state_dict(), [*losses, torch.get_rng_state()]


def train_script(path: str) -> Outcome:
    found = runpy.run_path(path)
    return found["model"].state_dict(), [*found["losses"], torch.get_rng_state()]


def traced(train: Callable[[], Outcome]) -> tuple[Outcome, KeepingRecorder]:
    recorder, gate = KeepingRecorder(), Gate(paused=True)
    recorder.topics = frozenset({"attention_heads", "attention_spectrum", "attention_health"})
    over = threading.Event()
    keys = threading.Thread(target=press_keys, args=(gate, over))
    keys.start()
    try:
        with Tracer(recorder, gate, PROBES, EVERYTHING):
            outcome = train()
    finally:
        over.set()
        keys.join()
    return outcome, recorder


def check(train: Callable[[], Outcome]) -> KeepingRecorder:
    weights, others = train()
    (found_weights, found_others), recorder = traced(train)
    assert recorder.notices_of("fault") == []
    assert recorder.reports
    assert weights.keys() == found_weights.keys()
    assert all(torch.equal(weights[name], found_weights[name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(others, found_others, strict=True))
    return recorder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", SMALL)
def test_tasks(task, variant):
    threads = torch.get_num_threads()
    try:
        recorder = check(lambda: train_task(task, variant))
    finally:
        torch.set_num_threads(threads)
    skipped = len(recorder.notices_of("skipped_step")) + len(recorder.skips)
    assert bool(skipped) == (VARIANTS[variant].get("dtype") == "fp16")
    if VARIANTS[variant].get("implementation") == "fused":
        skipped = 0  # it is called, and skips the update itself
    assert [r.step for r in recorder.records] == list(range(1, STEPS + 1 - skipped))
    assert len(recorder.info["attention"]) == 2
    assert len(recorder.rows("attention")) == STEPS - skipped


def test_script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    recorder = check(lambda: train_script(str(path)))
    assert len(recorder.records) == 50
    assert len(recorder.rows("clip")) == 50
