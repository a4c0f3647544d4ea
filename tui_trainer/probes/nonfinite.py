"""Reports nan and inf in loss, gradients and weights, and the first module whose output is not
finite although its inputs are.

The operation that produced them is found by `trace/nonfinite_origin.py`, and at a pause by
`inspector/checked_rerun.py`.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tui_trainer.history.records import Floats, NonFiniteRecord, Producer
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import NonFiniteQuantity
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.trace.module_calls import SubmoduleCalls, tensors_in
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, Values
from tui_trainer.trace.script_frames import place_of_call
from tui_trainer.trace.torch_private import PLAIN, DropoutLayer, is_dense, version_of_value


class NonFiniteProbe(Probe):
    """No table: an event when a quantity turns non-finite, and another only after it was finite.

    A quantity is checked whenever it is measured: the loss at every step, the others less often, so
    an event also has the step at which the quantity was last seen to be finite. The check adds no
    measurement: norms are computed so that they are finite exactly where every element is.
    """

    name = "nonfinite"
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._present: set[NonFiniteQuantity] = set()
        self._finite_at: dict[NonFiniteQuantity, int] = {}

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Adds to `facts.nonfinite`."""
        if math.isfinite(facts.loss):
            self._present.discard("loss")
            self._finite_at["loss"] = facts.step
        elif why_absent(facts.loss) is None:
            self._check("loss", np.array([facts.loss]), facts)
        self._check("gradient", facts.gradient_norms, facts, facts.absent_gradients)
        self._check("weight", facts.weight_norms, facts)
        return ()

    def _check(
        self,
        quantity: NonFiniteQuantity,
        found: NDArray[np.float64] | None,
        facts: StepFacts,
        absent: NDArray[np.uint8] | None = None,
    ) -> None:
        if found is None or (absent is not None and absent.all()):
            return
        if math.isfinite(np.add.reduce(found)):  # a finite sum has finite terms
            self._present.discard(quantity)
            self._finite_at[quantity] = facts.step
            return
        finite = np.isfinite(found)
        if absent is not None:
            finite |= absent != 0
        if finite.all():
            self._present.discard(quantity)
            self._finite_at[quantity] = facts.step
        elif quantity not in self._present:
            self._present.add(quantity)
            first = int(np.argmin(finite))
            parameter = "" if quantity == "loss" else self.tracked.names[first]
            value = nonfinite(float(found[first]))
            finite_at = self._finite_at.get(quantity)
            facts.nonfinite.append(NonFiniteRecord(quantity, parameter, value, finite_at))


