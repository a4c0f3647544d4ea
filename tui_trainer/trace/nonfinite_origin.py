"""Finds the operation that made a loss non-finite, in its autograd graph before backward.

The graph holds the inputs or results of many operations for backward. An operation whose result is
not finite although all of its known inputs are is the origin; nothing is computed again, and the
graph is left as it is. Only for tensors on the CPU, where reading a value does not wait.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Literal, Protocol

import torch

from tui_trainer.history.records import Producer
from tui_trainer.trace.module_calls import Patches
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Readings
from tui_trainer.trace.script_frames import (
    objects_of_script,
    place_in_file,
    place_in_frame,
    place_of_operation,
    places_in_called,
    script_frames,
)
from tui_trainer.trace.torch_private import (
    compiled_code_exists,
    has_saved,
    next_sequence_number,
    node_name,
    result_of,
    saved,
    saved_tensors,
    sequence_number,
)

MAX_SEARCHES = 10
"""Maximum number of non-finite losses of a run whose graphs are searched."""
MAX_NODES = 20_000
"""Maximum number of nodes that are visited in a graph."""
RESULTS = ("result", "output", "result0", "result1")
"""Names under which a node saves its results; every other saved tensor is an input."""
SKIPPED = ("mask", "weight_mask", "rng_state", "indices", "index", "total_weight")
PASSING = frozenset(
    (
        *("Relu", "LeakyRelu", "Gelu", "Silu", "Elu", "Hardtanh", "Clamp", "Sigmoid", "Tanh"),
        *("NativeDropout", "Dropout", "LogSoftmax", "Softmax", "NllLoss", "NllLoss2D", "Abs"),
        *("View", "UnsafeView", "Reshape", "ReshapeAlias", "Transpose", "T", "Permute", "Expand"),
        *("Slice", "Select", "Squeeze", "Unsqueeze", "Split", "SplitWithSizes", "Unbind", "Index"),
        *("Gather", "AsStrided", "Alias", "Clone", "ToCopy", "Cat", "Stack", "Neg", "Where"),
        *("MaskedFill", "NativeLayerNorm"),
    )
)
"""Operations whose result is finite wherever their inputs are: the origin lies before them."""


@dataclass(frozen=True)
class Origin:
    """An operation, weight or input at which values stop being finite."""

    source: Literal["operation", "weight", "input"]
    operation: str
    """Name as in the graph, in lower case; "" for a weight."""
    parameters: tuple[torch.Tensor, ...]
    """The weight itself, or the parameters that the operation used or that are nearest to it on the
    side of the input."""


def origin_of(loss: torch.Tensor) -> Origin | None:
    """The origin of a non-finite loss; None where the graph does not show it."""
    return _OriginSearch(loss.grad_fn).run() if loss.grad_fn is not None else None


class _OriginSearch:
    """A search from the loss towards the inputs."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._state: dict[Any, bool | None] = {}
        """Node → whether its result is finite; None: unknown."""
        self._inputs_bad: dict[Any, bool | None] = {}

    def run(self) -> Origin | None:
        """Search in post-order, so that the node nearest to the inputs is found first."""
        seen: set[Any] = set()
        stack: list[tuple[Any, bool]] = [(self._root, False)]
        while stack and len(seen) < MAX_NODES:
            node, done = stack.pop()
            if done:
                origin = self._judge(node)
                if origin is not None:
                    return origin
                continue
            if node in seen:
                continue
            seen.add(node)
            if node is not self._root and self._finite(node) is True:
                continue
            stack.append((node, True))
            stack += [(before, False) for before, _ in node.next_functions if before is not None]
        return None

    def _judge(self, node: Any) -> Origin | None:
        """The origin if it is at `node`, otherwise None. Called once no node before it is one."""
        name = node_name(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, torch.Tensor):
            finite = _is_finite(variable)
            return Origin("weight", "", (variable,)) if finite is False else None
        if self._finite(node) is not False:
            if self._inputs_bad.get(node) and self._leaf_inputs(node):
                return Origin("input", name.lower(), self._nearest(node))
            return None
        if self._inputs_bad.get(node) and self._leaf_inputs(node):
            return Origin("input", name.lower(), self._nearest(node))
        if name in PASSING:
            before = [each for each, _ in node.next_functions if each is not None]
            unknown = [each for each in before if self._finite(each) is not True]
            if len(unknown) == 1 and getattr(unknown[0], "variable", None) is None:
                return Origin("operation", node_name(unknown[0]).lower(), self._nearest(unknown[0]))
        return Origin("operation", name.lower(), self._nearest(node))

    def _finite(self, node: Any) -> bool | None:
        """Whether the result of a node is finite."""
        if node not in self._state:
            saved = saved_tensors(node)
            results = [_is_finite(t) for name, t in saved.items() if name in RESULTS]
            inputs = {
                name: t for name, t in saved.items() if name not in RESULTS and name not in SKIPPED
            }
            known = [_is_finite(t) for t in inputs.values()]
            self._inputs_bad[node] = False in known
            if False in results:
                self._state[node] = False
            elif results and all(results):
                self._state[node] = True
            else:
                self._state[node] = _computed(node_name(node), inputs, node)
        return self._state[node]

    def _leaf_inputs(self, node: Any) -> bool:
        """Whether a node has inputs that nothing in the graph computed: a batch, a constant."""
        return any(before is None for before, _ in node.next_functions)

    def _nearest(self, node: Any) -> tuple[torch.Tensor, ...]:
        """The parameters that `node` uses itself, or else the nearest ones towards the inputs."""
        level, seen = [node], {node}
        for _ in range(64):
            variables = [getattr(each, "variable", None) for each in level]
            found = [each for each in variables if isinstance(each, torch.Tensor)]
            if found:
                return tuple(found)
            following = [n for each in level for n, _ in each.next_functions if n is not None]
            level = [each for each in dict.fromkeys(following) if each not in seen]
            seen.update(level)
            if not level or len(seen) > MAX_NODES:
                break
        return ()


