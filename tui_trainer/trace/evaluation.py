"""Follows evaluations of a script (forward passes between its steps, without gradients or in
`eval()` mode) and averages the losses that are computed in them.

A call in `eval()` mode with gradients is an evaluation if the model is trained in `train()` mode
and no gradient is computed before it is called in that mode again.

A loss is the scalar result of one of PyTorch's loss functions, which its loss modules call too. The
mean weights all losses equally; for sums (`reduction="sum"`), it is their sum divided by the number
of targets.

Losses computed at another line, or for another value of a loop over names (`for split in ("train",
"val")`), belong to another evaluation if the earlier losses are complete. A script that returns to
the earlier ones, or computes both from one call of the model, has several losses, and none of them
is chosen.
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
"""Loss functions whose targets are class indices, some of which may be ignored."""
MAX_UNSUMMED = 256
"""Number of losses on a device that are collected before they are summed."""
LOSS_MODULES = ("torch.nn.functional", "torch.nn.modules.loss")

OnTrainingLoss = Callable[[Callable[..., Any], str, tuple[Any, ...], dict[str, Any], Any], object]
"""(PyTorch's function, its name, args, kwargs, result)"""
OnResult = Callable[[int, "dict[str, torch.Tensor | float]"], None]
"""(completed steps, mean loss of each evaluation by name)"""
HELD_OUT = ("val", "dev", "eval", "held", "test")
"""Prefixes of the names of held-out data: the first that is found has the loss called `loss`."""
MAX_EVALUATIONS = 4
"""Maximum number of evaluations in a row that are distinguished."""

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
        """Add a loss; return False where its reduction differs from that of the earlier losses."""
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
            if len(self._on_device) >= MAX_UNSUMMED:
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
    """The tracer, as `EvaluationLosses` reads it."""

    training_thread: int


class EvaluationLosses:
    """Collects the losses of the evaluation between two steps."""

    def __init__(self, observer: Observer, patches: Patches) -> None:
        self._observer = observer
        self._patches = patches
        self.on_result: OnResult | None = None
        """Called on the training thread when training continues. None: nothing is observed."""
        self.on_ambiguous: Callable[[int], None] = _ignore
        """Called instead of `on_result`, with the number of completed steps, where several losses
        are computed and it is unknown which of them is the loss of the script."""
        self.on_fault: Callable[[Exception], None] = _ignore_fault
        """Called with an exception of our own, after which the open evaluation has no loss."""
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
        """False where `_with_gradients` is known to be empty: testing a weak set is slow."""
        self._usual: _Key | None = None
        """Key of the losses in the last evaluation that had losses of one key only."""
        self._reset()

    def _reset(self) -> None:
        self._means: dict[_Key, _Mean] = {}
        self._current: _Key | None = None
        self._calls = 0
        """Calls of models in the open evaluation."""
        self._calls_before = 0
        """`_calls` at the last loss."""
        self._count = 0
        self._mixed = False
        """Whether the order of the losses does not tell which evaluation each belongs to."""
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
        """Whether a call of `module` with gradients, outside an iteration, is an evaluation."""
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
        """Gradients were computed, so the calls before them were for training. Return the models
        that were called in `eval()` mode."""
        if not (self._any_with_gradients and self._with_gradients):
            return []
        called = list(self._with_gradients)
        self._trained_in_eval_mode |= self._with_gradients
        self._open = False
        self._reset()
        return called

    def call_began(self, module: torch.nn.Module, completed: int) -> None:
        """A model is called for an evaluation, outside an iteration."""
        if torch.is_grad_enabled():
            self._with_gradients.add(module)
            self._any_with_gradients = True
        self._calls += 1
        if not self._open and self.on_result is not None and not self.muted:
            self._open, self._step = True, completed

    def end(self) -> None:
        """Training continues or has ended: close the open evaluation and report its losses."""
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
            (first, joined), *others = means.items()  # one evaluation with many named parts
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
        """Name one evaluation `loss`, and the others by their data or their function."""
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
                # Both losses come from one call of the model, or the script returns to the first.
                self._mixed |= self._count > 0 and self._calls == self._calls_before
                self._mixed |= key in self._means
            if self._means.setdefault(key, _Mean()).add(loss, name, args, kwargs):
                self._count += 1
            self._current, self._calls_before = key, self._calls
        except Exception as fault:
            self._open = False
            self._reset()
            self.on_fault(fault)


MIN_DISTANCE = 5
"""Calls without gradients are an evaluation only where more steps than this lie between them: a GAN
calls its generator without gradients in every iteration."""
SAMPLING_CALLS = 4
"""Minimum number of calls with the same batch that are taken for sampling from dropout on purpose;
fewer compute the loss and then the accuracy."""


class EvaluationModes:
    """Notices evaluations in `train()` mode: calls without gradients, between two steps, of models
    with layers for which the mode matters."""

    def __init__(self) -> None:
        self._calls = 0
        self._last = -MIN_DISTANCE
        self._data: tuple[object, ...] | None = None
        """(storage, offset, shape, version) of the input of the first call."""
        self._repeated = False
        """Whether the later calls had the same input."""

    def evaluated(self, args: tuple[Any, ...]) -> None:
        """A model in `train()` mode is called without gradients."""
        self._calls += 1
        tensor = args[0] if args else None
        data = None
        if isinstance(tensor, torch.Tensor) and is_dense(tensor):
            # `memory` is a weak reference: its address is not reused while it is held.
            memory, version = storage_of(tensor), version_of_value(tensor)
            data = (memory, tensor.storage_offset(), tensor.shape, version)
        if self._calls == 1:
            self._data = data
        else:
            same = data is not None and data == self._data
            self._repeated = same and (self._calls == 2 or self._repeated)

    def in_train_mode(self, step: int, losses: int) -> bool:
        """Whether an evaluation in `train()` mode, of several calls or with a loss, came before
        `step`. `losses`: number of losses computed in it. Called at the end of the step."""
        calls, self._calls = self._calls, 0
        repeated, self._repeated, self._data = self._repeated, False, None
        if not calls or (repeated and calls >= SAMPLING_CALLS):
            return False
        last, self._last = self._last, step
        return step - last > MIN_DISTANCE and (calls > 1 or losses > 0)


MIN_ROLLOUT_CALLS = 2
"""Minimum number of calls without gradients before the training that may be rollouts."""


class Rollouts:
    """Recognises rollouts: calls without gradients in which a policy acts in an environment, and
    which are part of `data`.

    An evaluation looks the same. A script is assumed to collect its batches by rollouts where it
    calls a model without gradients before it trains for the first time, with inputs of one shape,
    computes no loss in these calls, and has no DataLoader.
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
            self._decided = True  # inputs of growing length generate tokens
        self._shape = shape
        self._calls += 1

    def training_begins(self, losses: int) -> None:
        """A model is called for training. `losses`: number of losses computed in earlier calls."""
        if not self._decided:
            self._decided = True
            if self._calls >= MIN_ROLLOUT_CALLS and not losses:
                self.collecting = not objects_of_script(DataLoader)


def _ignore(step: int) -> None:
    pass


def _ignore_fault(fault: Exception) -> None:
    pass


def _no_label(frame: FrameType) -> str:
    return ""


def _label(key: _Key) -> str:
    """The name of the evaluation's data, or of the function that computes its loss."""
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
    """The number of targets that a summed loss sums over; on a device a 0-d tensor, which is not
    read."""
    given = args[0] if args else kwargs.get("input")
    target = args[1] if len(args) > 1 else kwargs.get("target")
    if name in CLASS_LOSSES and isinstance(target, torch.Tensor) and not target.is_floating_point():
        ignored = args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
        count = (target != ignored).sum()
        return int(count) if target.is_cpu else count
    if name in CLASS_LOSSES and isinstance(given, torch.Tensor):
        return given.numel() // max(1, given.shape[1] if given.dim() > 1 else given.shape[0])
    return given.numel() if isinstance(given, torch.Tensor) else 1
