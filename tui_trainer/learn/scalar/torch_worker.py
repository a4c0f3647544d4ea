"""PyTorch's own gradients of a scalar expression.

The screens do not import torch, so they use a child process (`torch_process.py`):
`python -m tui_trainer.learn.scalar.torch_worker` reads `{"expression": …, "values": {…}}` and
writes `{"version": …, "gradients": [… or null]}`, one line each, until its input ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tui_trainer.learn.scalar.parser import ScalarExpression, parse

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": torch.div,
    "**": torch.pow,
    "neg": torch.neg,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "exp": torch.exp,
    "log": torch.log,
}


def autograd(expression: ScalarExpression, values: Mapping[str, float]) -> list[float | None]:
    """`.grad` of every node after `backward()` of the output in float64. None for constants and for
    nodes on which the output does not depend."""
    tensors: list[Tensor] = []
    for node in expression.nodes:
        if node.is_input:
            tensor = torch.tensor(values[node.name], dtype=torch.float64, requires_grad=True)
        elif not node.is_computed:
            tensor = torch.tensor(node.constant, dtype=torch.float64)
        else:
            tensor = OPERATIONS[node.operation](*(tensors[i] for i in node.inputs))
            if tensor.requires_grad:
                tensor.retain_grad()
        tensors.append(tensor)
    if tensors[expression.output].requires_grad:
        tensors[expression.output].backward()  # type: ignore[no-untyped-call]
    return [
        float(tensor.grad) if tensor.requires_grad and tensor.grad is not None else None
        for tensor in tensors
    ]


def version() -> str:
    """`PyTorch 2.13.0`"""
    return f"PyTorch {torch.__version__.partition('+')[0]}"


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        gradients = autograd(parse(request["expression"]), request["values"])
        print(json.dumps({"version": version(), "gradients": gradients}), flush=True)


if __name__ == "__main__":
    main()
