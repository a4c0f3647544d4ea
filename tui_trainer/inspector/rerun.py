"""Re-runs the forward pass of the current step with the same batch and random numbers.

`StepCapture` keeps the arguments of the model's last call, only while the run is paused, steps or
has breakpoints, and for some steps after a request. The re-run happens on the training thread while
it is at a boundary. Afterwards the random generators, the buffers and other tensors of the modules,
their attributes, gradients and the mode of autocast are restored. No tensor of the model is written
for this: during the re-run the modules have copies of their buffers.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.loss_recording import LossRecorder
from tui_trainer.inspector.loss_replay import LossReplay, outputs_of
from tui_trainer.protocol.formatting import bytes_
from tui_trainer.protocol.inspection import NOT_CAPTURED
from tui_trainer.trace.module_calls import OnCall, OnReturn
from tui_trainer.trace.random_state import random_state, restore_random_state
from tui_trainer.trace.torch_private import (
    forward_hooks_of,
    is_compiled,
    is_sharded,
    own_buffers,
    own_parameters,
    tensors_of,
    tree_map,
    unwrapped,
    version_of_value,
)
from tui_trainer.trace.tracer import Tracer

STEPS_CAPTURED = 200
"""Calls of the model without a further request after which they are no longer captured."""
MAX_KEPT_BUFFERS = 4 << 20
"""Maximum number of bytes of buffers that are copied before a forward, so that a re-run begins with
them."""
MAX_COPIED = 1 << 30
"""Maximum number of bytes of buffers that are copied for a re-run."""
MAX_ENTRIES = 10_000
"""Largest list or dictionary in a module's attributes that is restored."""
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
Buffers = dict[tuple[int, str], torch.Tensor]
"""(identity of the module, name) → copy."""


