"""Reads how a loss is computed from its autograd graph: names and shapes of nodes, no tensors.
A compiled model has no such graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Literal

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
_PASSED_THROUGH = _VIEWS | frozenset(
    f"{name}Backward{number}"
    for name in (
        *("Neg", "Mul", "Div", "Sum", "Mean", "Add", "Sub", "Gather", "Index", "Select", "Slice"),
        *("Clamp", "ClampMin", "NllLoss", "NllLoss2D", "Log", "MseLoss"),
    )
    for number in (0, 1)
)
"""Operations that may lie between a loss and the output of the model."""
_LAYERS = {"AddmmBackward0": 1, "MmBackward0": 0, "ConvolutionBackward0": 0}
"""Linear maps → position of their input in `next_functions`; their weight follows it."""
_SUMS = ("Add", "Sub", "Mul", "Div", "Neg", "Sum", "Mean", "Sqrt", "Stack", "Cat", "Select")
"""Operations that may lie between a loss and the penalty terms in it."""
_NORMS = ("Pow", "Abs", "LinalgVectorNorm", "Norm")


def _no_name(parameter: Any) -> str:
    return ""


def loss_graph_of(node: Any, name_of: Callable[[Any], str] = _no_name) -> LossGraph | None:
    """Describe the graph below `node`, the `grad_fn` of a loss; None where it cannot be read.
    `name_of(parameter)` returns the name of a parameter, or ""."""
    try:
        return _read(node, name_of)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return None


def _read(loss: Any, name_of: Callable[[Any], str]) -> LossGraph:
    node, squared = loss, False
    logarithm: Literal["", "log", "nll_loss"] = ""
    for _ in range(MAX_PATH):
        name = node.name() if node is not None else ""
        if name not in _PASSED_THROUGH:
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
        len(behind := _layers_behind_softmax(loss)),
        mixed_view,
        name.startswith(("LogSoftmax", "Softmax")) and _is_joined(node.next_functions[0][0]),
        tuple(name for weight in behind if (name := name_of(_leaf(weight)))),
        _has_penalty(loss),
    )


def _has_penalty(loss: Any) -> bool:
    """Whether only sums and factors lie between the loss and a norm or a power of a weight matrix
    or of its rows."""
    seen, waiting = {loss}, deque([loss])
    while waiting and len(seen) < MAX_NODES:
        node = waiting.popleft()
        below = [child for child, _ in node.next_functions if child is not None]
        name = node.name().partition("Backward")[0]
        squared = name == "Mul" and len(below) == 2 and below[0] is below[1]
        if (name in _NORMS or squared) and below:
            if _has_matrix(below[0]):
                return True
            if name == "Pow":
                waiting += _norms_of(below[0])
        elif name in _SUMS or node.name() in _VIEWS:
            for child in below:
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)
    return False


def _norms_of(node: Any) -> list[Any]:
    """Nodes of the norms that `node` adds up."""
    if "Norm" in node.name():
        return [node]
    if not node.name().startswith(("Sum", "Stack")):
        return []
    return [norm for child, _ in node.next_functions if child for norm in _norms_of(child)]


def _has_matrix(node: Any) -> bool:
    """Whether `node` is a parameter of two dimensions or more, a view of one, rows of an embedding,
    or a concatenation of any of these."""
    node = _without_views(node)
    if node is None:
        return False
    if node.name().startswith("Embedding"):
        return _has_matrix(node.next_functions[0][0])
    if node.name().startswith(("Cat", "Stack")):
        return any(_has_matrix(child) for child, _ in node.next_functions)
    leaf = _leaf(node)
    return leaf is not None and leaf.dim() >= 2


def _is_joined(node: Any) -> bool:
    """Whether the scores at `node` were concatenated or stacked before they were scaled and viewed,
    as in a contrastive loss of one positive pair and many negative ones."""
    for _ in range(MAX_PATH):
        name = node.name() if node is not None else ""
        if name in ("CatBackward0", "StackBackward0"):
            return True
        if name not in _PASSED_THROUGH:
            return False
        below = [child for child, _ in node.next_functions if child is not None]
        node = below[0] if below else None
    return False


def _mixed_view(softmax: Any, classes: int) -> tuple[int, ...]:
    """The shape (N, classes, …) that a view below the softmax turns into (rows, classes) although
    its last dimension is not that of the classes; () without such a view."""
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


def _layers_behind_softmax(loss: Any) -> list[Any]:
    """Weights (as nodes) of the layers whose input is the softmax of another layer's output.

    Attention over learned rows is left out, and so is a softmax of anything computed after the
    layer: with noise and a temperature it draws samples (Gumbel-softmax, topic models)."""
    seen, waiting, found = {loss}, deque([loss]), []
    while waiting and len(seen) < MAX_NODES:
        node = waiting.popleft()
        below = [child for child, _ in node.next_functions]
        position = _LAYERS.get(node.name())
        if position is not None and len(below) > position + 1 and _is_softmax(below[position]):
            weight = below[position + 1]
            transposed = weight is not None and weight.name() == "TBackward0"
            if node.name() == "ConvolutionBackward0" or transposed:
                found.append(weight)
        for child in below:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def _is_softmax(node: Any) -> bool:
    node = _without_views(node)
    if node is None or node.name() != "SoftmaxBackward0":
        return False
    of = _without_views(node.next_functions[0][0])
    return of is not None and (of.name() in _LAYERS or "Norm" in of.name())


def _without_views(node: Any) -> Any:
    for _ in range(4):
        if node is None or node.name() not in _VIEWS:
            break
        node = node.next_functions[0][0]
    return node


def _leaf(node: Any) -> Any:
    """The parameter at a leaf, also through views; None where the tensor was computed."""
    return getattr(_without_views(node), "variable", None)
