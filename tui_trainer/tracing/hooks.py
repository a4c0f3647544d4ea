"""Where the tracer listens in torch: optimizers, backward, clipping, gradient scaling.

Every wrapper calls straight through while torch.compile traces it, on threads that do not train and
while the tracer is suspended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tui_trainer.tracing.clips import Captured
from tui_trainer.tracing.hearing import Hearing
from tui_trainer.tracing.patching import Patches, same_face

Handles = list[Any]


def install(tracer: Hearing, patches: Patches) -> Handles:
    """Listen everywhere. Returns the handles of what torch itself can remove again."""
    _wrap_zero_grad(tracer, patches)
    _wrap_backward(tracer, patches)
    _wrap_clipping(tracer, patches)
    _wrap_scaler(tracer, patches)
    return _hook_optimizers(tracer)


def _passes_by(tracer: Hearing) -> bool:
    return torch.compiler.is_compiling() or get_ident() != tracer.owner


def _hook_optimizers(tracer: Hearing) -> Handles:
    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _passes_by(tracer):
            # Bound methods are called as step(optimizer, closure): args begins with the optimizer.
            rest = args[1:] if args and args[0] is optimizer else args
            closure = rest[0] if rest else kwargs.get("closure")
            tracer.step_begins(optimizer, callable(closure))

    def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _passes_by(tracer):
            tracer.step_ends(optimizer)

    return [
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]


def _wrap_zero_grad(tracer: Hearing, patches: Patches) -> None:
    for owner in (Optimizer, torch.nn.Module):
        original = owner.zero_grad

        def zero_grad(
            self: Any, *args: Any, _original: Callable[..., None] = original, **kwargs: Any
        ) -> None:
            if _passes_by(tracer) or not tracer.zero_grad_begins(self):
                return _original(self, *args, **kwargs)
            try:
                _original(self, *args, **kwargs)
            except BaseException:
                tracer.phase_failed()
                raise
            tracer.zero_grad_ends()
            return None

        patches.replace(owner, "zero_grad", same_face(zero_grad, original))


def _wrap_backward(tracer: Hearing, patches: Patches) -> None:
    tensor_backward: Callable[..., Any] = torch.Tensor.backward
    autograd_backward: Callable[..., Any] = torch.autograd.backward

    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = args[0] if args else kwargs.get("tensors", ())
        if not tracer.backward_begins(tensors):
            return original(*args, **kwargs)
        try:
            result = original(*args, **kwargs)
        except BaseException:
            tracer.phase_failed()
            raise
        tracer.backward_ends()
        return result

    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer):
            return tensor_backward(self, *args, **kwargs)
        return run(tensor_backward, (self, *args), kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer):
            return autograd_backward(*args, **kwargs)
        return run(autograd_backward, args, kwargs)

    patches.replace(torch.Tensor, "backward", same_face(method, tensor_backward))
    patches.replace(torch.autograd, "backward", same_face(function, autograd_backward))


CLIPPING = {
    "clip_grad_norm_": "norm",
    "clip_grads_with_norm_": "norm",
    "clip_grad_value_": "value",
}
"""Functions of torch.nn.utils to the kind of clipping that they do."""


def _wrap_clipping(tracer: Hearing, patches: Patches) -> None:
    for name, kind in CLIPPING.items():
        original = getattr(torch.nn.utils, name, None)
        if original is None:
            continue
        wrapper = _clipping(tracer, original, name, kind)
        for module in (torch.nn.utils, torch.nn.utils.clip_grad):
            if getattr(module, name, None) is original:
                patches.replace(module, name, wrapper)


def _clipping(
    tracer: Hearing, original: Callable[..., Any], name: str, kind: str
) -> Callable[..., Any]:
    def clip(*args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer):
            return original(*args, **kwargs)
        parameters = args[0] if args else kwargs.get("parameters", ())
        if isinstance(parameters, Iterator):  # seen twice: by us and by the function
            parameters = list(parameters)
            if args:
                args = (parameters, *args[1:])
            else:
                kwargs["parameters"] = parameters
        if not tracer.clip_begins(parameters, kind):
            return original(*args, **kwargs)
        try:
            with Captured() as captured:
                result = original(*args, **kwargs)
        except BaseException:
            tracer.phase_failed()
            raise
        limit = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value"))
        norm_type, total = 2.0, result
        if name == "clip_grads_with_norm_":
            total = args[2] if len(args) > 2 else kwargs.get("total_norm")
        elif kind == "norm":
            norm_type = args[2] if len(args) > 2 else kwargs.get("norm_type", 2.0)
        tracer.clip_ends(kind, parameters, limit, norm_type, total, captured)
        return result

    return same_face(clip, original)  # type: ignore[no-any-return]


def _wrap_scaler(tracer: Hearing, patches: Patches) -> None:
    scale, step, update = GradScaler.scale, GradScaler.step, GradScaler.update
    unscale = GradScaler.unscale_

    def scale_(self: Any, outputs: Any) -> Any:
        result = scale(self, outputs)
        if not _passes_by(tracer) and self.is_enabled():
            tracer.scaled(self, outputs, result)
        return result

    def unscale_(self: Any, optimizer: Any) -> Any:
        result = unscale(self, optimizer)
        if not _passes_by(tracer):
            tracer.optimizer_seen(optimizer)
        return result

    def step_(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer) or not self.is_enabled():
            return step(self, optimizer, *args, **kwargs)
        before = tracer.calls_of_step
        result = step(self, optimizer, *args, **kwargs)
        if tracer.calls_of_step == before:
            tracer.step_skipped(optimizer)
        return result

    def update_(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        if not _passes_by(tracer):
            tracer.scaler_updated()
        return result

    patches.replace(GradScaler, "scale", same_face(scale_, scale))
    patches.replace(GradScaler, "unscale_", same_face(unscale_, unscale))
    patches.replace(GradScaler, "step", same_face(step_, step))
    patches.replace(GradScaler, "update", same_face(update_, update))