@dataclass
class Autocast:
    """The state of autocast for one type of device."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Autocast:
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """A context with this state, without the cache of cast weights, which would be shared with
        an enclosing `autocast` of the script."""
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


@dataclass
class ModelCall:
    """The last call of a model for training."""

    step: int
    module: weakref.ref[torch.nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    """Versions of the tensors in `args` and `kwargs`."""
    random: dict[str, Any]
    """The states of the random generators before the call."""
    autocast: list[Autocast]
    training: bool
    buffers: Buffers | None
    """Copies made before the call; None if they are too large, or if no request was likely."""
    generators: list[tuple[torch.Generator, torch.Tensor]]
    """(generator, state before the call) of generators in attributes of the modules."""
    number: int
    """Number of the call among the model calls of its step, from 1."""
    returned: bool = False
    loss: LossReplay = field(default_factory=LossReplay)


class CallWatch(Protocol):
    """Observes the calls of models for training, and the start of backward. Raises nothing."""

    def forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None: ...

    def backward_began(self) -> None: ...


class StepCapture:
    """Keeps what a re-run of the current step needs. Used on the training thread."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = weakref.ref(tracer)
        self._left = 0
        self._calls_in_step = (0, 0)
        self.call: ModelCall | None = None
        self.live_loss: weakref.ref[torch.Tensor] | None = None
        """The tensor on which backward was called last."""
        self.live_step = 0
        tracer.observers.forwards = self
        self.checked: CallWatch | None = None
        """Observes the same calls, for checked re-runs."""
        self._recorder: LossRecorder | None = None
        """Set between the return of a model and backward, in steps for which a request is
        likely."""

    def request(self) -> None:
        """Capture the next steps, about which requests are expected."""
        self._left = STEPS_CAPTURED

    # ------------------------------------------------------------ observing

    def forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep the arguments and the state of the random generators, if a request may come."""
        self.call = None
        if self._recorder is not None:
            self._end_recording(None)
        tracer = self._tracer()
        if tracer is None:
            return
        if self.checked is not None:
            self.checked.forward_began(module, args, kwargs)
        gate = tracer.gate
        if not (self._left or gate.armed or gate.break_phases):
            return
        expected = self._left > 0 or gate.armed
        self._left = max(0, self._left - 1)
        with contextlib.suppress(Exception):  # for example, too little memory: no capture
            self.call = self._captured(tracer.step, module, args, kwargs, expected)

    def _captured(
        self,
        step: int,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        expected: bool,
    ) -> ModelCall:
        """Capture a call. `expected`: whether a request is likely, so that buffers and generators
        are captured too. Searching all modules for them takes some ms in large models, too much for
        each step of a run that only has breakpoints."""
        before, number = self._calls_in_step
        self._calls_in_step = (step, number + 1 if before == step else 1)
        given = tensors_of((args, kwargs))
        first = next(module.parameters(), None)
        devices = {each.device.type for each in (*given, first) if each is not None}
        return ModelCall(
            step=step,
            module=weakref.ref(module),
            args=args,
            kwargs=dict(kwargs),
            versions=[version_of_value(each) for each in given],
            random=random_state(),
            autocast=[Autocast.now(device) for device in sorted(devices | {"cpu"})],
            training=module.training,
            buffers=_kept_buffers(module) if expected else None,
            generators=[(g, g.get_state()) for g in _own_generators(module)] if expected else [],
            number=self._calls_in_step[1],
        )

    def forward_ended(self, result: Any) -> None:
        if self.call is not None:
            self.call.returned = True
            self._guarded(lambda loss: loss.forward_ended(result))
            self._guarded(lambda _: self._record(result))

    def _record(self, result: Any) -> None:
        tracer = self._tracer()
        model = self.call.module() if self.call is not None else None
        if tracer is None or model is None or not (self._left or tracer.gate.armed):
            return

        def listening() -> bool:
            return tracer.training_thread == threading.get_ident()

        self._recorder = LossRecorder.begin(outputs_of(result), unwrapped(model), listening)

    def _end_recording(self, loss: torch.Tensor | None) -> tuple[LossRecorder, int | None] | None:
        recorder, self._recorder = self._recorder, None
        return (recorder, recorder.end(loss)) if recorder is not None else None

    def detached(self) -> None:
        """Called when the tracer is detached."""
        self._end_recording(None)

    def loss_called(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: torch.Tensor,
    ) -> None:
        if self.call is not None:
            self._guarded(lambda loss: loss.called(function, args, kwargs, result))

    def backward_began(self, loss: torch.Tensor, value: torch.Tensor) -> None:
        ended = self._end_recording(loss) if self._recorder is not None else None
        self.live_loss = weakref.ref(loss)
        tracer = self._tracer()
        self.live_step = tracer.step if tracer is not None else 0
        if self.checked is not None:
            self.checked.backward_began()
        if self.call is not None:
            self._guarded(lambda recipe: recipe.backward_began(loss, value))
        if self.call is not None and ended is not None:
            self._guarded(lambda recipe: recipe.recorded(*ended, loss))

    def _guarded(self, work: Callable[[LossReplay], None]) -> None:
        if self.call is not None:
            try:
                with torch.no_grad():
                    work(self.call.loss)
            except Exception as fault:
                self.call.loss.missing = f"{type(fault).__name__}: {fault}"

    # ------------------------------------------------------------ running again

    def current(self) -> ModelCall:
        """The captured call of the current step. Raises InspectionError if there is none."""
        self.request()
        tracer, call = self._tracer(), self.call
        if tracer is None:
            raise InspectionError("the training has ended")
        if call is None or call.step != tracer.gate.current_step:
            raise InspectionError(NOT_CAPTURED, "from the next step on it is: step and ask again")
        return call

    @contextlib.contextmanager
    def rerun(
        self,
        called: OnCall | None = None,
        returned: OnReturn | None = None,
        gradients: bool = True,
        loss: bool = True,
    ) -> Iterator[Rerun]:
        """Re-run the forward pass and, if wanted, the loss of the current step.

        The graph may be used until the end of the context. `called` and `returned` observe the
        calls of all modules, including the root. Raises InspectionError where a re-run is not
        possible.
        """
        call = self.current()
        with call_context(call, gradients) as model:
            hooked = sum(map(forward_hooks_of, model.modules()))
            if called is not None:
                _before_calls(model, called)
            if returned is not None:
                _after_calls(model, returned)
            output = call_again(model, call)
            found = call.loss.recompute(output, model) if loss and call.returned else None
            notes = self.notes(call, model, hooked)
            if loss:
                notes += self._loss_notes(call, found)
            yield Rerun(call, model, output, found, notes)

    @property
    def _stepped(self) -> bool:
        """Whether the weights have been updated since the call."""
        tracer = self._tracer()
        return tracer is not None and not tracer.gate.within_step

    def _loss_notes(self, call: ModelCall, loss: torch.Tensor | None) -> list[str]:
        if loss is None:
            return [f"without the loss: {call.loss.why_missing(call.returned)}"]
        return call.loss.notes(loss.detach(), self._stepped)

    def notes(self, call: ModelCall, model: torch.nn.Module, hooked: int = 0) -> list[str]:
        """Notes on how a re-run differs from the step. `hooked`: number of the script's forward
        hooks, which run again."""
        notes = []
        if self._stepped:
            notes.append("with the weights as they are now, after the step")
        if call.number > 1:
            notes.append(f"of call {call.number} of a model in this step, without the earlier ones")
        if any(is_compiled(module) for module in model.modules()):
            notes.append("the model is compiled: the re-run was not")
        if hooked:
            notes.append(f"forward hooks of the script ran a second time: {hooked}")
        return notes


@dataclass
class Rerun:
    """A re-run of a forward pass; its graph lives as long as this object."""

    call: ModelCall
    model: torch.nn.Module
    output: Any
    loss: torch.Tensor | None
    """0-d, with its graph, without the scale of a GradScaler; None for the reason in `notes`."""
    notes: list[str]

    @property
    def same_loss(self) -> bool | None:
        """Whether the loss equals that of the step bit for bit; None if one of them is unknown."""
        expected = self.call.loss.value
        if self.loss is None or expected is None:
            return None
        return bool(torch.equal(self.loss.detach().to(expected.dtype), expected))


def _before_calls(model: torch.nn.Module, called: OnCall) -> None:
    """Register a hook on every module; `_temporary_buffers` removes it by restoring attributes."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called(module, args, kwargs)

    for module in model.modules():
        module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def _after_calls(model: torch.nn.Module, returned: OnReturn) -> None:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
        returned(module, result)

    for module in model.modules():
        module.register_forward_hook(hook)


