"""Runs a forward pass again with every operation checked, to name the one that made nan or inf.

A loss that is not finite is noticed when backward begins, and such a gradient before the optimizer
uses it. The weights are still those of the step then, so that the same batch and random numbers
give the same values again. This works only on the CPU, where such values are noticed in time.
`rerun` describes what a re-run restores.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from tui_trainer.history.records import Producer
from tui_trainer.inspector.loss_replay import outputs_of
from tui_trainer.inspector.rerun import Autocast, ModelCall, call_again, call_context
from tui_trainer.trace.module_calls import tensors_in
from tui_trainer.trace.random_state import random_state
from tui_trainer.trace.script_frames import script_frames
from tui_trainer.trace.torch_private import (
    node_name,
    tensors_of,
    version_of_value,
    without_torch_function,
)
from tui_trainer.trace.tracer import Tracer

MAX_CALLS = 8
"""Maximum number of calls of models that are kept between two backward passes."""
MAX_NODES = 20_000
"""Maximum number of nodes of a graph that are watched."""
MASKING = frozenset(
    ("masked_fill", "where", "full", "full_like", "new_full", "fill", "setitem", "triu", "tril")
)
"""Operations that scripts use to make infinite values on purpose."""
OWN_PACKAGE = __name__.partition(".")[0]
OWN_FRAMES = ("_place", "_operation", "_origin", "_follow", "__torch_function__")
"""Functions of this file that are on the stack while an operation is examined."""


@dataclass(frozen=True)
class TorchCall:
    """An operation of the forward pass, and the place from which it was called."""

    name: str
    place: str
    """`file.py:12` in the user's own code; "" where only PyTorch's code calls it."""
    module: str
    """Path of the innermost module; "" for the root."""
    kind: str
    """Class of that module."""

    def producer(self, name: str = "") -> Producer:
        """This operation as a producer; `name`: that of its operation in backward."""
        return Producer(
            "module" if self.module and not name else "operation",
            self.module,
            self.kind,
            name or self.name,
            self.place,
            rerun=True,
            backward=bool(name),
        )


class CheckedOperations(TorchFunctionMode):
    """Follows values that are not finite from operation to operation."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._paths = {module: path for path, module in model.named_modules()}
        self._modules: list[torch.nn.Module] = []
        """Modules whose forward is running."""
        self._origins: dict[int, tuple[torch.Tensor, TorchCall | Literal["outside", "mask"]]] = {}
        """id → (tensor that is not finite, what made it so). The tensors are kept, so that no other
        tensor gets the same id."""
        self._nodes: dict[Any, TorchCall] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = _name_of(func)
        made = [args[0]] if name == "setitem" else tensors_in((result,))
        made = [tensor for tensor in made if isinstance(tensor, torch.Tensor)]
        if made and name:
            with without_torch_function():
                self._follow(name, args, kwargs, made)
        return result

    def _follow(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[torch.Tensor]
    ) -> None:
        operation: TorchCall | None = None
        for tensor in made:
            if tensor.grad_fn is not None and tensor.grad_fn not in self._nodes:
                operation = operation or self._operation(name)
                self._nodes[tensor.grad_fn] = operation
        wrong = [tensor for tensor in made if _is_wrong(tensor)]
        if not wrong:
            return
        origin = self._origin(name, tensors_of((args, kwargs)), wrong)
        for tensor in wrong:
            self._origins[id(tensor)] = tensor, origin

    def _origin(
        self, name: str, given: Sequence[torch.Tensor], wrong: Sequence[torch.Tensor]
    ) -> TorchCall | Literal["outside", "mask"]:
        known = [self._origins[id(t)][1] for t in given if id(t) in self._origins]
        for earlier in known:
            if earlier != "mask":
                return earlier
        bad = [tensor for tensor in given if _is_wrong(tensor)]
        if any(not _is_mask(tensor) for tensor in bad if id(tensor) not in self._origins):
            return "outside"
        has_nan = any(bool(torch.isnan(tensor).any()) for tensor in wrong)
        if not has_nan and (bad or name in MASKING):
            return "mask"
        return self._operation(name)

    def _operation(self, name: str) -> TorchCall:
        module = self._modules[-1] if self._modules else None
        path = self._paths.get(module, "") if module is not None else ""
        return TorchCall(name, _place(), path, type(module).__name__ if module is not None else "")

    # ------------------------------------------------------------ results

    def origin_of(self, output: Any) -> TorchCall | None:
        """The operation that made the output of the model not finite; None if it is finite or was
        made so elsewhere."""
        for tensor in outputs_of(output):
            entry = self._origins.get(id(tensor))
            if entry is not None:
                return entry[1] if isinstance(entry[1], TorchCall) else None
        return None

    def called(self, module: torch.nn.Module, *_: Any) -> None:
        self._modules.append(module)

    def returned(self, module: torch.nn.Module, *_: Any) -> None:
        while self._modules and self._modules.pop() is not module:
            pass

    def operation_of_backward(
        self, roots: Sequence[torch.Tensor], model: torch.nn.Module
    ) -> tuple[TorchCall, str] | None:
        """(operation, its name in backward) at which the gradients of `roots` stop being finite;
        None if they stay finite."""
        found: list[tuple[TorchCall | None, str]] = []
        handles = []
        for node, operation in self._with_operations(roots):

            def look(
                into: tuple[Any, ...], out_of: tuple[Any, ...], node: Any = node,
                operation: TorchCall | None = operation,
            ) -> None:  # fmt: skip
                if not found and _any_nonfinite(into) and not _any_nonfinite(out_of):
                    found.append((operation, node_name(node).lower()))

            handles.append(node.register_hook(look))
        try:
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(
                roots, parameters, [torch.ones_like(each) for each in roots], allow_unused=True
            )
        finally:
            for handle in handles:
                handle.remove()
        operation, name = found[0] if found else (None, "")
        return None if operation is None else (operation, name)

    def _with_operations(
        self, roots: Sequence[torch.Tensor]
    ) -> Iterator[tuple[Any, TorchCall | None]]:
        """(node, call in the forward pass that it belongs to) for every node of the graph."""
        waiting: list[tuple[Any, TorchCall | None]] = [(each.grad_fn, None) for each in roots]
        seen = {node for node, _ in waiting}
        for node, after in waiting:  # grows
            operation = self._nodes.get(node, after)
            yield node, operation
            for before, _ in node.next_functions:
                if before is not None and before not in seen and len(seen) < MAX_NODES:
                    seen.add(before)
                    waiting.append((before, operation))