FIRST_STEPS = 3
ARMED_STEPS = 500
"""Number of steps for which a value that is not finite arms the probe."""
ARMED_BY_GROWTH = 100
"""Number of steps for which a growing loss or gradient norm arms the probe. One that keeps growing
arms it again; otherwise it was a single spike."""
GROWTH = 10.0
"""A loss or gradient norm of this many times its usual value arms the probe."""
RECENT = 16
"""Number of last values from which the usual one is computed."""
MAX_SUMS = 4096
PROPAGATING = (
    *(nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
"""Modules whose output is non-finite wherever their input is."""
READ_BY_OTHERS = (*PROPAGATING, nn.Embedding)
"""Layers whose output is hardly ever the end of a model's computation."""
MAX_HELD_BYTES = 1 << 26
"""Maximum bytes of tensors that are kept until the end of a forward instead of being summed."""
PASSING = (
    *(nn.Identity, nn.Flatten, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh),
    *(DropoutLayer, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)
"""Modules whose output is finite where their input is."""


class _Kind(NamedTuple):
    """Properties of the modules of one class."""

    passing: bool
    propagating: bool
    read_by_others: bool


class _Kinds(dict[type[nn.Module], _Kind]):
    def __missing__(self, cls: type[nn.Module]) -> _Kind:
        kind = self[cls] = _Kind(
            issubclass(cls, PASSING), issubclass(cls, PROPAGATING), issubclass(cls, READ_BY_OTHERS)
        )
        return kind


@dataclass(slots=True)
class _Sum:
    """One tensor that went into or came out of a module."""

    module: weakref.ref[torch.nn.Module] | None
    """None: the arguments of the model itself."""
    entering: bool
    tensor: weakref.ref[torch.Tensor]
    held: torch.Tensor | None = None
    """The tensor itself, which is summed only if a later one is not finite."""


class OutputSums(Probe):
    """No table: sets `StepFacts.producer` at steps with a value that is not finite.

    While armed, the probe sums every tensor that a module returns, and every argument of a module
    that no module returned: a sum is finite where all elements are, and costs less than `isfinite`.
    The probe is armed in the first steps, after anything was not finite, while the loss or the
    gradient norm is ten times its usual value, and at all steps with
    `ProbeOptions.watch_nonfinite`. Tensors that are non-finite in steps with a finite loss (masks)
    do not count.

    On an accelerator the sums stay on the device until the step is over. On the CPU the inputs and
    outputs of linear layers, convolutions, normalisations and embeddings are kept instead, and
    summed at the end of the forward, and only if a tensor computed from them is not finite.
    Autograd keeps most of these tensors as well; at most MAX_HELD_BYTES are kept.
    """

    name = "outputs"
    importance = 100
    every_forward = True
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._always = options.watch_nonfinite
        self._armed_until = math.inf if self._always else FIRST_STEPS
        self._steps = 0
        self._calls = SubmoduleCalls(self._called, self._returned)
        self._own = {id(parameter) for parameter in tracked.parameters}
        self._paths: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary(
            {module: path for path, module in tracked.modules.items()}
        )
        # Weak references: a probe does not keep a model alive.
        self._modules = weakref.WeakValueDictionary(tracked.modules)
        self._kinds = _Kinds()
        self._sums: list[_Sum] = []
        self._values: list[torch.Tensor | None] = []
        """Sum of each entry of `_sums`; None where the tensor is held instead."""
        self._held_bytes = 0
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        """id → (weak reference, version) of the tensors of this forward that need no other sum."""
        self._on_host = all(parameter.is_cpu for parameter in tracked.parameters)
        self._found: Producer | None = None
        self._weights = False
        """Whether the module that was found has non-finite weights."""
        self._under_way: deque[tuple[list[_Sum], Producer | None]] = deque()
        self._usual: dict[tuple[str, bool], int] = {}
        """(name of an origin, whether it is an input) → number of steps with finite loss and
        gradients in which it was found."""
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._norms: deque[float] = deque(maxlen=RECENT)

    @property
    def armed(self) -> bool:
        return self._steps < self._armed_until

    @property
    def resting(self) -> bool:
        return not self.armed

    # ------------------------------------------------------------ in the forward

    def model_called(
        self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Sum the inputs of the model."""
        if self.armed and not self._found and any(id(p) in self._own for p in root.parameters()):
            self._known.clear()
            with torch.no_grad():
                for tensor in tensors_in((*args, *kwargs.values())):
                    self._add(None, True, tensor)

    def before_forward(self, root: torch.nn.Module) -> None:
        if self.armed and not self._found and any(id(p) in self._own for p in root.parameters()):
            self._calls.begin(root, under_way=True)

    def after_forward(self) -> None:
        """On the CPU, evaluate the sums now, while the graph is alive."""
        self._calls.end()
        self._known.clear()
        fault, self._calls.fault = self._calls.fault, None
        if fault is not None:
            raise fault
        if self._on_host and self._values:
            found, sums = self._values, self._sums
            self._values, self._sums, self._held_bytes = [], [], 0
            if sums[-1].held is not None:
                found[-1] = _sum(sums[-1].held)
            if not math.isfinite(float(torch.stack([v for v in found if v is not None]).sum())):
                values = [
                    _sum(entry.held) if value is None and entry.held is not None else value
                    for value, entry in zip(found, sums, strict=True)
                ]
                numbers = [math.nan if value is None else value.item() for value in values]
                self._found = self._first(np.array(numbers, np.float64), sums)

    def _called(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if len(args) == 1 and not kwargs and type(args[0]) in PLAIN:
            given: Sequence[torch.Tensor] = args
        else:
            given = tensors_in((*args, *kwargs.values()))
        for tensor in given:
            if not self._is_known(tensor):
                self._add(module, True, tensor, self._kinds[type(module)].propagating)

    def _returned(self, module: torch.nn.Module, result: Any) -> None:
        kind = self._kinds[type(module)]
        single = type(result) in PLAIN
        if single and kind.passing:
            self._known[id(result)] = weakref.ref(result), version_of_value(result)
            return
        for tensor in (result,) if single else tensors_in(result):
            if not self._is_known(tensor):
                self._add(module, False, tensor, kind.read_by_others)

    def _is_known(self, tensor: torch.Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor and known[1] == version_of_value(tensor)

    def _add(
        self,
        module: torch.nn.Module | None,
        entering: bool,
        tensor: torch.Tensor,
        passed_on: bool = False,
    ) -> None:
        """Sum or hold a tensor. `passed_on`: where it is non-finite, a later tensor is as well."""
        if (
            not is_dense(tensor)
            or not tensor.is_floating_point()
            or not tensor.numel()
            or len(self._sums) >= MAX_SUMS
        ):
            return
        reference = weakref.ref(tensor)
        self._known[id(tensor)] = reference, version_of_value(tensor)
        owner = weakref.ref(module) if module is not None else None
        held = None
        # Without gradients, as in a checkpointed block, autograd keeps nothing and neither do we.
        if passed_on and self._on_host and torch.is_grad_enabled():
            size = tensor.nbytes
            if self._held_bytes + size <= MAX_HELD_BYTES:
                self._held_bytes += size
                held = tensor
        self._values.append(_sum(tensor) if held is None else None)
        self._sums.append(_Sum(owner, entering, reference, held))

    # ------------------------------------------------------------ the end of the step

    def after_update(self) -> Readings:
        """The sums, on an accelerator."""
        self._steps += 1
        if not self._sums:
            found, self._found = self._found, None
            self._under_way.append(([], found))
            return ()
        values = [value for value in self._values if value is not None]
        sums = [entry for entry in self._sums if entry.held is None]
        self._values, self._sums = [], []
        found, self._found = self._found, None
        self._under_way.append((sums, found))
        return values

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.producer`, and arms the probe."""
        sums, found = self._under_way.popleft() if self._under_way else ([], None)
        finite = math.isfinite(facts.loss) and math.isfinite(facts.total_norm)
        wrong = bool(facts.nonfinite) or (
            not finite and (_not_finite(facts.loss) or _not_finite(facts.total_norm))
        )
        if values.size and not np.isfinite(values).all() and len(values) == len(sums):
            found = self._first(values, sums)
        if found is not None:
            key = found.name, found.source == "input"
            if not wrong:
                self._usual[key] = self._usual.get(key, 0) + 1
            elif key not in self._usual:
                facts.producer = found
        grows = self._grows(facts)
        if wrong or grows:
            steps = ARMED_STEPS if wrong else ARMED_BY_GROWTH
            self._armed_until = max(self._armed_until, self._steps + steps)
        return ()

    def _grows(self, facts: StepFacts) -> bool:
        grows = False
        for value, recent in ((facts.loss, self._losses), (facts.total_norm, self._norms)):
            if math.isfinite(value):
                value = abs(value)
                if len(recent) == RECENT and value > GROWTH * min(recent):
                    grows = grows or value > GROWTH * sorted(recent)[RECENT // 2] > 0
                recent.append(value)
        return grows

    def _first(self, values: Values, sums: Sequence[_Sum]) -> Producer | None:
        """The first origin of a sum that is not finite, other than those in `_usual`; None without
        one."""
        for index in np.flatnonzero(~np.isfinite(values)).tolist():
            entry = sums[index]
            tensor = entry.tensor()
            if tensor is not None and tensor.is_cpu and bool(torch.isfinite(tensor).all()):
                continue  # the sum overflowed
            producer = self._producer(entry)
            if (producer.name, producer.source == "input") not in self._usual:
                return producer
        return None

    def _producer(self, entry: _Sum) -> Producer:
        module = entry.module() if entry.module is not None else None
        if module is None:
            return Producer("input", "")
        path = self._paths.get(module, "")
        modules = self._modules
        if entry.entering:  # the module around two others computed it between their calls
            parent = path.rpartition(".")[0]
            around = modules.get(parent)
            kind = type(around).__name__ if around is not None else ""
            return Producer("module", parent, kind, "", "")
        if self._on_host:
            for name, parameter in module.named_parameters(recurse=False):
                if not bool(torch.isfinite(parameter.detach()).all()):
                    return Producer("weight", f"{path}.{name}".lstrip("."), type(module).__name__)
        return Producer("module", path, type(module).__name__, "", place_of_call(path, modules))


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().sum(dtype=torch.float32)


def _not_finite(value: float) -> bool:
    """Whether a value is nan or infinite, and not merely absent."""
    return not math.isfinite(value) and why_absent(value) is None
