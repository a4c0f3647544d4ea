"""The autograd graph of a loss, and checks of gradients, as requests and answers."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

GraphSource = Literal["rerun", "live"]
"""`rerun`: a re-run of the step's forward pass; `live`: the graph of the step's own loss."""


class GraphNode(msgspec.Struct, frozen=True, array_like=True):
    """An operation of the graph, or a leaf."""

    operation: str
    """Name such as `Addmm`; for a leaf `parameter` or `input`."""
    module: int
    """Index in `AutogradGraph.modules` of the module that called the operation."""
    shape: tuple[int, ...]
    """Shape of the (first) result."""
    dtype: str
    inputs: tuple[int, ...] = ()
    """Indices of the nodes that the inputs come from."""
    gradients: tuple[float, ...] = ()
    """2-norm of the gradient that flowed to each of the inputs; nan where unknown."""
    gradient: float = math.nan
    """2-norm of the gradient with respect to the result."""
    saved_bytes: int = 0
    """Bytes that the operation saves for backward, without parameters."""
    leaf: str = ""
    """Name of a leaf."""


class GraphModule(msgspec.Struct, frozen=True, array_like=True):
    """A module that was called, or, without a kind, everything outside of modules."""

    path: str
    kind: str = ""
    """Name of its class."""


class AutogradGraph(msgspec.Struct, tag="autograd_graph", frozen=True, array_like=True):
    """The graph from a loss to its leaves."""

    nodes: tuple[GraphNode, ...]
    """The loss first; an operation before its inputs, leaves last."""
    modules: tuple[GraphModule, ...]
    """The first one stands for everything outside of modules."""
    source: GraphSource
    loss: float | None = None
    same_loss: bool | None = None
    """Whether the loss of a re-run is that of the step bit for bit; None: nothing to compare."""
    saved_bytes: int | None = None
    """Bytes of distinct memory saved for backward, without parameters; None: not known."""
    left_out: int = 0
    """Nodes beyond the limit."""
    notes: tuple[str, ...] = ()
    saved_on: tuple[tuple[str, int, int], ...] = ()
    """`saved_bytes` by device: (device, storages, bytes)."""

    @property
    def edges(self) -> int:
        return sum(len(node.inputs) for node in self.nodes)


class DescribeGraph(msgspec.Struct, tag="describe_graph", frozen=True):
    """Asks for the autograd graph of the loss of the current step."""


class GradientStep(msgspec.Struct, frozen=True, array_like=True):
    """Numerical gradients of one entry with one step size."""

    h: float
    forward: float
    """(L(w+h) − L(w)) / h"""
    central: float
    """(L(w+h) − L(w−h)) / 2h"""
    forward_error: float
    """Relative to the gradient of autograd: |a − n| / max(|a|, |n|)."""
    central_error: float


class CheckedEntry(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a parameter: the gradient of autograd, and finite differences of the loss."""

    index: tuple[int, ...]
    value: float
    autograd: float
    steps: tuple[GradientStep, ...]
    best: int
    """Index in `steps` of the central difference that is probably the best."""


class GradientCheck(msgspec.Struct, tag="gradient_check", frozen=True, array_like=True):
    """The gradient of autograd next to numerical ones."""

    name: str
    dtype: str
    """The dtype in which the losses were computed."""
    loss: float
    entries: tuple[CheckedEntry, ...]
    copied_bytes: int
    """Bytes of the copy of the model."""
    step_gradient: tuple[float, ...] = ()
    """The entries of the step's own `.grad` now; nan where there is none."""
    notes: tuple[str, ...] = ()


class CheckGradient(msgspec.Struct, tag="check_gradient", frozen=True):
    """Asks for a check of entries of a parameter, on the batch of the current step."""

    name: str
    indices: tuple[tuple[int, ...], ...] = ()
    """Empty: those with the largest gradients, and some evenly spaced ones."""
    entries: int = 4
    """Number of entries to choose if `indices` is empty."""
    max_bytes: int = 0
    """Maximum bytes of the copy of the model; 0: the default."""


MAX_CHECKED = 64
"""Maximum number of entries in one check."""
