"""Reads from the autograd graph of a loss how it is computed: names and shapes of nodes, no tensor.
A compiled model has no such graph.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from tui_trainer.history.records import LossGraph
from tui_trainer.trace.torch_private import result_of, saved_dim, viewed_shape

MAX_PATH = 32
MAX_NODES = 4000
_VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "ToCopy", "Clone", "Alias", "Transpose", "Permute"),
        *("Squeeze", "Unsqueeze", "Expand", "T"),
    )
    for number in (0, 1)
)
_ON_THE_WAY = _VIEWS | frozenset(
    f"{name}Backward{number}"
    for name in (
        *("Neg", "Mul", "Div", "Sum", "Mean", "Add", "Sub", "Gather", "Index", "Select", "Slice"),
        *("Clamp", "ClampMin", "NllLoss", "NllLoss2D", "Log", "MseLoss"),
    )
    for number in (0, 1)
)
"""Between a loss and the output of the model."""
_LAYERS = {"AddmmBackward0": 1, "MmBackward0": 0, "ConvolutionBackward0": 0}
"""Linear maps, and the position of what they map among their inputs."""


def loss_graph_of(node: Any) -> LossGraph | None:
    """The graph below `grad_fn` of a loss; None where it cannot be read."""
    try:
        return _read(node)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return None


def _read(loss: Any) -> LossGraph:
    node, logarithm, squared = loss, "", False
    for _ in range(MAX_PATH):
        name = node.name() if node is not None else ""
        if name not in _ON_THE_WAY:
            break
        if name.startswith(("Log", "NllLoss")):
            logarithm = logarithm or ("log" if name.startswith("Log") else "nll_loss")
        squared = squared or name.startswith("MseLoss")
        below = [child for child, _ in node.next_functions if child is not None]
        if len(below) != 1:
            node = None
            break
        node = below[0]
    name = node.name() if node is not None else ""
    rows = classes = 0
    over_rows = False
    mixed_view: tuple[int, ...] = ()
    if name.startswith(("LogSoftmax", "Softmax")):
        shape, _ = result_of(node)
        dim = saved_dim(node) % len(shape)
        over_rows = len(shape) == 2 and dim == 0 and shape[0] > 1
        classes = shape[1 if len(shape) > 1 else 0]
        for size in shape:
            rows = (rows or 1) * size
        rows //= classes
        if len(shape) == 2 and not over_rows:
            mixed_view = _mixed_view(node, classes)
    return LossGraph(
        rows,
        classes,
        over_rows,
        logarithm if name in _LAYERS and logarithm else "",
        squared and name.startswith("Softmax"),
        _hidden_softmaxes(loss),
        mixed_view,
    )


def _mixed_view(softmax: Any, classes: int) -> tuple[int, ...]:
    """The shape (N, classes, …) that a view below the softmax turns into rows of classes, which
    takes them from the last dimension instead; () without such a view."""
    below = [child for child, _ in softmax.next_functions if child is not None]
    node = below[0] if len(below) == 1 else None
    if node is None or not node.name().startswith(("View", "UnsafeView", "ReshapeAlias")):
        return ()
    shape = viewed_shape(node)
    below = [child for child, _ in node.next_functions if child is not None]
    made = below[0].name() if len(below) == 1 else ""
    if made.startswith(("Permute", "Transpose", "Clone")):  # moved, and perhaps copied, before
        return ()
    return shape if len(shape) > 2 and shape[1] == classes != shape[-1] else ()


def _hidden_softmaxes(loss: Any) -> int:
    """Layers whose input is a softmax, that of an attention over learned rows left out."""
    seen, waiting, found = {loss}, deque([loss]), 0
    while waiting and len(seen) < MAX_NODES:
        node = waiting.popleft()
        below = [child for child, _ in node.next_functions]
        position = _LAYERS.get(node.name())
        if position is not None and len(below) > position + 1 and _is_softmax(below[position]):
            weight = below[position + 1]
            transposed = weight is not None and weight.name() == "TBackward0"
            found += node.name() == "ConvolutionBackward0" or transposed
        for child in below:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def _is_softmax(node: Any) -> bool:
    for _ in range(4):
        if node is None or node.name() not in _VIEWS:
            break
        node = node.next_functions[0][0]
    return node is not None and node.name() == "SoftmaxBackward0"
