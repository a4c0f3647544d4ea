"""Everything that relies on PyTorch's private names or undocumented behaviour.

Every entry works in PyTorch 2.6 to 2.13. `tests/trace/test_torch_private.py` fails for each entry
that a new version breaks. Where a name is missing, a function here returns that nothing is known,
so that a different PyTorch costs information and never a training.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter, is_
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.multiprocessing.reductions import StorageWeakRef

from tui_trainer.protocol.absent import Absent, absent

# ---------------------------------------------------------------- models inside wrappers

# torch.compile, FSDP and activation checkpointing put one level of their own into parameter names.
_WRAPPER_LEVELS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)"
)


def plain_name(name: str) -> str:
    """The name of a parameter or module without the levels that wrappers add."""
    return _WRAPPER_LEVELS.sub("", name).lstrip(".")


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The user's model inside OptimizedModule, DataParallel and DistributedDataParallel."""
    while True:
        inner = module.__dict__.get("_modules", {})
        if inner.get("_orig_mod") is not None:
            module = inner["_orig_mod"]
        elif isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


# ---------------------------------------------------------------- nested arguments

TreeSpec = torch.utils._pytree.TreeSpec
"""Describes how values are nested in tuples, lists and dictionaries."""
tree_flatten = torch.utils._pytree.tree_flatten
tree_unflatten = torch.utils._pytree.tree_unflatten
tree_map = torch.utils._pytree.tree_map


# ---------------------------------------------------------------- classes of layers

DropoutLayer = torch.nn.modules.dropout._DropoutNd
BatchNormLayer = torch.nn.modules.batchnorm._BatchNorm


# ---------------------------------------------------------------- modes


def function_modes() -> int | None:
    """Number of active `TorchFunctionMode`s of this thread, without that of
    `torch.set_default_device`; None where it is unknown."""
    try:
        active = torch._C._len_torch_function_stack()
        default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        if active == 1 and torch._C._get_function_stack_at(0) is default is not None:
            return 0
        return int(active)
    except AttributeError:
        return None


def remove_function_mode(mode: Any) -> None:
    """Remove `mode` from this thread's stack of modes, at whatever depth; the others keep their
    order."""
    above = []
    while torch._C._len_torch_function_stack():
        top = torch._C._pop_torch_function_stack()
        if top is mode:
            break
        above.append(top)
    for each in reversed(above):
        torch._C._push_on_torch_function_stack(each)


def compiled_code_exists() -> bool:
    """Whether `torch.compile` was called, whose code a new mode would have compiled again; True
    where that is unknown."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return False
    backends = getattr(frames, "cached_backends", None)
    return backends is None or any(each is not None for each in backends.values())


# ---------------------------------------------------------------- sharded tensors


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor, of which this process holds a shard: any operation on the
    whole may be a collective."""
    return type(tensor) not in PLAIN and hasattr(tensor, "_local_tensor")


PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether arithmetic applies to `tensor`: it is of no subclass except Parameter, and neither
    sparse, nested nor quantized."""
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of `tensor` that this process holds; `tensor` itself if it is not sharded."""
    if type(tensor) in PLAIN:
        return tensor
    held: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return held


# ---------------------------------------------------------------- GradScaler


def gradient_scale(scaler: GradScaler, optimizer: torch.optim.Optimizer | None) -> Any:
    """The factor (0-d tensor) that is still on the gradients of `optimizer` (None: of any
    optimizer); None when they are unscaled."""
    states: dict[int, dict[str, Any]] = scaler._per_optimizer_states
    if optimizer is not None:
        if id(optimizer) in states and states[id(optimizer)]["stage"] is not OptState.READY:
            return None
    elif any(state["stage"] is not OptState.READY for state in states.values()):
        return None
    return scaler._scale


def loss_scale(scaler: GradScaler) -> torch.Tensor | None:
    """The factor (0-d tensor) on losses, without waiting for the device as `get_scale` does."""
    return scaler._scale