def evaluate(model: torch.nn.Module, call: ModelCall, wide: bool) -> torch.Tensor | None:
    """The loss of one more forward pass within `call_context`, which begins with the same buffers
    and random numbers as the previous one and changes neither. `wide`: convert the batch to
    float64, as the parameters of the model have been."""
    with _temporary_buffers(model, None):
        restore_random_state(call.random)
        for generator, state in call.generators:
            generator.set_state(state)
        return call.loss.recompute(call_again(model, call, wide), model, wide)


def copy_parameters(
    model: torch.nn.Module, chosen: Sequence[torch.Tensor], wide: bool = False
) -> list[torch.nn.Parameter]:
    """Replace the `chosen` parameters of the model by copies (`wide`: in float64) and return them;
    `call_context` restores the originals."""
    copies = []
    for each in chosen:
        held = each.detach().clone()
        held = held.double() if wide and held.is_floating_point() else held
        copies.append(torch.nn.Parameter(held, each.requires_grad))
    replaced = dict(zip(map(id, chosen), copies, strict=True))
    for module in model.modules():
        named = own_parameters(module)
        for name, own in named.items():
            named[name] = replaced.get(id(own), own)
        for value in module.__dict__.values():
            if isinstance(value, list):  # such as the flat weights of an LSTM
                value[:] = [replaced.get(id(each), each) for each in value]
    return copies


def call_again(model: torch.nn.Module, call: ModelCall, wide: bool = False) -> Any:
    """The output of one more call with the same arguments, within `call_context`."""
    given = tensors_of((call.args, call.kwargs))
    if [version_of_value(each) for each in given] != call.versions:
        raise InspectionError("the batch of this step has been overwritten since")
    args, kwargs = tree_map(_without_graph, (call.args, call.kwargs))
    if wide:
        args, kwargs = tree_map(_wide, (args, kwargs))
    return model(*args, **kwargs)


def _wide(value: Any) -> Any:
    """The values of a batch in float64."""
    wide = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if wide else value


def _without_graph(value: Any) -> Any:
    """Detach an input that was computed from something else, whose graph may be freed already."""
    computed = isinstance(value, torch.Tensor) and value.grad_fn is not None
    return value.detach() if computed else value


# ---------------------------------------------------------------- restoring everything


def no_loss(call: ModelCall, loss: torch.Tensor | None) -> InspectionError:
    """The error for a loss that cannot be differentiated: `loss` is None, or has no graph."""
    why = "it has no graph" if loss is not None else call.loss.why_missing(call.returned)
    early = not call.returned or (loss is None and call.loss.value is None)
    hint = "continue to the end of backward: p, or step RUN --phase" if early else ""
    return InspectionError(f"the loss cannot be computed again: {why}", hint)


