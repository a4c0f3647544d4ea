"""Hooks the tracer into PyTorch: optimizers, zero_grad, backward, clipping, GradScaler, saving.

Every wrapper calls its original directly while torch.compile traces it, on other threads than the
training thread, and while the tracer is suspended.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any, Protocol

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler, OneCycleLR
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tui_trainer.protocol.events import ClipKind
from tui_trainer.trace.backward_passes import BackwardPasses
from tui_trainer.trace.clipping_calls import Clippings
from tui_trainer.trace.module_calls import Patches, copy_metadata
from tui_trainer.trace.optimizer_steps import OptimizerSteps
from tui_trainer.trace.torch_private import NormCapture

CLIPPING: dict[str, ClipKind] = {
    "clip_grad_norm_": "norm",
    "clip_grads_with_norm_": "norm",
    "clip_grad_value_": "value",
}
"""Functions of torch.nn.utils → the kind of clipping that they do."""


class TorchEvents(Protocol):
    """Receives what the hooks report: the tracer.

    A method that returns a bool tells whether a phase begins; if so, the matching `…_ended` or
    `phase_failed` follows.
    """

    training_thread: int
    clip_calls: dict[ClipKind, float]
    clip_limits: dict[ClipKind, float]

    def optimizer_created(self, optimizer: Optimizer) -> None: ...
    def optimizer_used(self, optimizer: Optimizer) -> None: ...
    def module_changed(self, module: torch.nn.Module) -> None: ...
    def zero_grad_began(self, owner: Optimizer | torch.nn.Module) -> bool: ...
    def zero_grad_ended(self, owner: Optimizer | torch.nn.Module) -> None: ...
    def phase_failed(self) -> None: ...
    def saving_began(self) -> bool: ...
    def saving_ended(self) -> None: ...
    def collective_called(self, tensors: Any) -> None: ...
    def loss_scaled(self, scaler: GradScaler, outputs: Any, result: Any) -> None: ...
    def unscale_began(self) -> None: ...
    def gradients_unscaled(self, optimizer: Optimizer) -> None: ...
    def scaler_updated(self) -> None: ...
    def schedule_stepped(self, optimizer: Optimizer) -> None: ...


class TorchHooks:
    """Installs all hooks, and removes them again without a trace."""

    def __init__(
        self,
        events: TorchEvents,
        steps: OptimizerSteps,
        backwards: BackwardPasses,
        clips: Clippings,
        patches: Patches,
    ) -> None:
        self._events = events
        self._steps = steps
        self._backwards = backwards
        self._clips = clips
        self._patches = patches
        self._handles: list[Any] = []
        self._safetensors_wrapped = True
        self._total_norm_type: Any = math.nan
        """The p of the p-norm that the last call of `get_total_norm` computed; nan before that."""

    def install(self) -> None:
        self._wrap_zero_grad()
        self._wrap_backward()
        self._wrap_clipping()
        self._wrap_scaler()
        self._wrap_functional()
        self._wrap_schedulers()
        self._wrap_saving(torch, "save")
        self._wrap_safetensors()
        self._wrap_collectives()
        self._handles = [*self._hook_optimizers(), *self._hook_modules()]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._patches.restore()

    def _ignored(self) -> bool:
        return torch.compiler.is_compiling() or get_ident() != self._events.training_thread

    def _hook_optimizers(self) -> list[Any]:
        events, ignored = self._events, self._ignored
        steps = self._steps

        def before(
            optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if torch.compiler.is_compiling() or get_ident() != events.training_thread:
                return None
            # Bound methods are called as step(optimizer, closure).
            first = 1 if args and args[0] is optimizer else 0
            closure = args[first] if len(args) > first else kwargs.get("closure")
            if not callable(closure):
                steps.step_began(optimizer, False)
                return None
            steps.step_began(optimizer, True)
            if len(args) > first:
                args = (*args[:first], self._evaluating(closure), *args[first + 1 :])
            else:
                kwargs = {**kwargs, "closure": self._evaluating(closure)}
            return args, kwargs

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (torch.compiler.is_compiling() or get_ident() != events.training_thread):
                steps.step_ended(optimizer)

        original: Callable[..., None] = Optimizer.__init__

        def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            if not ignored():
                if not self._safetensors_wrapped:
                    self._wrap_safetensors()
                events.optimizer_created(optimizer)

        self._patches.replace(Optimizer, "__init__", copy_metadata(__init__, original))
        return [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ]

    def _evaluating(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        ignored = self._ignored
        steps = self._steps

        @functools.wraps(closure)
        def evaluate() -> Any:
            if ignored():
                return closure()
            steps.evaluation_began()
            result = closure()
            steps.evaluation_ended()
            return result

        return evaluate

    def _hook_modules(self) -> list[Any]:
        def changed(module: torch.nn.Module, name: str, new: Any) -> None:
            if not self._ignored():
                self._events.module_changed(module)

        return [
            register_module_module_registration_hook(changed),
            register_module_parameter_registration_hook(changed),
        ]

    def _wrap_zero_grad(self) -> None:
        events = self._events
        for owner in (Optimizer, torch.nn.Module):
            original = owner.zero_grad

            def zero_grad(
                self: Any, *args: Any, _original: Callable[..., None] = original, **kwargs: Any
            ) -> None:
                if (
                    torch.compiler.is_compiling()
                    or get_ident() != events.training_thread
                    or not events.zero_grad_began(self)
                ):
                    return _original(self, *args, **kwargs)
                try:
                    _original(self, *args, **kwargs)
                except BaseException:
                    events.phase_failed()
                    raise
                events.zero_grad_ended(self)
                return None

            self._patches.replace(owner, "zero_grad", copy_metadata(zero_grad, original))

    def _wrap_backward(self) -> None:
        events, ignored = self._events, self._ignored
        backwards = self._backwards
        tensor_backward: Callable[..., Any] = torch.Tensor.backward
        autograd_backward: Callable[..., Any] = torch.autograd.backward

        def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensors = args[0] if args else kwargs.get("tensors", ())
            if not backwards.backward_began(tensors):
                return original(*args, **kwargs)
            try:
                result = original(*args, **kwargs)
            except BaseException:
                events.phase_failed()
                raise
            backwards.backward_ended()
            return result

        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or get_ident() != events.training_thread:
                return tensor_backward(self, *args, **kwargs)
            return run(tensor_backward, (self, *args), kwargs)

        def function(*args: Any, **kwargs: Any) -> Any:
            # `Tensor.backward` calls this: the phase is open already.
            if (
                torch.compiler.is_compiling()
                or get_ident() != events.training_thread
                or backwards.open is not None
            ):
                return autograd_backward(*args, **kwargs)
            return run(autograd_backward, args, kwargs)

        autograd_grad: Callable[..., Any] = torch.autograd.grad

        def grad(*args: Any, **kwargs: Any) -> Any:
            if ignored():
                return autograd_grad(*args, **kwargs)
            outputs = args[0] if args else kwargs.get("outputs", ())
            inputs = args[1] if len(args) > 1 else kwargs.get("inputs", ())
            if not backwards.gradients_began(outputs, inputs):
                return autograd_grad(*args, **kwargs)
            try:
                result = autograd_grad(*args, **kwargs)
            except BaseException:
                events.phase_failed()
                raise
            backwards.gradients_ended(inputs, result)
            return result

        replace = self._patches.replace
        replace(torch.Tensor, "backward", copy_metadata(method, tensor_backward))
        replace(torch.autograd, "backward", copy_metadata(function, autograd_backward))
        replace(torch.autograd, "grad", copy_metadata(grad, autograd_grad))

    def _wrap_schedulers(self) -> None:
        events, ignored = self._events, self._ignored
        for kind in (LRScheduler, CosineAnnealingWarmRestarts, OneCycleLR):
            if "step" not in vars(kind):
                continue
            original: Callable[..., None] = kind.step

            def step(
                self: Any, *args: Any, _original: Callable[..., None] = original, **kwargs: Any
            ) -> None:
                _original(self, *args, **kwargs)
                optimizer = getattr(self, "optimizer", None)
                if isinstance(optimizer, Optimizer) and not ignored():
                    events.schedule_stepped(optimizer)

            self._patches.replace(kind, "step", copy_metadata(step, original))

    def _wrap_safetensors(self) -> None:
        """Wrap `save_file`. While `safetensors.torch` is itself importing PyTorch, the function
        does not exist yet. By the time the first optimizer is created the script may have imported
        it by name, so `serialize_file`, which it calls, is wrapped then."""
        with contextlib.suppress(ImportError, AttributeError):  # a broken or different version
            importlib.import_module("safetensors.torch")
            module = sys.modules["safetensors.torch"]
            later = not self._safetensors_wrapped
            self._safetensors_wrapped = hasattr(module, "save_file")
            if self._safetensors_wrapped:
                self._wrap_saving(module, "serialize_file" if later else "save_file")

    def _wrap_saving(self, module: Any, name: str) -> None:
        events, ignored = self._events, self._ignored
        original: Callable[..., Any] = getattr(module, name)

        def save(*args: Any, **kwargs: Any) -> Any:
            if ignored() or not events.saving_began():
                return original(*args, **kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                events.saving_ended()

        wrapper = copy_metadata(save, original)
        wrapper.__wrapped__ = original  # our own checkpoints use it
        self._patches.replace(module, name, wrapper)

    def _wrap_collectives(self) -> None:
        if not torch.distributed.is_available():
            return
        for name in ("all_reduce", "all_reduce_coalesced"):
            self._patches.replace(torch.distributed, name, self._collective(name))

    def _collective(self, name: str) -> Callable[..., Any]:
        events, ignored = self._events, self._ignored
        original: Callable[..., Any] = getattr(torch.distributed, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            if not ignored():
                events.collective_called(args[0] if args else next(iter(kwargs.values()), ()))
            return original(*args, **kwargs)

        return copy_metadata(collective, original)  # type: ignore[no-any-return]

    def _wrap_functional(self) -> None:
        for name, has_value in (("grad", False), ("grad_and_value", True)):
            original = getattr(torch.func, name, None)
            if original is not None:
                self._patches.replace(torch.func, name, self._functional(original, has_value))

    def _functional(self, original: Callable[..., Any], has_value: bool) -> Callable[..., Any]:
        events, ignored = self._events, self._ignored
        backwards = self._backwards

        def transform(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            computed: Callable[..., Any] = original(*args, **kwargs)

            @functools.wraps(computed)
            def compute(*inputs: Any, **named: Any) -> Any:
                if ignored() or not backwards.functional_began():
                    return computed(*inputs, **named)
                try:
                    result = computed(*inputs, **named)
                except BaseException:
                    events.phase_failed()
                    raise
                backwards.functional_ended(result, has_value)
                return result

            return compute

        return copy_metadata(transform, original)  # type: ignore[no-any-return]

    def _wrap_clipping(self) -> None:
        for name, kind in CLIPPING.items():
            original = getattr(torch.nn.utils, name, None)
            if original is None:
                continue
            wrapper = self._clipping(original, name, kind)
            for module in (torch.nn.utils, torch.nn.utils.clip_grad):
                if getattr(module, name, None) is original:
                    self._patches.replace(module, name, wrapper)
        total_norm = getattr(torch.nn.utils, "get_total_norm", None)
        if total_norm is not None:
            self._patches.replace(torch.nn.utils, "get_total_norm", self._total_norm(total_norm))

    def _total_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `get_total_norm` to remember the kind of norm for the clipping that follows."""

        def total_norm(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and get_ident() == self._events.training_thread:
                self._total_norm_type = args[1] if len(args) > 1 else kwargs.get("norm_type", 2.0)
            return original(*args, **kwargs)

        return copy_metadata(total_norm, original)  # type: ignore[no-any-return]

    def observed_clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a framework's own `clip_grad_norm_`, which is then observed like PyTorch's."""
        return self._clipping(original, "clip_grad_norm_", "norm")

    def _clipping(
        self, original: Callable[..., Any], name: str, kind: ClipKind
    ) -> Callable[..., Any]:
        events = self._events
        clips = self._clips
        given_total = name == "clip_grads_with_norm_"

        def clip(*args: Any, **kwargs: Any) -> Any:
            limits = events.clip_limits
            if limits and kind in limits and not torch.compiler.is_compiling():
                args, kwargs = _with_limit(args, kwargs, limits[kind])
            if torch.compiler.is_compiling() or get_ident() != events.training_thread:
                return original(*args, **kwargs)
            parameters = args[0] if args else kwargs.get("parameters", ())
            if isinstance(parameters, Iterator):  # read twice: here and by the function
                parameters = list(parameters)
                if args:
                    args = (parameters, *args[1:])
                else:
                    kwargs["parameters"] = parameters
            norm_type = 2.0
            if given_total:
                norm_type = self._total_norm_type
            elif name == "clip_grad_norm_":
                norm_type = args[2] if len(args) > 2 else kwargs.get("norm_type", 2.0)
            if not clips.clip_began(parameters, kind, kind == "norm" and norm_type == 2):
                return original(*args, **kwargs)
            try:
                with NormCapture() as captured:
                    result = original(*args, **kwargs)
            except BaseException:
                events.phase_failed()
                raise
            limit = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value"))
            if kind not in limits and isinstance(limit, (int, float)):
                events.clip_calls[kind] = limit
            total = result
            if given_total:
                total = args[2] if len(args) > 2 else kwargs.get("total_norm")
            clips.clip_ended(kind, parameters, limit, norm_type, total, captured)
            return result

        return copy_metadata(clip, original)  # type: ignore[no-any-return]

    def _wrap_scaler(self) -> None:
        events, ignored = self._events, self._ignored
        steps = self._steps
        scale, step, update = GradScaler.scale, GradScaler.step, GradScaler.update
        unscale = GradScaler.unscale_

        def scale_(self: Any, outputs: Any) -> Any:
            result = scale(self, outputs)
            if not ignored() and self.is_enabled():
                events.loss_scaled(self, outputs, result)
            return result

        def unscale_(self: Any, optimizer: Any) -> Any:
            if not ignored() and self.is_enabled():
                events.unscale_began()
            result = unscale(self, optimizer)
            if not ignored() and self.is_enabled():
                events.gradients_unscaled(optimizer)
            return result

        def step_(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if ignored() or not self.is_enabled():
                return step(self, optimizer, *args, **kwargs)
            before = steps.begun
            result = step(self, optimizer, *args, **kwargs)
            if steps.begun == before:
                steps.step_skipped(optimizer)
            return result

        def update_(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = update(self, *args, **kwargs)
            if not ignored() and self.is_enabled():
                events.scaler_updated()
            return result

        replace = self._patches.replace
        replace(GradScaler, "scale", copy_metadata(scale_, scale))
        replace(GradScaler, "unscale_", copy_metadata(unscale_, unscale))
        replace(GradScaler, "step", copy_metadata(step_, step))
        replace(GradScaler, "update", copy_metadata(update_, update))


def _with_limit(
    args: tuple[Any, ...], kwargs: dict[str, Any], limit: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a clipping function with another threshold."""
    if len(args) > 1:
        return (args[0], limit, *args[2:]), kwargs
    name = "clip_value" if "clip_value" in kwargs else "max_norm"
    return args, {**kwargs, name: limit}
