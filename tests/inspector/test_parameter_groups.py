"""Groups, parameters that are not trained as one expects, and memory, of a traced loop."""

from __future__ import annotations

import torch
from torch import nn

from tests.inspector.test_inspector import Traced
from tui_trainer.protocol.inspection import NOT_CAPTURED, DescribeUse, ParameterUse


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.forgotten = nn.Linear(4, 4, bias=False)
        self.unused = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.zeros(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.forgotten(self.frozen(self.embedding(tokens))))


def use_after_backward(requested: bool = False) -> ParameterUse:
    model, found = Tied(), []
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.embedding.weight], "weight_decay": 0.1},
            {"params": [model.head.bias, model.unused.weight], "lr": 0.5, "weight_decay": 0.0},
        ],
        lr=0.01,
    )

    def look(inspector, phase, step):
        if (step, phase) == (2, "backward"):
            found.append(inspector.answer(DescribeUse()))

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 3])).sum().backward()
            optimizer.step()

    traced = Traced(look)
    if requested:
        traced.inspector.capture.request()
    traced.run(loop)
    return found[0]


def test_groups_with_their_parameters_and_settings():
    first, second = use_after_backward().groups
    assert (first.optimizer, first.number, first.names) == ("adamw", 0, ("embedding.weight",))
    assert (first.parameters, first.elements) == (1, 28)
    assert (first.settings["lr"], first.settings["weight_decay"]) == (0.01, 0.1)
    assert second.names == ("head.bias", "unused.weight")
    assert (second.settings["lr"], second.settings["betas"]) == (0.5, "0.9, 0.999")


def test_parameters_that_are_not_trained_as_one_expects():
    use = use_after_backward()
    assert use.frozen == ("frozen.weight",)
    assert use.without_optimizer == ("forgotten.weight",)
    assert use.without_gradient == ("unused.weight",)
    assert use.shared == (("embedding.weight", "head.weight"),)
    assert NOT_CAPTURED in use.graph_missing  # the next step's graph is known
    again = use_after_backward(requested=True)
    assert set(again.unused) == {"unused.weight"}
    saved = again.memory[-1]
    assert (saved.kind, saved.bytes > 0, again.graph_missing) == ("saved", True, "")


def test_memory_counts_each_tensor_once():
    memory = {each.kind: each for each in use_after_backward().memory}
    elements = 28 + 16 * 3 + 7
    assert (memory["parameter"].tensors, memory["parameter"].bytes) == (5, 4 * elements)
    assert memory["gradient"].bytes == 4 * (28 + 16 + 7)
    # exp_avg and exp_avg_sq of what had a gradient, and a step count each
    assert memory["state"].bytes == 4 * (2 * (28 + 7) + 2)
    assert memory["buffer"].bytes == 12
    assert {each.device for each in memory.values()} == {"cpu"}


def test_before_the_first_gradient_none_is_missing():
    found = []

    def look(inspector, phase, step):
        if (step, phase) == (1, "forward"):
            found.append(inspector.answer(DescribeUse()))

    model = nn.Linear(3, 2)

    def loop():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    Traced(look).run(loop)
    assert found[0].without_gradient == ()
    assert found[0].groups[0].names == ("weight", "bias")
