"""The autograd graph of the current step's loss, walked from the loss to its leaves.

If the forward pass can be re-run, loss and backward are re-run too: only while they run can it be
observed which module calls an operation, what it saves and which gradient flows through each edge.
Otherwise the graph of the step's own loss is read, without touching its saved tensors.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.rerun import StepCapture, no_loss
from tui_trainer.inspector.tensor_catalog import TensorCatalog
from tui_trainer.protocol.autograd import AutogradGraph, GraphModule, GraphNode
from tui_trainer.trace.torch_private import (
    local,
    next_sequence_number,
    node_name,
    norms_of,
    plain_name,
    result_of,
    saved,
    saved_names,
    sequence_number,
)
from tui_trainer.trace.tracer import Tracer

MAX_NODES = 50_000
"""Maximum number of nodes in one answer, a message of about 5 MB."""
MAX_WAITING, MAX_WAITING_BYTES = 256, 64 << 20
"""Number and bytes of gradients whose norms are computed at once."""
OUTSIDE = GraphModule("")
LIVE_NOTE = "the graph of the loss itself, without gradients and saved bytes: "
"""Begins the note of a graph that is not of a re-run; the reason follows."""


def describe_graph(tracer: Tracer, catalog: TensorCatalog, capture: StepCapture) -> AutogradGraph:
    """Describe the graph of a re-run, or else that of the live loss. Raises InspectionError if
    neither is possible."""
    live = _live_loss(tracer, capture)
    try:
        return _of_rerun(tracer, catalog, capture)
    except InspectionError as error:
        if live is None:
            raise
        why = "; ".join(filter(None, (error.message, error.hint)))
        return _of_live(catalog, live, why)


def _live_loss(tracer: Tracer, capture: StepCapture) -> torch.Tensor | None:
    loss = capture.live_loss() if capture.live_loss is not None else None
    now = capture.live_step == tracer.gate.current_step
    return loss if loss is not None and loss.grad_fn is not None and now else None


def _of_rerun(tracer: Tracer, catalog: TensorCatalog, capture: StepCapture) -> AutogradGraph:
    calls = _ModuleRanges()
    with _packing() as packed, capture.rerun(calls.called, calls.returned) as rerun:
        if rerun.loss is None or rerun.loss.grad_fn is None:
            raise no_loss(rerun.call, rerun.loss)
        names = {module: plain_name(name) for name, module in rerun.model.named_modules()}
        root = rerun.call.module()
        prefix = tracer.registry.names.prefix_of(root) if root is not None else ""
        modules = calls.modules(names, prefix)
        walk = _Walk(rerun.loss.grad_fn, _leaf_names(catalog))
        notes = list(rerun.notes)
        saved: int | None = None
        saved_on: dict[str, tuple[int, int]] = {}
        if packed:
            notes.append("saved tensors are packed by hooks, as by checkpointing: not counted")
        else:
            held = [*rerun.model.parameters(), *rerun.model.buffers()]
            saved_on = walk.count_saved(held)
            saved = sum(size for _, size in saved_on.values())
        walk.measure_gradients(rerun.loss)
        loss, same = float(rerun.loss.detach()), rerun.same_loss
    nodes = walk.described(calls.module_of)
    by_device = tuple((device, *held) for device, held in saved_on.items())
    return AutogradGraph(
        nodes, modules, "rerun", loss, same, saved, walk.left_out, tuple(notes), by_device
    )


def _of_live(catalog: TensorCatalog, loss: torch.Tensor, why: str) -> AutogradGraph:
    """Describe the graph of the live loss; operations belong to the module of a parameter that they
    use directly."""
    walk = _Walk(loss.grad_fn, _leaf_names(catalog))
    paths: dict[str, int] = {"": 0}

    def module_of(node: Any) -> int:
        for before, _ in node.next_functions:
            for each in (before, *_inputs_of_view(before)):
                leaf = walk.leaf_name(each)
                if leaf:
                    return paths.setdefault(leaf.rpartition(".")[0], len(paths))
        return 0

    nodes = walk.described(module_of)
    modules = tuple(GraphModule(path, "module" if path else "") for path in paths)
    note = f"{LIVE_NOTE}{why}"
    value = float(loss.detach())
    return AutogradGraph(nodes, modules, "live", value, None, None, walk.left_out, (note,))


def _inputs_of_view(node: Any) -> list[Any]:
    """The inputs of a transpose or cast, through which layers use their weights."""
    if node is not None and node_name(node) in ("T", "Transpose", "ToCopy"):
        return [each for each, _ in node.next_functions]
    return []


def _leaf_names(catalog: TensorCatalog) -> dict[int, str]:
    return {id(parameter): name for name, parameter in catalog.parameters()}


@contextlib.contextmanager
def _packing() -> Iterator[list[bool]]:
    """Yield a list that is not empty once hooks pack saved tensors. Reading those would run the
    hooks, which compute a checkpointed part again."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    seen: list[bool] = []
    original = hooks.__enter__

    def __enter__(context: Any) -> Any:
        seen.append(True)
        return original(context)

    hooks.__enter__ = __enter__  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        hooks.__enter__ = original  # type: ignore[method-assign]


