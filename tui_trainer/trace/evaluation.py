"""Evaluations of a script: forward passes between its steps, without gradients or in `eval()` mode,
and the mean of the losses that are computed in them.

A call in `eval()` mode with gradients is an evaluation if the model is trained in `train()` mode
and no gradient is computed before it is called in that mode again.

A loss is the scalar result of one of torch's loss functions, which its loss modules call too. The
mean weights all losses equally; for sums (`reduction="sum"`), it is their sum divided by the number
of targets.

Losses of another place of the script, or of another value of a loop over names (`for split in
("train", "val")`), are another evaluation's if the losses before are complete: where the script
comes back to them, or computes both from one call of the model, it has several losses, of which
none is chosen.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from threading import get_ident
from types import FrameType
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from tui_trainer.trace.module_calls import Patches, copy_metadata
from tui_trainer.trace.script_frames import objects_of_script
from tui_trainer.trace.torch_private import is_dense, storage_of, version_of_value

functional = torch.nn.functional
LOSS_FUNCTIONS = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cross_entropy",
    "ctc_loss",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
)
CLASS_LOSSES = ("cross_entropy", "nll_loss")
"""Their targets are classes, of which some may be ignored."""
KEPT = 256
"""Losses on a device that are summed at once."""
LOSS_MODULES = ("torch.nn.functional", "torch.nn.modules.loss")

OnTrainingLoss = Callable[[Callable[..., Any], str, tuple[Any, ...], dict[str, Any], Any], object]
"""(torch's function, its name, args, kwargs, result)"""
OnResult = Callable[[int, "dict[str, torch.Tensor | float]"], None]
"""(completed steps, mean loss of each evaluation by name)"""
HELD_OUT = ("val", "dev", "eval", "held", "test")
"""Beginnings of the names of data that is not trained on: the first found is that of *the* loss."""
MAX_EVALUATIONS = 4
"""Evaluations in a row that are distinguished."""

_Key = tuple[tuple[Any, int], str]
"""(place, label) of a loss."""


class _Mean:
    """The losses of one evaluation."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0
        self._targets: int | torch.Tensor = 0
        self._is_sum = False
        self._on_device: list[torch.Tensor] = []
        self._device_sum: torch.Tensor | None = None

    def add(
        self, loss: torch.Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether the loss is of the same reduction as those before."""
        is_sum = kwargs.get("reduction") == "sum"
        if self._count and is_sum != self._is_sum:
            return False
        self._is_sum = is_sum
        if is_sum:
            self._targets = self._targets + _target_count(name, args, kwargs)
        self._count += 1
        if loss.is_cpu:
            self._sum += float(loss)
        else:
            self._on_device.append(loss.clone())
            if len(self._on_device) >= KEPT:
                self._add_up()
        return True

    def join(self, other: _Mean) -> None:
        """Add the losses of another evaluation, of the same place."""
        self._sum += other._sum
        self._count += other._count
        self._targets = self._targets + other._targets
        self._on_device += other._on_device
        if other._device_sum is not None:
            self._on_device.append(other._device_sum)

    def value(self) -> torch.Tensor | float | None:
        """The mean, on the device of the losses; None where there were no targets."""
        divisor = self._targets if self._is_sum else self._count
        if isinstance(divisor, int) and divisor == 0:
            return None
        self._add_up()
        if self._device_sum is None:
            return self._sum / divisor
        return (self._device_sum + self._sum) / divisor

    def _add_up(self) -> None:
        if self._on_device:
            total = torch.stack([loss.float() for loss in self._on_device]).sum()
            before = self._device_sum
            self._device_sum = total if before is None else before + total
            self._on_device = []


class Observer(Protocol):
    """The tracer."""

    training_thread: int


class EvaluationLosses:
    """The losses of the evaluation between two steps, if there is one."""

    def __init__(self, observer: Observer, patches: Patches) -> None:
        self._observer = observer
        self._patches = patches
        self.on_result: OnResult | None = None
        """Called on the training thread when training continues. None: nothing is observed."""
        self.on_ambiguous: Callable[[int], None] = _ignore
        """Called in place of it, with the number of completed steps, where several losses are
        computed, since it is unknown which of them is the loss of the script."""
        self.on_fault: Callable[[Exception], None] = _ignore_fault
        """Called with a fault of ours, after which the evaluation in progress has no loss."""
        self.label_of: Callable[[FrameType], str] = _no_label
        """The value of the loop over names that a frame or its callers execute; "" without one."""
        self.on_training_loss: OnTrainingLoss | None = None
        """Called with every scalar loss that is computed with gradients."""
        self.muted = False
        """Whether a framework reports its own results."""
        self.losses_computed = 0
        """Losses computed in the last evaluation."""
        self.losses_before = 0
        """Losses computed without gradients before any model was trained."""
        self._open = False
        self._step = 0
        self._last_trained: weakref.ref[torch.nn.Module] | None = None
        self._trained: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        """Models that were called with gradients in `train()` mode."""
        self._trained_in_eval_mode: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._with_gradients: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        """Models that the open evaluation has called with gradients."""
        self._any_with_gradients = False
        """Whether there are any: a weak set takes time to look into."""
        self._usual: _Key | None = None
        """The losses that were the only ones of the last evaluation that had just one."""
        self._reset()

    def _reset(self) -> None:
        self._means: dict[_Key, _Mean] = {}
        self._current: _Key | None = None
        self._calls = 0
        """Calls of models in the open evaluation."""
        self._calls_before = 0
        """Number of calls at the last loss."""
        self._count = 0
        self._mixed = False
        """Whether its losses cannot be distinguished by when they are computed."""
        self._clear_with_gradients()

    def _clear_with_gradients(self) -> None:
        if self._any_with_gradients:
            self._any_with_gradients = False
            self._with_gradients.clear()

    def install(self) -> None:
        """Listen to the loss functions."""
        for name in LOSS_FUNCTIONS:
            original = getattr(functional, name, None)
            if original is not None:
                self._patches.replace(functional, name, self._listening(original, name))

    def includes(self, module: torch.nn.Module) -> bool:
        """Whether a call of `module` with gradients, not within an iteration, is an evaluation."""
        return (
            not module.training
            and module in self._trained
            and module not in self._trained_in_eval_mode
        )

    def trains(self, module: torch.nn.Module) -> None:
        """`module` is called with gradients, for training."""
        if self._open or self._any_with_gradients:
            self.end()
        if module.training and (self._last_trained is None or self._last_trained() is not module):
            self._trained.add(module)
            self._last_trained = weakref.ref(module)

    def gradients_computed(self) -> list[torch.nn.Module]:
        """Gradients were computed: the calls before them were for training. Returns the models that
        were called so, in `eval()` mode."""
        if not (self._any_with_gradients and self._with_gradients):
            return []
        called = list(self._with_gradients)
        self._trained_in_eval_mode |= self._with_gradients
        self._open = False
        self._reset()
        return called

    def call_began(self, module: torch.nn.Module, completed: int) -> None:
        """A model is called for an evaluation, and not within an iteration."""
        if torch.is_grad_enabled():
            self._with_gradients.add(module)
            self._any_with_gradients = True
        self._calls += 1
        if not self._open and self.on_result is not None and not self.muted:
            self._open, self._step = True, completed

    def end(self) -> None:
        """Training continues, or has ended."""
        if not self._open:
            self._clear_with_gradients()
            return
        self._open = False
        self.losses_computed = self._count
        means, mixed, on_result = self._means, self._mixed, self.on_result
        self._reset()
        if not means or self.muted or on_result is None:
            return
        if len(means) > MAX_EVALUATIONS and len({place for place, _ in means}) == 1:
            (first, joined), *others = means.items()  # one evaluation of many named parts
            for _, other in others:
                joined.join(other)
            means, mixed = {first: joined}, False
        if mixed or len(means) > MAX_EVALUATIONS:
            self.on_ambiguous(self._step)
            return
        names = self._names(list(means))
        found = {
            names[key]: value for key, mean in means.items() if (value := mean.value()) is not None
        }
        if found:
            on_result(self._step, found)

    def _names(self, keys: list[_Key]) -> dict[_Key, str]:
        """`loss`, and for further evaluations the name of their data, or of their function."""
        if len(keys) == 1:
            self._usual = keys[0]
        usual = self._usual if self._usual in keys else None
        named = (key for name in HELD_OUT for key in keys if _label(key).lower().startswith(name))
        main = usual or next(named, keys[0])
        names = {main: "loss"}
        for key in keys:
            if key != main:
                name = f"{_label(key)}/loss" if _label(key) else "loss 2"
                number = 3
                while name in names.values():
                    name, number = f"loss {number}", number + 1
                names[key] = name
        return names

    def _listening(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        observer = self._observer

        def loss(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if torch.compiler.is_compiling():
                return result
            listener = self.on_training_loss
            if listener is not None and not self._open and torch.is_grad_enabled():
                if get_ident() == observer.training_thread:
                    listener(original, name, args, kwargs, result)
                return result
            if not self._open:
                self.losses_before += self._last_trained is None
                return result
            if torch.is_grad_enabled() and not (self._any_with_gradients and self._with_gradients):
                return result
            if type(result) is torch.Tensor and get_ident() == observer.training_thread:
                self._observe_loss(result.detach(), name, args, kwargs)
            return result

        # TorchScript compiles the source of a function.
        loss.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
        loss.observed_function = original  # type: ignore[attr-defined]
        return copy_metadata(loss, original)  # type: ignore[no-any-return]

    def _observe_loss(
        self, loss: torch.Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Never raises: this is called by the script's own code."""
        try:
            if loss.dim() != 0 or loss.is_complex():
                return
            place, frame = _place_of(sys._getframe(2))
            key = (place, self.label_of(frame) if frame is not None else "")
            if key != self._current:
                # Both of one call of the model, or once more what was complete.
                self._mixed |= self._count > 0 and self._calls == self._calls_before
                self._mixed |= key in self._means
            if self._means.setdefault(key, _Mean()).add(loss, name, args, kwargs):
                self._count += 1
            self._current, self._calls_before = key, self._calls
        except Exception as fault:
            self._open = False
            self._reset()
            self.on_fault(fault)


USUAL_DISTANCE = 5
"""Steps between two evaluations from which calls without gradients are taken for one: a GAN calls
its generator so in every iteration."""


SAMPLING_CALLS = 4
"""Calls with one batch that sample from dropout on purpose; fewer compute the loss, and then the
accuracy."""


class EvaluationModes:
    """Calls without gradients, between two steps, of models in `train()` mode that have layers for
    which that matters."""

    def __init__(self) -> None:
        self._calls = 0
        self._last = -USUAL_DISTANCE
        self._data: tuple[object, ...] | None = None
        """What the first of these calls was given."""
        self._repeated = False
        """Whether the others were given the same."""

    def evaluated(self, args: tuple[Any, ...]) -> None:
        """A model was called in this way."""
        self._calls += 1
        tensor = args[0] if args else None
        data = None
        if isinstance(tensor, torch.Tensor) and is_dense(tensor):
            # A weak reference: its address is not used again while it is held.
            memory, version = storage_of(tensor), version_of_value(tensor)
            data = (memory, tensor.storage_offset(), tensor.shape, version)
        if self._calls == 1:
            self._data = data
        else:
            same = data is not None and data == self._data
            self._repeated = same and (self._calls == 2 or self._repeated)

    def in_train_mode(self, step: int, losses: int) -> bool:
        """At the end of a step: whether there was an evaluation before it, of several calls or with
        `losses`."""
        calls, self._calls = self._calls, 0
        repeated, self._repeated, self._data = self._repeated, False, None
        if not calls or (repeated and calls >= SAMPLING_CALLS):
            return False
        last, self._last = self._last, step
        return step - last > USUAL_DISTANCE and (calls > 1 or losses > 0)


FEWEST_CALLS = 2
"""Calls without gradients that precede the training of a script which collects its batches."""


class Rollouts:
    """Calls without gradients in which a policy acts in an environment: they are part of `data`.

    An evaluation looks the same. A script is assumed to collect what it trains on where it makes
    such calls before it trains for the first time, with inputs of one shape, computes no loss in
    them, and has no DataLoader to draw batches from.
    """

    def __init__(self) -> None:
        self.collecting = False
        """Whether calls without gradients between two steps are rollouts."""
        self._decided = False
        self._calls = 0
        self._shape: torch.Size | None = None

    def called(self, args: tuple[object, ...]) -> None:
        """A model is called without gradients."""
        if self._decided:
            return
        inputs = args[0] if args else None
        shape = inputs.shape if isinstance(inputs, torch.Tensor) else None
        if shape is None or (self._calls and shape != self._shape):
            self._decided = True  # generated tokens come one by one
        self._shape = shape
        self._calls += 1

    def training_begins(self, losses: int) -> None:
        """A model is called for training. `losses`: those computed in the calls before it."""
        if not self._decided:
            self._decided = True
            if self._calls >= FEWEST_CALLS and not losses:
                self.collecting = not objects_of_script(DataLoader)


def _ignore(step: int) -> None:
    pass


def _ignore_fault(fault: Exception) -> None:
    pass


def _no_label(frame: FrameType) -> str:
    return ""


def _label(key: _Key) -> str:
    """The name of its data, or of the function that computes the loss."""
    (code, _), label = key
    function = code.co_name if code is not None else ""
    return label or ("" if function.startswith("<") or function == "forward" else function)


def _place_of(frame: FrameType | None) -> tuple[tuple[Any, int], FrameType | None]:
    """The line of the script, or of a library, that calls the loss function, and its frame."""
    while frame is not None and frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in LOSS_MODULES and module != "torch.nn.modules.module":
            break
        frame = frame.f_back
    return ((frame.f_code, frame.f_lineno) if frame is not None else (None, 0)), frame


def _target_count(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | torch.Tensor:
    """The number of targets that a summed loss sums over; a 0-d tensor on a device, which is not
    waited for."""
    given = args[0] if args else kwargs.get("input")
    target = args[1] if len(args) > 1 else kwargs.get("target")
    if name in CLASS_LOSSES and isinstance(target, torch.Tensor) and not target.is_floating_point():
        ignored = args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
        count = (target != ignored).sum()
        return int(count) if target.is_cpu else count
    if name in CLASS_LOSSES and isinstance(given, torch.Tensor):
        return given.numel() // max(1, given.shape[1] if given.dim() > 1 else given.shape[0])
    return given.numel() if isinstance(given, torch.Tensor) else 1