def _name_of(function: Any) -> str:
    name = str(getattr(function, "__name__", "")).strip("_")
    if name in ("get", "set"):  # of a property
        return ""
    return {"truediv": "div", "rtruediv": "div", "rsub": "sub", "rmul": "mul"}.get(name, name)


def _place() -> str:
    """`file.py:12`: the line of the user's code that is running; "" for none."""
    for frame in script_frames():
        module = str(frame.f_globals.get("__name__", ""))
        if module == __name__ and frame.f_code.co_name in OWN_FRAMES:
            continue
        own = module.partition(".")[0] == OWN_PACKAGE and not module.startswith(
            f"{OWN_PACKAGE}.models."
        )
        return "" if own else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    return ""


def _is_wrong(tensor: torch.Tensor) -> bool:
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return numbers and tensor.is_cpu and not bool(torch.isfinite(tensor.detach()).all())


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether all values that are not finite are -inf, as in a mask that is added to scores."""
    return not bool((torch.isnan(tensor) | torch.isposinf(tensor)).any())


def _any_nonfinite(tensors: Sequence[Any]) -> bool:
    return any(isinstance(each, torch.Tensor) and _is_wrong(each) for each in tensors)


# ---------------------------------------------------------------- during a training


class SeenCall(NamedTuple):
    """A call of a model for training, kept at every step: the values from which `model_call` makes
    a `ModelCall`."""

    module: weakref.ref[torch.nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    random: torch.Tensor
    """The state of PyTorch's generator before the call."""
    autocast: bool
    dtype: torch.dtype
    training: bool

    def model_call(self, number: int) -> ModelCall:
        return ModelCall(
            step=0,
            module=self.module,
            args=self.args,
            kwargs=self.kwargs,
            versions=self.versions,
            random={**random_state(), "torch": self.random},
            autocast=[Autocast("cpu", self.autocast, self.dtype)],
            training=self.training,
            buffers=None,
            generators=[],
            number=number,
        )


class CheckedRerun:
    """Keeps the arguments of the models' last calls until loss and gradients have proved finite.

    Used on the training thread. A re-run takes a forward pass, and a backward pass for gradients.
    """

    def __init__(self, tracer: Tracer, reruns: int) -> None:
        """`reruns`: the most re-runs in a run."""
        self._tracer = weakref.ref(tracer)
        self._left = reruns
        self._calls: list[SeenCall] = []
        self._complete = False
        """Whether backward has begun since the last of the calls."""

    def forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep the arguments of a call. Only the state of PyTorch's generator is copied."""
        if self._complete or len(self._calls) >= MAX_CALLS:
            self._calls, self._complete = [], False
        if not self._left:
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not given or not given[0].is_cpu:
            return
        self._calls.append(
            SeenCall(
                weakref.ref(module),
                args,
                kwargs,
                list(map(version_of_value, given)),
                torch.default_generator.get_state(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                module.training,
            )
        )

    def backward_began(self) -> None:
        """Note that the calls so far belong to this backward; the next call starts over."""
        self._complete = True

    def stepped(self) -> None:
        """Forget the calls: the weights are about to change."""
        if self._calls:
            self._calls, self._complete = [], False

    def origin_of_loss(self) -> Producer | None:
        """The operation of the forward pass that made the loss not finite; None if no
        operation did."""
        for call in self._taken():
            with contextlib.suppress(Exception), self._checked(call, False) as (model, checks):
                origin = checks.origin_of(call_again(model, call))
                if origin is not None:
                    return origin.producer()
        return None

    def origin_of_gradients(self) -> Producer | None:
        """The operation whose backward made the gradients not finite. Backward starts with a
        gradient of 1 for each output of the model, since only the factors after it matter."""
        for call in reversed(self._taken()):
            with contextlib.suppress(Exception), self._checked(call, True) as (model, checks):
                outputs = [t for t in outputs_of(call_again(model, call)) if t.grad_fn is not None]
                with without_torch_function():
                    found = checks.operation_of_backward(outputs, model)
                if found is not None:
                    return found[0].producer(found[1])
        return None

    def _taken(self) -> list[ModelCall]:
        self._left -= bool(self._calls)
        return [seen.model_call(number) for number, seen in enumerate(self._calls, 1)]

    @contextlib.contextmanager
    def _checked(
        self, call: ModelCall, gradients: bool
    ) -> Iterator[tuple[torch.nn.Module, CheckedOperations]]:
        tracer = self._tracer()
        assert tracer is not None
        with tracer.suspended(), call_context(call, gradients) as model:
            checks = CheckedOperations(model)
            for module in model.modules():
                module.register_forward_pre_hook(checks.called, prepend=True)
                module.register_forward_hook(checks.returned)
            with checks:
                yield model, checks
