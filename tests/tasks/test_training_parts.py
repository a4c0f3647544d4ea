from __future__ import annotations

import math

import pytest
import torch

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.training import TrainingConfig
from tui_trainer.tasks.definition import find_task
from tui_trainer.tasks.devices import choose_device, choose_threads, evaluation_mode
from tui_trainer.tasks.optimizers import LearningRate, create_optimizer

CPU = torch.device("cpu")


def rate(schedule: str, total: int = 1000, warmup: int = 100) -> LearningRate:
    config = TrainingConfig(
        schedule=schedule, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=warmup
    )
    return LearningRate(config, total)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_a_straight_line(schedule):
    values = rate(schedule)
    for step in range(100):
        assert values.at(step) == pytest.approx(1e-3 * (step + 1) / 101)
    assert values.at(100) == pytest.approx(1e-3)


def test_schedules_follow_their_formulas():
    cosine, linear, constant = rate("cosine"), rate("linear"), rate("constant")
    for step in (100, 250, 550, 999, 1000):
        done = (step - 100) / 900
        assert linear.at(step) == pytest.approx(1e-3 - 9e-4 * done)
        assert cosine.at(step) == pytest.approx(5.5e-4 + 4.5e-4 * math.cos(math.pi * done))
        assert constant.at(step) == 1e-3
    assert cosine.at(1000) == linear.at(5000) == pytest.approx(1e-4)


def test_cosine_equals_pytorchs_own():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=1e-4)
    ours = rate("cosine", total=50, warmup=0)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours.at(step))
        optimizer.step()
        theirs.step()


def test_a_warm_up_longer_than_the_run_never_falls():
    values = [rate("cosine", total=10, warmup=100).at(step) for step in range(10)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("optimizer", "implementation"),
    [
        (optimizer, implementation)
        for optimizer in ("adamw", "adam", "sgd", "rmsprop")
        for implementation in ("auto", "fused", "foreach", "loop")
        if (optimizer, implementation) != ("rmsprop", "fused")  # PyTorch has none
    ],
)
def test_every_optimizer_lowers_a_loss_and_decays_matrices_only(optimizer, implementation):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    config = TrainingConfig(
        optimizer=optimizer, implementation=implementation, learning_rate=0.01, weight_decay=0.3
    )
    made = create_optimizer(model, config, CPU)
    decays = {
        tuple(parameter.shape): group["weight_decay"]
        for group in made.param_groups
        for parameter in group["params"]
    }
    assert decays == {(4, 4): 0.3, (4,): 0.0}
    inputs = torch.randn(16, 4)
    losses = []
    for _ in range(20):
        made.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        made.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_momentum_and_betas_are_passed_on():
    model = torch.nn.Linear(2, 2)
    adam = create_optimizer(model, TrainingConfig(beta1=0.8, beta2=0.7), CPU)
    assert adam.param_groups[0]["betas"] == (0.8, 0.7)
    sgd = create_optimizer(model, TrainingConfig(optimizer="sgd", momentum=0.6), CPU)
    assert sgd.param_groups[0]["momentum"] == 0.6


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(ConfigurationError, match="no kind of device") as caught:
        choose_device("cdua")
    assert "did you mean cuda?" in caught.value.hint
    with pytest.raises(ConfigurationError, match="no device cuda:99 here") as caught:
        choose_device("cuda:99")
    assert "cpu" in caught.value.hint
    with pytest.raises(ConfigurationError):
        choose_device("cpu:1")


def test_threads(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 16 if logical else 8)
    assert choose_threads(3) == 3
    assert choose_threads(0, work=1e12) == 7
    assert choose_threads(0, work=1e6) == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert choose_threads(0, work=1e12) == 1


def test_evaluating_restores_mode_and_generator():
    model = torch.nn.Dropout(0.5)
    state = torch.get_rng_state()

    def evaluate() -> None:
        with evaluation_mode(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_tasks_are_found_by_entry_point():
    assert find_task("gpt").name == "gpt"
    assert find_task("vit").name == "vit"
    with pytest.raises(KeyError):
        find_task("nothing")