def _is_finite(tensor: torch.Tensor) -> bool | None:
    """Whether all elements are finite; None for integers, and on a device, where reading waits."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.is_cpu:
        return None
    return bool(torch.isfinite(tensor).all())


def _computed(name: str, inputs: dict[str, torch.Tensor], node: Any) -> bool | None:
    """Whether the result of a simple operation is finite, judged from its saved inputs; None where
    that is unknown."""
    x, other = inputs.get("self"), inputs.get("other")
    if name == "Div" and x is None and other is not None and other.is_cpu:
        return None if bool((other != 0).all()) else False
    if x is None or not x.is_cpu:
        return None
    if name in ("Log", "Log2", "Log10"):
        return bool(((x > 0) & torch.isfinite(x)).all())
    if name == "Log1P":
        return bool(((x > -1) & torch.isfinite(x)).all())
    if other is not None and name == "Div":
        return _is_finite(x / other)
    if other is not None and name == "Mul":
        return _is_finite(x * other)
    if name == "Pow" and has_saved(node, "exponent"):
        return _is_finite(x ** saved(node, "exponent"))
    return None


# ---------------------------------------------------------------- between the model and the loss

MAX_OUTSIDE = 64
"""Maximum number of nodes that are visited between a loss and the model."""
MAX_WATCHED = 24
"""Maximum number of these nodes whose gradients are kept."""
MAX_KEPT = 1 << 20
"""Maximum number of elements in all gradients that are kept."""
FINITE_BACKWARD = PASSING | {
    *("AccumulateGrad", "Add", "Sub", "Mul", "Sum", "Mean", "Dot", "Mv", "Mm", "Bmm", "Addmm"),
    *("MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropyWithLogits", "Rsub"),
    *("Softplus", "LogSigmoid", "Sin", "Cos", "Maximum", "Minimum", "Max", "Min", "Amax", "Amin"),
}
"""Operations whose backward makes finite gradients of finite ones, unless they overflow. Overflows
are rare in float32 and bfloat16, whose range ends near 3e38, and common in float16 (65,504)."""
NEVER_OVERFLOWING = frozenset(
    (
        *("AccumulateGrad", "Sum", "Mean", "Relu", "Abs", "Neg", "Clone", "Alias"),
        *("View", "UnsafeView", "Reshape", "ReshapeAlias", "Transpose", "T", "Permute"),
        *("Slice", "Select", "Squeeze", "Unsqueeze", "Split", "SplitWithSizes", "Unbind"),
        *("Cat", "Stack", "Where", "MaskedFill"),
    )
)
"""Operations of `FINITE_BACKWARD` whose backward only moves, divides or drops gradients."""
FIRST_SEARCHES = 4
"""Number of first passes through losses of one form whose graphs are searched …"""
SEARCH_EVERY = 64
"""… and the number of passes from one later search to the next. In between, operations are looked
up where they were found."""
MAX_FORMS = 16
MAX_CHILDREN = 8
"""Maximum number of children of a node that count for the form of a loss."""

_Path = tuple[int, ...]
"""The way from a node to one on the side of the inputs: indices into `next_functions`."""


@dataclass(slots=True)
class _LossForm:
    """Losses with the same last operations, which usually come from the same line of a script."""

    passes: int = 0
    suspects: tuple[tuple[_Path, type, str], ...] = ()
    """(path from the loss, type, name) of each operation that is watched."""


class LossOperations:
    """Keeps the gradients of the operations between the model and the loss until the gradients of
    the parameters are known to be finite.

    After backward the graph of these operations is gone, and running the model again does not run
    them. Nothing is computed. Where compiled code exists, whose backward may be compiled too,
    nothing is kept.
    """

    def __init__(self) -> None:
        self._since: int | None = None
        """Sequence number of the first node that was made after the model returned."""
        self._handles: list[Any] = []
        self._kept: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = []
        """(operation, gradients of its inputs, of its result), in the order of backward."""
        self._room = 0
        self._forms: dict[tuple[object, ...], _LossForm] = {}

    def model_returned(self) -> None:
        self._since = next_sequence_number()

    def watch(self, loss: torch.Tensor) -> None:
        """Backward of a finite loss begins."""
        try:
            self._watch(loss)
        except Exception:  # raised by a node that is unlike PyTorch's own
            self.backward_ended()

    def _watch(self, loss: torch.Tensor) -> None:
        self.backward_ended()
        self._kept, self._room = [], MAX_KEPT
        root = loss.grad_fn
        if self._since is None or root is None or compiled_code_exists():
            return
        for node, operation in self._suspects(root, loss.dtype):
            self._handles.append(node.register_hook(self._keep(operation.lower())))

    def _suspects(self, root: Any, dtype: torch.dtype) -> list[tuple[Any, str]]:
        """The operations to watch before `root`, and their names."""
        assert self._since is not None
        key = (dtype, *_form(root))
        form = self._forms.get(key)
        if form is None:
            if len(self._forms) == MAX_FORMS:
                self._forms.clear()
            form = self._forms[key] = _LossForm()
        form.passes += 1
        if form.passes > FIRST_SEARCHES and form.passes % SEARCH_EVERY:
            known = [(_follow(root, path), name) for path, _, name in form.suspects]
            kinds = [kind for _, kind, _ in form.suspects]
            if [type(node) for node, _ in known] == kinds and all(
                sequence_number(node) >= self._since for node, _ in known
            ):
                return known
        found = self._search(root, half=dtype is torch.float16)
        form.suspects = tuple((path, type(node), operation) for path, node, operation in found)
        return [(node, operation) for _, node, operation in found]

    def _search(self, root: Any, *, half: bool) -> list[tuple[_Path, Any, str]]:
        """(path, node, name) of each operation to watch. `half`: gradients are in float16."""
        assert self._since is not None
        found: list[tuple[_Path, Any, str]] = []
        waiting: list[tuple[_Path, Any]] = [((), root)]
        seen = {root}
        for path, node in waiting:  # grows
            if sequence_number(node) < self._since:
                continue
            operation = node_name(node)
            half = half or (operation == "ToCopy" and _converts_float16(node))
            if half:
                watched = operation not in NEVER_OVERFLOWING
            else:
                watched = operation not in FINITE_BACKWARD and not _is_plain_power(node)
            if watched:
                found.append((path, node, operation))
                if len(found) == MAX_WATCHED:
                    break
            for index, (before, _) in enumerate(node.next_functions):
                if before is not None and before not in seen and len(seen) < MAX_OUTSIDE:
                    seen.add(before)
                    waiting.append(((*path, index), before))
        return found

    def _keep(self, operation: str) -> Any:
        def keep(results: tuple[Any, ...], given: tuple[Any, ...]) -> None:
            try:
                size = sum(tensor.numel() for tensor in (*results, *given) if tensor is not None)
                if size <= self._room:
                    self._room -= size
                    self._kept.append((operation, results, given))
            except Exception:  # it would end the script's backward
                self._kept, self._room = [], 0

        return keep

    def backward_ended(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def origin(self) -> str:
        """The operation whose backward made non-finite gradients of finite ones; "" where no kept
        operation did."""
        with contextlib.suppress(Exception):  # such as a layout without `isfinite`
            for operation, results, given in self._kept:
                if _any_nonfinite(results) and not _any_nonfinite(given):
                    return operation
        return ""

    def stepped(self) -> None:
        """The gradients have been used."""
        self._kept, self._since = [], None


def _form(root: Any) -> tuple[type, ...]:
    """Types of the last operations of a loss. A term that is added to the loss changes them."""
    kinds = [type(root)]
    for child, _ in root.next_functions[:MAX_CHILDREN]:
        if child is not None:
            kinds.append(type(child))
            kinds += [type(node) for node, _ in child.next_functions[:MAX_CHILDREN]]
    return tuple(kinds)


def _follow(root: Any, path: _Path) -> Any | None:
    node = root
    for index in path:
        following = node.next_functions
        if index >= len(following) or following[index][0] is None:
            return None
        node = following[index][0]
    return node


def _is_plain_power(node: Any) -> bool:
    """Whether `node` is a power with an exponent of 1 or more, whose slope is finite everywhere."""
    # PowBackward1 and PowBackward2 save the exponent as a tensor: reading it would run the hooks
    # that unpack saved tensors.
    if node.name() != "PowBackward0" or not has_saved(node, "exponent"):
        return False
    exponent = saved(node, "exponent")
    return isinstance(exponent, (int, float)) and exponent >= 1


def _converts_float16(node: Any) -> bool:
    """Whether a conversion of dtype has a float16 input, so that its input gradient is float16."""
    before = next((each for each, _ in node.next_functions if each is not None), None)
    return before is not None and result_of(before)[1] is torch.float16


def _any_nonfinite(gradients: Sequence[torch.Tensor | None]) -> bool:
    return any(each is not None and _is_finite(each) is False for each in gradients)


# ---------------------------------------------------------------- in the course of a training


class _Pass(Protocol):
    losses: list[torch.Tensor]
    producer: Producer | None


class _Measurer(Protocol):
    tracked: TrackedParameters
    changed_by_hand: bool
    float32_exact: bool

    @property
    def passes(self) -> Sequence[_Pass]: ...


class NonFiniteSearch(Protocol):
    """Runs a step again to find what made a value not finite. Raises nothing."""

    def origin_of_loss(self) -> Producer | None:
        """Backward of a loss that is not finite is about to begin."""

    def origin_of_gradients(self) -> Producer | None:
        """Gradients that are not finite, of a finite loss, are about to be used."""

    def stepped(self) -> None:
        """The weights are about to change."""


class Measurers(Protocol):
    """The optimizers that are measured: the registry."""

    @property
    def measurers(self) -> Sequence[_Measurer]: ...


class Models(Protocol):
    """The models that the loop calls: `RootModules`."""

    @property
    def modules(self) -> list[torch.nn.Module]: ...


class NonFiniteOrigins:
    """Names the origin of the losses of a training that are not finite."""

    def __init__(self, registry: Measurers, roots: Models, patches: Patches) -> None:
        self._registry = registry
        self._roots = roots
        self._patches = patches
        self._left = MAX_SEARCHES
        self.rerun: NonFiniteSearch | None = None
        self.outside = LossOperations()

    def install(self) -> None:
        """Notice when saved tensors are packed by hooks (activation checkpointing, offloading):
        reading them would run these."""
        hooks = torch.autograd.graph.saved_tensors_hooks
        original = hooks.__enter__
        thread = get_ident()

        def __enter__(context: Any) -> Any:
            if get_ident() == thread:
                self._left = 0
            return original(context)

        self._patches.replace(hooks, "__enter__", __enter__)

    def producer_of(self, loss: torch.Tensor) -> Producer | None:
        """The origin of a loss that is about to be backpropagated and is not finite."""
        if not self._left:
            return None
        self._left -= 1
        origin = origin_of(loss)
        named = self._named(origin) if origin is not None else None
        if self.rerun is not None and (named is None or named.source != "weight"):
            named = self.rerun.origin_of_loss() or named
        return named

    def before_step(self, measurer: _Measurer, norms: Readings | None) -> None:
        """Find what made the gradients with these norms non-finite, before they are used."""
        usual = measurer.float32_exact and not measurer.changed_by_hand  # then each is finite
        if measurer.passes and not usual:
            known = [norm for norm in norms or () if isinstance(norm, float)]
            if not math.isfinite(sum(known)):
                last = measurer.passes[-1]
                losses_finite = all(bool(torch.isfinite(loss).all()) for loss in last.losses)
                if last.producer is None and losses_finite:
                    last.producer = self._origin_of_gradients()

    def stepped(self) -> None:
        """The weights are about to change."""
        self.outside.stepped()
        if self.rerun is not None:
            self.rerun.stepped()

    def _origin_of_gradients(self) -> Producer | None:
        operation = self.outside.origin()
        if operation:
            place = self._place_of(operation, inside=False)
            return Producer("operation", "", "", operation, place, backward=True)
        return self.rerun.origin_of_gradients() if self.rerun is not None else None

    def _named(self, origin: Origin) -> Producer:
        parameter, owner = self._parameter(origin.parameters)
        path = parameter.rpartition(".")[0]
        if origin.source == "weight":
            return Producer("weight", parameter)
        if origin.source == "input":
            return Producer("input", "", "", origin.operation)
        if origin.operation in ("addmm", "mm", "convolution", "embedding") and path:
            kind = type(owner).__name__ if owner is not None else ""
            return Producer("module", path, kind, origin.operation)
        return Producer("operation", path, "", origin.operation, self._place_of(origin.operation))

    def _parameter(self, parameters: Sequence[torch.Tensor]) -> tuple[str, torch.nn.Module | None]:
        """(name of the first measured parameter among `parameters`, the module that has it)."""
        wanted = {id(parameter) for parameter in parameters}
        name = ""
        for measurer in self._registry.measurers:
            tracked = measurer.tracked
            pairs = zip(tracked.parameters, tracked.names, strict=True)
            name = name or next((name for p, name in pairs if id(p) in wanted), "")
        for root in self._roots.modules:
            for module in root.modules():
                if any(id(p) in wanted for p in module.parameters(recurse=False)):
                    return name, module
        return name, None

    def _place_of(self, operation: str, inside: bool = True) -> str:
        """The only line that computes `operation`: of the loop or of the forward of a module; for
        one that is not `inside` a model, of the loop or of a function that the loop calls. "" where
        no line or several may."""
        frame = next(script_frames(), None)
        places = {place_in_frame(operation, frame)} if frame is not None else set()
        kinds = {type(module): module for root in self._roots.modules for module in root.modules()}
        if inside:
            places |= {place_of_operation(operation, module) for module in kinds.values()}
        elif frame is not None:
            places |= places_in_called(operation, frame)
        places.discard("")
        if not places and frame is not None:
            # A module outside the models, such as a loss module, if no other line may compute it.
            outside = {
                type(m): m for root in objects_of_script(torch.nn.Module) for m in root.modules()
            }
            places = {
                place_of_operation(operation, outside[kind]) for kind in outside.keys() - kinds
            }
            places.discard("")
            places &= {place_in_file(operation, frame)}
        return places.pop() if len(places) == 1 else ""


def merged(by_sum: Producer | None, by_graph: Producer | None) -> Producer | None:
    """Combines the origins found by the outputs of modules and by the graph of the loss."""
    if by_sum is None or by_graph is None:
        return by_sum or by_graph
    if by_graph.backward:
        return by_graph
    if by_graph.source == "input":  # of the graph: what the model was given, or a detached tensor
        return by_sum
    if by_graph.source == "weight" or by_sum.source != "module":
        return by_graph
    return by_sum._replace(operation=by_graph.operation, place=by_graph.place or by_sum.place)
