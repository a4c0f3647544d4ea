"""Every number that a page states, compared with a second computation.

The second one makes the same model and the same batches from the same seed, and then gets at the
numbers in another way: `torch.autograd.grad` instead of `backward`, formulas instead of optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT

from tests.learn.measured_once import measured
from tui_trainer.learn.catalog import PAGES
from tui_trainer.learn.experiments.small_models import random_batch, small_gpt
from tui_trainer.learn.measured import Value

SEED = 1
Check = Callable[[dict[str, Value]], None]
CHECKS: dict[str, Check] = {}


def checks(page: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[page] = check
        return check

    return register


@pytest.fixture(autouse=True)
def _same_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


@pytest.mark.parametrize("page", PAGES)
def test_the_numbers_are_right(page: str) -> None:
    values = Checked(measured(page, SEED).values)
    CHECKS[page](values)
    assert values.unread() == set(), "numbers that no test has looked at"


@pytest.mark.parametrize("page", PAGES)
def test_the_same_seed_gives_the_same_numbers(page: str) -> None:
    first, second = measured(page, SEED).values, measured(page, 2).values
    assert set(first) == set(second)
    assert {name: type(value) for name, value in first.items()} == {
        name: type(value) for name, value in second.items()
    }


class Checked(dict[str, Value]):
    """Values that note which of them were looked at."""

    def __init__(self, values: dict[str, Value]) -> None:
        super().__init__(values)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Value:
        self._read.add(name)
        return super().__getitem__(name)

    def unread(self) -> set[str]:
        return set(self) - self._read


def near(value: object, rel: float = 1e-4, abs: float = 1e-7) -> object:
    return pytest.approx(value, rel=rel, abs=abs)


def loss_by_hand(model: GPT, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean of −log of the probability that the model gives to each right token."""
    inputs, targets = batch
    log_probabilities = model(inputs) - model(inputs).logsumexp(-1, keepdim=True)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean()


def gradient_by_hand(model: GPT, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(loss_by_hand(model, batch), list(model.parameters()))
    return torch.cat([each.flatten() for each in gradients])


def reachable(node: object, seen: set[object]) -> set[object]:
    """The nodes of a graph, by recursion."""
    if node is not None and node not in seen:
        seen.add(node)
        for following, _ in node.next_functions:  # type: ignore[attr-defined]
            reachable(following, seen)
    return seen


@checks("loss-graph")
def _(v: dict[str, Value]) -> None:
    model, batch = small_gpt(), random_batch()
    assert v["loss"] == near(loss_by_hand(model, batch).item())
    loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    nodes = reachable(loss.grad_fn, set())
    names = [node.name() for node in nodes]  # type: ignore[attr-defined]
    assert v["grad_fn"] == type(loss.grad_fn).__name__ == "NllLossBackward0"
    assert v["operations"] == len(nodes)
    leaves = sum("AccumulateGrad" in name for name in names)
    assert v["leaves"] == leaves
    assert v["parameters"] == len({id(p) for p in model.parameters()}) == leaves
    assert v["item_type"] == "float"
    assert v["detached_operations"] == 0
    assert v["no_grad_operations"] == 0
    # every batch adds its graph, and one node for the addition
    for count, kept in (("batches", "kept"), ("twice_batches", "twice_kept")):
        assert v[kept] == v[count] * (len(nodes) - leaves + 1)  # type: ignore[operator]
    assert v["twice_batches"] == 2 * v["batches"]  # type: ignore[operator]


@checks("accumulation")
def _(v: dict[str, Value]) -> None:
    model, batch = small_gpt(), random_batch(8)
    norm = gradient_by_hand(model, batch).norm().item()
    assert v["norm_once"] == near(norm)
    assert v["norm_twice"] == near(2 * norm)
    assert v["ratio_twice"] == near(2)
    assert v["norm_thrice"] == near(3 * norm)
    assert v["ratio_thrice"] == near(3)
    assert (v["examples"], v["half"]) == (8, 4)
    halves = [
        gradient_by_hand(model, (batch[0][part], batch[1][part]))
        for part in (slice(0, 4), slice(4, 8))
    ]
    together = (halves[0] + halves[1]) / 2
    assert v["whole_norm"] == near(norm)
    assert v["halves_norm"] == near(together.norm().item())
    assert v["halves_cosine"] == near(1)
    assert v["left_none"] == "None"
    assert v["none_moved"] == 0
    assert v["zeros_norm"] == 0
    _adam_after(False)  # the layer that the experiment made first
    assert v["zeros_moved"] == near(_adam_after(True), rel=1e-3)


def _adam_after(zeros: bool) -> float:
    """How far Adam's second step, with a gradient of zeros, moves a layer (Kingma & Ba 2015)."""
    layer, x = torch.nn.Linear(4, 4), torch.randn(8, 4)
    (g,) = torch.autograd.grad((layer(x) ** 2).mean(), layer.weight)
    m, v = 0.9 * 0.1 * g, 0.999 * 0.001 * g**2
    update = 0.1 * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    return update.norm().item() if zeros else 0.0


@checks("param-groups")
def _(v: dict[str, Value]) -> None:
    model = small_gpt()
    names = [name for name, _ in model.named_parameters()]
    assert v["parameters"] == v["shared"] == len(names)
    for number in "123":
        assert v[f"name_{number}"] in names
        assert v[f"id_{number}"] == v[f"held_id_{number}"]
    weight = dict(model.named_parameters())[v["weight"]]  # type: ignore[index]
    assert v["before"] == near(weight[0, 0].item())
    g = torch.autograd.grad(loss_by_hand(model, random_batch()), weight)[0][0, 0].item()
    # AdamW's first step: decay, then ±lr, since m̂ / √v̂ is the sign of the gradient
    expected = weight[0, 0].item() * (1 - 0.01 * 0.01) - 0.01 * g / (abs(g) + 1e-8)
    assert v["after"] == near(expected)
    assert v["same_object"] is True
    assert v["same_memory"] is True
    assert v["still_shared"] == len(names) - 1
    assert v["new_gradient"] > 0  # type: ignore[operator]
    assert v["new_moved"] == 0
    assert v["old_gradient"] == "None"