def skip_flag(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """Above 0 where an optimizer that handles `found_inf` itself (fused ones) will skip its update.

    GradScaler sets the attribute for the duration of `optimizer.step`.
    """
    return getattr(optimizer, "found_inf", None)


# ---------------------------------------------------------------- schedulers


def inner_schedulers(scheduler: Any) -> list[Any]:
    """The schedulers inside a SequentialLR or a ChainedScheduler."""
    return list(getattr(scheduler, "_schedulers", ()))


# ---------------------------------------------------------------- modules and tensors


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module is, or will be, compiled by torch.compile."""
    return (
        type(module).__name__ == "OptimizedModule"  # by name: importing dynamo takes seconds
        or getattr(module, "_compiled_call_impl", None) is not None
    )


def has_parameters(module: torch.nn.Module) -> bool:
    """Whether the module has direct parameters, not only in its submodules."""
    parameters = module._parameters
    return bool(parameters) and any(p is not None for p in parameters.values())


set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""The function that `torch.set_grad_enabled` calls, without the context manager around it."""

call_impl: Callable[[], Callable[..., Any]] = partial(getattr, torch.nn.Module, "_call_impl")
"""The function to which `Module.__call__` delegates. (`__call__` is a slot of the type: setting it
makes Python visit every subclass of Module and drop its method caches.)"""
set_call_impl: Callable[[Callable[..., Any]], None] = partial(
    setattr, torch.nn.Module, "_call_impl"
)


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor of which `tensor` is a view; None if it is no view."""
    return getattr(tensor, "_base", None)


version_of: Callable[[torch.Tensor], int] = attrgetter("_version")
"""The number of in-place operations on a tensor and its views so far, except for those on `.data`.
An attrgetter is fast enough to be called for each gradient of a step. Raises RuntimeError for a
tensor made in `torch.inference_mode()`."""


def version_of_value(tensor: torch.Tensor) -> int:
    """`version_of` an input or result; 0 for one made in `torch.inference_mode()`, whose
    operations are not counted."""
    return 0 if tensor.is_inference() else version_of(tensor)


def storage_of(tensor: torch.Tensor) -> object:
    """A weak reference to the memory of a tensor, equal for views of the same memory. The address
    is not reused while the reference is held."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def stored_values(sparse: torch.Tensor) -> torch.Tensor:
    """The values of a sparse COO tensor, coalesced or not."""
    return sparse._values()


def submodules(holder: object) -> dict[str, Any]:
    """The direct submodules of a module by name; empty for any other object."""
    return _stored(holder, "_modules")


def own_parameters(holder: object) -> dict[str, Any]:
    """The direct parameters of a module by name, None for a parameter that was registered as None;
    empty for any other object."""
    return _stored(holder, "_parameters")


def own_buffers(holder: object) -> dict[str, Any]:
    """The buffers of a module, like `own_parameters`."""
    return _stored(holder, "_buffers")


def _stored(holder: object, name: str) -> dict[str, Any]:
    """Read a dictionary of a module without running code of the object."""
    own = getattr(holder, "__dict__", None)
    found = own.get(name) if isinstance(own, dict) else None
    return found if isinstance(found, dict) else {}


def weight_norm_of(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """(v, g, dim) of a module with `torch.nn.utils.weight_norm` in its older form; None without."""
    held = own_parameters(module)
    g, v = held.get("weight_g"), held.get("weight_v")
    if g is None or v is None:
        return None
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    dim = next((hook.dim for hook in hooks if type(hook).__name__ == "WeightNorm"), 0)
    return v, g, dim


def weight_normed(v: torch.Tensor, g: torch.Tensor, dim: int) -> torch.Tensor:
    """g · v / ‖v‖, as `torch.nn.utils.weight_norm` computes it."""
    return torch._weight_norm(v, g, dim)


DATA_LOADER_WORKER = "torch.utils.data._utils.worker"
"""The module of the function that a worker process of a DataLoader runs."""


def norms_of(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """The 2-norm of each tensor, accumulated in `dtype`: one kernel for many tensors."""
    return torch._foreach_norm(list(tensors), 2, dtype)


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to its target."""
    torch._foreach_copy_(list(targets), list(sources))


def subtract_each(targets: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    """Subtract each of the `others` from its target, in place."""
    torch._foreach_sub_(list(targets), list(others))


# ---------------------------------------------------------------- the autograd graph

_MARK = "tui_trainer_scaled"
MAX_NODES = 16
"""Maximum number of nodes that are visited to follow a loss back through the graph."""


def mark_graph(result: torch.Tensor) -> None:
    """Mark the node that computed `result`; the mark is freed with the graph."""
    metadata = getattr(result.grad_fn, "metadata", None)
    if metadata is not None:
        metadata[_MARK] = True


def graph_is_marked(loss: torch.Tensor) -> bool:
    """Whether `loss` was computed from a marked tensor in a few steps (divided, summed, …)."""
    nodes: list[Any] = [loss.grad_fn]
    for visited in range(MAX_NODES):
        if visited >= len(nodes):
            return False
        node = nodes[visited]
        if node is None:
            continue
        if _MARK in getattr(node, "metadata", ()):
            return True
        nodes += [following for following, _ in getattr(node, "next_functions", ())]
    return False


def node_name(node: Any) -> str:
    """The operation of a node of the graph: `Log` for `LogBackward0`."""
    return _operation_name(node.name())


@cache
def _operation_name(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name.rpartition("::")[2])


def next_sequence_number() -> int:
    """The number that the next node of the graph gets on this thread, in order of creation."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def sequence_number(node: Any) -> int:
    """The number that a node of the graph got at its creation."""
    number: int = node._sequence_nr()
    return number


def result_of(node: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the first result of a node. Raises AttributeError, IndexError, TypeError
    or RuntimeError where they are not known."""
    first = node._input_metadata[0]
    return tuple(int(size) for size in first.shape), first.dtype


def saved_names(node: Any) -> list[str]:
    """The names of the values that a node has saved for backward."""
    return [name.removeprefix("_saved_") for name in dir(node) if name.startswith("_saved_")]


def has_saved(node: Any, name: str) -> bool:
    return hasattr(node, f"_saved_{name}")


def saved(node: Any, name: str) -> Any:
    """The value (a number, a tensor, …) that a node has saved under `name`. Raises AttributeError;
    runs the unpacking hook of a saved tensor."""
    return getattr(node, f"_saved_{name}")


def saved_dim(node: Any, name: str = "dim") -> int:
    """A saved dimension or index, which nodes store as an unsigned number."""
    return signed(saved(node, name))


def signed(value: int) -> int:
    """The signed 64-bit number that a node stores as the unsigned `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value


def saved_tensors(node: Any) -> dict[str, torch.Tensor]:
    """The tensors that a node has saved for backward, by name. Runs the unpacking hooks of saved
    tensors, so it must not be called where a script has installed any."""
    found = {name: getattr(node, f"_saved_{name}", None) for name in saved_names(node)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def without_torch_function() -> AbstractContextManager[Any]:
    """A context in which PyTorch's functions do not call `__torch_function__`."""
    return torch._C.DisableTorchFunction()


def forward_hooks_of(module: torch.nn.Module) -> int:
    """Number of hooks that the module calls around its forward."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors in the nested result of a function of `torch.func`."""
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


# ---------------------------------------------------------------- norms inside clip_grad_norm_

FULL_PRECISION = (torch.float32, torch.float64)


class NormCapture:
    """The 2-norms of single gradients that `clip_grad_norm_` computes on its way to the total.

    Reading all gradients a second time would cost as much as all the rest of the tracer.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = []
        """(tensors, their 2-norms, each 0-d)."""
        self._stacked: torch.Tensor | None = None
        """All norms as one vector, from which the total is computed."""
        self._original_clamp: Any = None
        self._our_clamp: Any = None
        self._coefficient: torch.Tensor | None = None
        """For sharded gradients: max_norm / (total + 1e-6), where the processes have added up
        their parts of the total."""

    def __enter__(self) -> NormCapture:
        self._original_foreach: Any = torch._foreach_norm
        self._original_norm: Any = torch.linalg.vector_norm

        def foreach_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            result = self._original_foreach(tensors, *args, **kwargs)
            if not kwargs and (not args or (len(args) == 1 and float(args[0]) == 2.0)):
                self._calls.append((tensors, result))
                if result and type(result[0]) not in PLAIN:
                    self._capture_coefficient()
            return result

        def vector_norm(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self._calls and self._stacked is None:
                self._stacked = x
            return self._original_norm(x, *args, **kwargs)

        self._our_foreach: Any = foreach_norm
        self._our_norm: Any = vector_norm
        vars(torch)["_foreach_norm"] = foreach_norm
        vars(torch.linalg)["vector_norm"] = vector_norm
        return self

    def _capture_coefficient(self) -> None:
        """Capture the coefficient of the clipping, whose gradients are or may be sharded."""
        if self._our_clamp is not None:
            return
        original_clamp: Any = torch.clamp

        def clamp(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self._coefficient is None and isinstance(x, torch.Tensor) and is_sharded(x):
                self._coefficient = local(x)
            return original_clamp(x, *args, **kwargs)

        self._original_clamp = original_clamp
        self._our_clamp = clamp
        vars(torch)["clamp"] = clamp

    def __exit__(self, *exc: object) -> None:
        if torch._foreach_norm is self._our_foreach:
            vars(torch)["_foreach_norm"] = self._original_foreach
        if torch.linalg.vector_norm is self._our_norm:
            vars(torch.linalg)["vector_norm"] = self._original_norm
        if self._our_clamp is not None and torch.clamp is self._our_clamp:
            vars(torch)["clamp"] = self._original_clamp
        # These functions refer back to this object: breaking the cycle frees it, and the gradients
        # it holds, without waiting for the garbage collector. Gradients of several steps alive at
        # once cost their memory, and 5 % of a step on a CPU, since no block of memory is reused
        # while it is in the caches.
        self._our_foreach = self._our_norm = self._our_clamp = None

    @property
    def count(self) -> int:
        """Number of gradients whose norm was captured."""
        return sum(len(tensors) for tensors, _ in self._calls)

    def norms_of(
        self, clipped: Any, parameters: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor] | None:
        """The norms of the gradients of `parameters` (flattened, in order); None unless exactly
        these were clipped, in this order, and all have a gradient, as in a model on one device."""
        if len(self._calls) != 1 or type(clipped) is not list:
            return None
        tensors, norms = self._calls[0]
        if not len(tensors) == len(clipped) == len(parameters):
            return None
        if norms[0].dtype not in FULL_PRECISION or not all(map(is_, clipped, parameters)):
            return None
        if is_sharded(norms[0]):
            return [local(norm) for norm in norms]
        vector = self._stacked
        if vector is not None and vector.dim() == 1 and vector.shape[0] == len(norms):
            return (vector,)
        return norms

    def whole_total(self, total: Any, limit: Any) -> Any:
        """`total`, for sharded gradients as the norm over all processes, which the clipping has
        computed. Absent where that is not visible, since computing it would be a collective."""
        if not (isinstance(total, torch.Tensor) and is_sharded(total)):
            return total
        if self._coefficient is None:
            return absent(Absent.SHARDED)
        return float(limit) / self._coefficient.detach() - 1e-6

    def by_gradient(self) -> dict[int, torch.Tensor]:
        """id(gradient) → its norm, where that has at least float32 precision; for a sharded
        gradient, the id and the norm of its shard."""
        return {
            id(local(tensor)): local(norm)
            for tensors, norms in self._calls
            for tensor, norm in zip(tensors, norms, strict=True)
            if norm.dtype in FULL_PRECISION
        }


def viewed_shape(node: Any) -> tuple[int, ...]:
    """The shape of the tensor below a view, from the node of the view."""
    return tuple(node._saved_self_sym_sizes)


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of a loss, as read from its graph."""

    classes: int
    of_softmax: bool
    """Whether its input is already the output of a softmax."""
    divided: bool
    """Whether the loss was divided by a number, as for gradient accumulation."""


_SCALING = ("DivBackward0", "MulBackward0", "ToCopyBackward0")
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0")


def cross_entropy_of(loss: torch.Tensor) -> CrossEntropy | None:
    """Describe `loss` if it is a mean cross-entropy over class indices, perhaps times a factor;
    None for any other loss. Reads the names of at most ten nodes of its graph, and no tensor."""
    try:
        return _cross_entropy_of(loss.grad_fn)
    except (AttributeError, IndexError, TypeError):
        return None


def _cross_entropy_of(node: Any) -> CrossEntropy | None:
    divided = False
    for _ in range(4):
        if node is None or node.name().startswith("NllLoss"):
            break
        if node.name() not in _SCALING:
            return None
        divided = divided or node.name() == "DivBackward0"
        node = node.next_functions[0][0]
    if node is None or not node.name().startswith("NllLoss") or node._saved_reduction != 1:
        return None
    logarithm = node.next_functions[0][0]
    if logarithm is None or not logarithm.name().startswith("LogSoftmax"):
        return None
    shape = logarithm._input_metadata[0].shape
    if not shape:
        return None
    before = logarithm.next_functions[0][0]
    for _ in range(3):
        if before is None or before.name() not in _VIEWS:
            break
        before = before.next_functions[0][0]
    of_softmax = before is not None and before.name() == "SoftmaxBackward0"
    return CrossEntropy(int(shape[1 if len(shape) > 1 else 0]), of_softmax, divided)
