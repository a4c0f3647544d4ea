"""A small GPT, batches for it, and walks through autograd's graph, for several pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tui_trainer.models.gpt import GPT

VOCABULARY, BLOCK_SIZE = 32, 16


def small_gpt(layers: int = 2, heads: int = 2, width: int = 32) -> GPT:
    """The GPT of `tui-trainer gpt`, small enough for thousands of steps a minute."""
    return GPT(
        vocabulary=VOCABULARY, block_size=BLOCK_SIZE, layers=layers, heads=heads, width=width
    )


def random_batch(examples: int = 8) -> tuple[Tensor, Tensor]:
    """Token numbers (B, T) and the tokens that follow each: a random walk over the vocabulary, so
    that there is something to learn."""
    steps = torch.randint(1, 4, (examples, BLOCK_SIZE + 1))
    tokens = steps.cumsum(dim=1) % VOCABULARY
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a GPT on a batch, with its graph."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def graph_nodes(tensor: Tensor) -> list[Any]:
    """The nodes of autograd's graph that can be reached from a tensor; none if it has no graph. A
    leaf, `AccumulateGrad`, has an attribute `variable`: the tensor whose gradient it collects."""
    waiting, found = [tensor.grad_fn], dict[int, Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            waiting += [following for following, _ in node.next_functions]
    return list(found.values())


def leaves(nodes: list[Any]) -> list[Tensor]:
    """The tensors whose gradients the leaves among `nodes` collect."""
    return [node.variable for node in nodes if hasattr(node, "variable")]


def gradient_vector(parameters: Sequence[Tensor]) -> Tensor:
    """All gradients, one after the other."""
    return torch.cat(
        [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    )