@contextlib.contextmanager
def call_context(call: ModelCall, gradients: bool = True) -> Iterator[torch.nn.Module]:
    """A context for re-runs. Yields the model without wrappers that communicate with other
    processes, in the state of the call. Raises InspectionError where it cannot be re-run."""
    wrapped = call.module()
    if wrapped is None:
        raise InspectionError("the model of this step no longer exists")
    model = unwrapped(wrapped)
    _refuse(model)
    random_now = random_state()
    with contextlib.ExitStack() as stack:
        stack.callback(restore_random_state, random_now)
        stack.enter_context(_temporary_buffers(model, call.buffers))
        for generator, state in call.generators:
            generator.set_state(state)
        if model.training != call.training:
            model.train(call.training)
        stack.enter_context(torch.set_grad_enabled(gradients))
        for autocast in call.autocast:
            stack.enter_context(autocast.context())
        if any(is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        restore_random_state(call.random)
        yield model


def _refuse(model: torch.nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InspectionError("it has TorchScript modules, whose state cannot be restored")
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    if sharded or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise InspectionError("its parameters are sharded: all processes would have to run again")
    if any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()):
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise InspectionError("it has SyncBatchNorm: all processes would have to run again")


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """(dictionary, name, tensor) of the tensors that a forward may write to: buffers and plain
    attributes."""
    for held in (own_buffers(module), module.__dict__):
        for name, value in held.items():
            if (
                isinstance(value, torch.Tensor)
                and not isinstance(value, torch.nn.Parameter)
                and not value.requires_grad
            ):
                yield held, name, value


def _own_generators(model: torch.nn.Module) -> list[torch.Generator]:
    held = [value for module in model.modules() for value in module.__dict__.values()]
    return [value for value in held if isinstance(value, torch.Generator)]


def _kept_buffers(module: torch.nn.Module) -> Buffers | None:
    found = {
        (id(each), name): value
        for each in module.modules()
        for _, name, value in _own_tensors(each)
    }
    if sum(value.nbytes for value in found.values()) > MAX_KEPT_BUFFERS:
        return None
    with torch.no_grad():
        return {key: value.clone() for key, value in found.items()}


@contextlib.contextmanager
def _temporary_buffers(model: torch.nn.Module, kept: Buffers | None) -> Iterator[None]:
    """Give the modules copies of their buffers within the context, and restore the modules after.

    Restores the attributes of each module, the entries of lists and dictionaries in them (but no
    deeper), the gradients of parameters and the states of generators. `kept`: copies to begin with.
    """
    modules = list(model.modules())
    size = sum(tensor.nbytes for module in modules for _, _, tensor in _own_tensors(module))
    if size > MAX_COPIED:
        limit = bytes_(MAX_COPIED, 0)
        raise InspectionError(f"its buffers hold {bytes_(size, 0)}, of at most {limit}")
    attributes = [(module.__dict__, dict(module.__dict__)) for module in modules]
    values = [value for _, held in attributes for value in held.values()]
    contents = [
        (value, copy.copy(value))
        for value in values
        if type(value) in CONTAINERS and len(value) <= MAX_ENTRIES
    ]
    generators = [(each, each.get_state()) for each in _own_generators(model)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    copies: dict[int, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for module in modules:
                for held, name, tensor in list(_own_tensors(module)):
                    if id(tensor) not in copies:
                        earlier = kept.get((id(module), name)) if kept is not None else None
                        copies[id(tensor)] = (tensor if earlier is None else earlier).clone()
                    held[name] = copies[id(tensor)]
        yield
    finally:
        for attribute, before in attributes:
            _restore_content(attribute, before)
        for container, content in contents:
            _restore_content(container, content)
        for generator, state in generators:
            generator.set_state(state)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient


def _restore_content(container: Any, content: Any) -> None:
    """Restore the content of a container, if it has changed."""
    if isinstance(container, dict):
        if list(container) == list(content):
            for key, value in content.items():
                if container[key] is not value:
                    container[key] = value
        else:
            container.clear()
            container.update(content)
    elif isinstance(container, set):
        container.clear()
        container.update(content)
    elif len(container) != len(content) or any(
        a is not b for a, b in zip(container, content, strict=True)
    ):
        container.clear()
        container.extend(content)