class _ModuleRanges:
    """The innermost open module call at each sequence number; nodes are numbered in the order of
    their creation."""

    def __init__(self) -> None:
        self._starts: list[int] = [0]
        self._current: list[int] = [0]
        """Number of the module from each start on."""
        self._stack: list[int] = [0]
        self._modules: list[torch.nn.Module] = []
        self._numbers: dict[int, int] = {}

    def called(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        number = self._numbers.get(id(module))
        if number is None:
            self._modules.append(module)
            number = self._numbers[id(module)] = len(self._modules)
        self._stack.append(number)
        self._note()

    def returned(self, module: torch.nn.Module, result: Any) -> None:
        if len(self._stack) > 1:
            self._stack.pop()
        self._note()

    def _note(self) -> None:
        self._starts.append(next_sequence_number())
        self._current.append(self._stack[-1])

    def module_of(self, node: Any) -> int:
        return self._current[bisect_right(self._starts, sequence_number(node)) - 1]

    def modules(self, names: dict[torch.nn.Module, str], prefix: str) -> tuple[GraphModule, ...]:
        found = [
            GraphModule((prefix + names.get(each, "")).rstrip("."), type(each).__name__)
            for each in self._modules
        ]
        return (OUTSIDE, *found)


class _Walk:
    """The nodes of the graph of a loss, each once, found without recursion."""

    def __init__(self, root: Any, names: dict[int, str]) -> None:
        self._names = names
        operations: list[Any] = []
        self._leaves: list[Any] = []
        seen = {root}
        waiting = [root]
        self.left_out = 0
        while waiting:
            node = waiting.pop()
            variable = getattr(node, "variable", None)
            (operations if variable is None else self._leaves).append(node)
            for before, _ in node.next_functions:
                if before is not None and before not in seen:
                    if len(seen) >= MAX_NODES:
                        self.left_out += 1
                        continue
                    seen.add(before)
                    waiting.append(before)
        # The newest node first: an operation has a higher number than its inputs.
        operations.sort(key=lambda node: -sequence_number(node))
        if operations and operations[0] is not root:
            operations.remove(root)
            operations.insert(0, root)
        self._nodes = [*operations, *self._leaves]
        self._index = {node: number for number, node in enumerate(self._nodes)}
        self._saved = [0] * len(self._nodes)
        self._flows: list[tuple[float, ...]] = [()] * len(self._nodes)
        self._arrived = [math.nan] * len(self._nodes)

    # ------------------------------------------------------------ what is saved

    def count_saved(self, held: Sequence[torch.Tensor]) -> dict[str, tuple[int, int]]:
        """Count the bytes that each node saves; returns device → (number, bytes) of distinct
        storages. `held`: tensors that exist without the graph, which do not count."""
        known = {_storage_of(each)[0] for each in held if each.layout == torch.strided}
        distinct: dict[tuple[str, int], int] = {}
        attributes: dict[type, list[str]] = {}
        for number, node in enumerate(self._nodes):
            kind = type(node)
            if kind not in attributes:
                attributes[kind] = [
                    name for name in saved_names(node) if not name.endswith("_sizes")
                ]
                if isinstance(getattr(kind, "saved_tensors", None), property) or (
                    hasattr(node, "saved_tensors") and not attributes[kind]
                ):
                    attributes[kind].append("saved_tensors")
            own: dict[tuple[str, int], int] = {}
            for name in attributes[kind]:
                try:
                    value = node.saved_tensors if name == "saved_tensors" else saved(node, name)
                except (RuntimeError, AttributeError):
                    continue
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                        place, size = _storage_of(tensor)
                        if place[1] and place not in known:
                            distinct[place] = max(size, distinct.get(place, 0))
                            own[place] = max(own.get(place, 0), min(size, tensor.nbytes))
            self._saved[number] = sum(own.values())
        found: dict[str, tuple[int, int]] = {}
        for (device, _), size in distinct.items():
            storages, before = found.get(device, (0, 0))
            found[device] = (storages + 1, before + size)
        return found

    # ------------------------------------------------------------ gradients

    def measure_gradients(self, loss: torch.Tensor) -> None:
        """Run backward without adding to any `.grad`, and compute the norms of all gradients."""
        norms = _Norms()
        single = [count == 1 for count in self._users()]

        def hook_of(number: int) -> Any:
            def hook(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
                for place, gradient in enumerate(inputs):
                    if gradient is not None:
                        norms.add(gradient, (number, place))
                if not single[number]:
                    arrived = next((each for each in outputs if each is not None), None)
                    if arrived is not None:
                        norms.add(arrived, (number, -1))

            return hook

        handles = [
            node.register_hook(hook_of(number))
            for number, node in enumerate(self._nodes)
            if getattr(node, "variable", None) is None
        ]
        variables = [node.variable for node in self._leaves]
        try:
            gradients = torch.autograd.grad(loss, variables, allow_unused=True) if variables else ()
        finally:
            for handle in handles:
                handle.remove()
        for node, gradient in zip(self._leaves, gradients, strict=True):
            if gradient is not None:
                norms.add(gradient, (self._index[node], -1))
        flows: dict[int, dict[int, float]] = {}
        for (number, place), value in norms.values():
            if place < 0:
                self._arrived[number] = value
            else:
                flows.setdefault(number, {})[place] = value
                before = self._index.get(self._nodes[number].next_functions[place][0])
                if before is not None and single[before] and math.isnan(self._arrived[before]):
                    self._arrived[before] = value  # `before` has no other incoming gradient
        for number, node in enumerate(self._nodes):
            own = flows.get(number, {})
            self._flows[number] = tuple(
                own.get(place, math.nan)
                for place, (before, _) in enumerate(node.next_functions)
                if before in self._index
            )

    def _users(self) -> list[int]:
        """Number of edges that lead to each node; 2 for a node that has several results or is the
        loss."""
        found = [0] * len(self._nodes)
        found[0] = 2
        for node in self._nodes:
            for before, output in node.next_functions:
                if before in self._index:
                    found[self._index[before]] += 2 if output else 1
        return found

    # ------------------------------------------------------------ the answer

    def leaf_name(self, node: Any) -> str:
        """The name of the parameter of a leaf; "" for any other node."""
        variable = getattr(node, "variable", None) if node is not None else None
        return self._names.get(id(variable), "") if variable is not None else ""

    def described(self, module_of: Any) -> tuple[GraphNode, ...]:
        found = []
        for number, node in enumerate(self._nodes):
            variable = getattr(node, "variable", None)
            inputs = [self._index[b] for b, _ in node.next_functions if b in self._index]
            if variable is not None:
                shape, dtype = tuple(variable.shape), variable.dtype
            else:
                shape, dtype = _result(node)
            name = self.leaf_name(node)
            kind = ("parameter" if name else "input") if variable is not None else node_name(node)
            found.append(
                GraphNode(
                    operation=kind,
                    module=0 if variable is not None else module_of(node),
                    shape=shape,
                    dtype=str(dtype).removeprefix("torch."),
                    inputs=tuple(inputs),
                    gradients=self._flows[number] or (math.nan,) * len(inputs),
                    gradient=self._arrived[number],
                    saved_bytes=self._saved[number],
                    leaf=name or (f"input {number}" if variable is not None else ""),
                )
            )
        return tuple(found)


def _storage_of(tensor: torch.Tensor) -> tuple[tuple[str, int], int]:
    """((device, address), bytes) of the memory of a tensor."""
    storage = tensor.untyped_storage()
    return (str(storage.device), storage.data_ptr()), storage.nbytes()


def _result(node: Any) -> tuple[tuple[int, ...], Any]:
    """(shape, dtype) of a node's result; ((), "") if unknown."""
    try:
        return result_of(node)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return (), ""


InputIndex = tuple[int, int]
"""(node, index of an input); index −1: the gradient that arrives at the node."""


class _Norms:
    """Computes 2-norms of many tensors in batches of bounded size: a function call costs more than
    the norm of a small tensor."""

    def __init__(self) -> None:
        self._waiting: dict[
            tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, InputIndex]]
        ] = {}
        self._bytes = self._count = 0
        self._found: list[tuple[torch.Tensor, InputIndex]] = []

    def add(self, gradient: torch.Tensor, place: InputIndex) -> None:
        if type(gradient) is not torch.Tensor or gradient.is_complex() or gradient.is_sparse:
            self._found.append((_norm(gradient), place))
            return
        held = self._waiting.setdefault((gradient.device, gradient.dtype), [])
        held.append((gradient.detach(), place))
        self._bytes += gradient.nbytes
        self._count += 1
        if self._count >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES:
            self._take()

    def _take(self) -> None:
        for (_, dtype), held in self._waiting.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            norms = norms_of([tensor for tensor, _ in held], wide)
            self._found += zip(norms, (place for _, place in held), strict=True)
        self._waiting.clear()
        self._bytes = self._count = 0

    def values(self) -> Iterator[tuple[InputIndex, float]]:
        """All norms on the host, with one copy per device."""
        self._take()
        by_device: dict[torch.device, list[tuple[torch.Tensor, InputIndex]]] = {}
        for norm, place in self._found:
            by_device.setdefault(norm.device, []).append((norm, place))
        for found in by_device.values():
            together = torch.stack([norm.float() for norm, _ in found]).tolist()
            yield from zip((place for _, place in found), together, strict=True)


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    held = local(gradient.detach())
    if held.is_sparse:
        held = held.coalesce().values()
    found: torch.Tensor = torch.linalg.vector_norm(held)
    return found
