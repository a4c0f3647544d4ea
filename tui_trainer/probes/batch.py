"""Measures statistics of the inputs of the model and of the targets of the loss functions."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from tui_trainer.history.records import (
    BatchRecord,
    BatchTensor,
    Floats,
    LabelCounts,
    NumberKind,
    TensorRole,
)
from tui_trainer.probes.replica import checksum
from tui_trainer.trace.evaluation import CLASS_LOSSES
from tui_trainer.trace.module_calls import SubmoduleCalls, tensors_in
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, Values
from tui_trainer.trace.script_frames import objects_of_script
from tui_trainer.trace.torch_private import is_dense

MAX_TARGETS = 4
MAX_CLASSES = 8192
"""Maximum number of classes whose labels are counted."""
SAMPLE = 8192
"""Number of elements, at equal distances, that are copied of a larger tensor."""
SAMPLED_ROWS = 128
ALL_FIRST_LAYERS = 6
"""Number of first measurements that all record the input of the first layer: observing the calls of
modules costs more than all the rest of this probe."""
FIRST_LAYER_EVERY = 10
"""Cadence, in measurements, at which later ones record the input of the first layer."""
ELEMENTWISE = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
"""Losses that broadcast an input and a target of different shapes."""
BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
FIRST_LAYERS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
CONVOLUTIONS = tuple(
    getattr(nn, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)
)


@dataclass(slots=True)
class SeenTensor:
    role: TensorRole
    name: str
    shape: tuple[int, ...]
    kind: NumberKind
    classes: int
    ignored: int | None
    copied: tuple[int, int]
    """Rows and elements per row of the copy."""
    whole: bool
    """Whether the copy is the whole tensor; otherwise the readings of `_of_whole` precede it."""
    after: str = ""
    """As `BatchTensor.after`."""

    @property
    def readings(self) -> int:
        rows, columns = self.copied
        return rows * columns + (0 if self.whole else OF_WHOLE)


@dataclass(slots=True)
class _Labels:
    """The targets of a loss over classes."""

    loss: str
    classes: int
    per_example: bool
    plain: bool
    target: int
    """Position of the target among the tensors that were seen."""


class BatchProbe(Probe):
    """No table: sets `StepFacts.batch`.

    Reads the arguments of the model, the input of its first layer with weights, and the targets of
    the loss functions of torch.nn.functional, in the first forward of a step; never the data set. A
    small tensor is copied, and its statistics are computed when the step is recorded. Of a larger
    tensor, range and checksum are computed at once, and the rest from a sample.
    """

    name = "batch"
    every = 10
    first_steps = 6
    importance = 12
    max_stretch = 32
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._own = {id(parameter) for parameter in tracked.parameters}
        self._calls = SubmoduleCalls(self._called, _nothing)
        self._seen: list[SeenTensor] = []
        self._readings: list[torch.Tensor] = []
        self._broadcast = ""
        self._measurements = 0
        self._first_layer_judged = True
        """Whether the first module with weights is one whose input should be of a certain scale."""
        self._here = False
        """Whether the model that is called in this step has parameters of this optimizer."""
        self._workers: int | None = None
        self._labels: list[_Labels] = []
        """Labels of the losses of this step."""
        self._counter = LabelCounter()
        self._large_counts: torch.Tensor | None = None
        """(classes,): labels of each class, over all measured steps whose targets are too large to
        copy."""
        self._counted = ""
        """The loss function whose labels `_large_counts` holds."""
        self._under_way: deque[tuple[list[SeenTensor], str, _Labels | None]] = deque()

    def model_called(
        self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Record the arguments of the model."""
        self._seen, self._readings, self._broadcast, self._labels = [], [], "", []
        self._here = any(id(parameter) in self._own for parameter in root.parameters())
        if not self._here:
            return
        if self._workers is None:
            loaders = objects_of_script(DataLoader)
            self._workers = max((loader.num_workers for loader in loaders), default=0)
        for tensor in tensors_in((*args, *kwargs.values())):
            self._add("input", "", tensor)
        if isinstance(root, (*FIRST_LAYERS, *CONVOLUTIONS)) and self._seen:
            self._seen.append(replace(self._seen[-1], role="first layer"))
            self._readings.append(self._readings[-1])

    def before_forward(self, root: torch.nn.Module) -> None:
        if not self._here:
            return
        number = self._measurements
        self._measurements += 1
        if number < ALL_FIRST_LAYERS or (
            self._first_layer_judged and number % FIRST_LAYER_EVERY == 0
        ):
            self._calls.begin(root, under_way=True)

    def after_forward(self) -> None:
        self._calls.end()

    def _called(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Record the input of the first module with weights, if the module is a linear map."""
        if not any(True for _ in module.parameters(recurse=False)):
            return
        self._first_layer_judged = isinstance(module, (*FIRST_LAYERS, *CONVOLUTIONS))
        if self._first_layer_judged:
            with torch.no_grad():
                for tensor in tensors_in(args)[:1]:
                    self._add("first layer", type(module).__name__, tensor)
        self._calls.end()

    def loss_called(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Record the target of a loss function."""
        given = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if not self._here or not isinstance(given, torch.Tensor):
            return
        if not isinstance(target, torch.Tensor) or sum(s.role == "target" for s in self._seen) >= (
            MAX_TARGETS
        ):
            return
        if name in ELEMENTWISE and given.shape != target.shape and not self._broadcast:
            shapes = f"{tuple(given.shape)} and {tuple(target.shape)}"
            self._broadcast = f"{name} of {shapes}"
        if name in CLASS_LOSSES and not target.is_floating_point():
            ignored = args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
            classes = given.shape[1] if given.dim() > 1 else given.shape[0]
            if self._add("target", name, target, classes=classes, ignored=ignored):
                self._add_labels(name, args, kwargs, target)
        elif name in BINARY or name in ELEMENTWISE:
            self._add("target", name, target, after=_bounding(given.grad_fn))

    def _add_labels(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.Tensor
    ) -> None:
        """Add the labels of the last target. They are counted here if the target is too large to
        copy, otherwise when the step is recorded."""
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        reduction = args[6] if len(args) > 6 else kwargs.get("reduction", "mean")
        smoothing = args[7] if len(args) > 7 else kwargs.get("label_smoothing", 0.0)
        rows = next((each.shape[0] for each in self._seen if each.role == "input"), 0)
        seen = self._seen[-1]
        self._labels.append(
            _Labels(
                name,
                seen.classes,
                per_example=target.numel() == rows,
                plain=weight is None and reduction == "mean" and not smoothing,
                target=len(self._seen) - 1,
            )
        )
        if len(self._labels) > 1 or seen.whole or not 1 < seen.classes <= MAX_CLASSES:
            return
        before = self._large_counts
        if before is None or len(before) != seen.classes or self._counted != name:
            kind = torch.float32 if target.device.type == "mps" else torch.float64
            before = torch.zeros(seen.classes, dtype=kind, device=target.device)
            self._counted = name
        labels = target.detach().flatten()
        valid = (labels != seen.ignored) & (labels >= 0) & (labels < seen.classes)
        labels = labels.where(valid, 0).long()
        self._large_counts = before.scatter_add(0, labels, valid.to(before.dtype))

    def _add(
        self,
        role: TensorRole,
        name: str,
        tensor: torch.Tensor,
        classes: int = 0,
        ignored: int | None = None,
        after: str = "",
    ) -> bool:
        """Record a tensor; return whether its dtype and layout allow it."""
        if not is_dense(tensor) or not tensor.numel() or tensor.is_complex():
            return False
        kind: NumberKind = "float" if tensor.is_floating_point() else "integer"
        if tensor.dtype == torch.bool:
            kind = "bool"
        copied, reading = copied_of(tensor.detach(), ignored)
        rows, columns = copied
        whole = rows * columns == tensor.numel()
        self._seen.append(
            SeenTensor(
                role, name, tuple(tensor.shape), kind, classes, ignored, copied, whole, after
            )
        )
        self._readings.append(reading)
        return True

    def after_update(self) -> Readings:
        seen, self._seen = self._seen, []
        readings, self._readings = self._readings, []
        broadcast, self._broadcast = self._broadcast, ""
        labels, self._labels = self._labels, []
        known = labels[0] if len(labels) == 1 and 1 < labels[0].classes <= MAX_CLASSES else None
        if known is not None and not seen[known.target].whole:
            assert self._large_counts is not None
            readings.append(self._large_counts)
        self._under_way.append((seen, broadcast, known))
        return readings

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.batch`."""
        seen, broadcast, labels = self._under_way.popleft()
        large = labels is not None and not seen[labels.target].whole
        expected = sum(each.readings for each in seen)
        if labels is not None and large:
            expected += labels.classes
        if not seen or values.size != expected:
            return ()
        tensors: list[BatchTensor] = []
        counts, position = None, 0
        for each in seen:
            given = values[position : position + each.readings]
            position += each.readings
            if labels is not None and not large and len(tensors) == labels.target:
                self._counter.add(labels, given[given != each.ignored])
            tensors.append(statistics(each, given))
        if labels is not None:
            counts = self._counter.counts(labels, values[position:] if large else None)
        facts.batch = BatchRecord(tuple(tensors), broadcast, self._workers or 0, counts)
        return ()


OF_WHOLE = 5
"""Number of readings from `_of_whole`, for a tensor that is too large to copy."""


def copied_of(tensor: torch.Tensor, ignored: int | None) -> tuple[tuple[int, int], torch.Tensor]:
    """(rows, elements per row) of the copy, and the readings: the copy, flattened, as float64; a
    sample is preceded by the readings of `_of_whole`."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    count = tensor.numel()
    rows = tensor.shape[0] if tensor.dim() else 1
    if count <= SAMPLE:
        return (rows, count // rows), tensor.to(wide, copy=True).reshape(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    of_whole = _of_whole(tensor, ignored, wide)
    if tensor.dim() > 1:
        some = tensor[:: -(-rows // SAMPLED_ROWS)].flatten(1)
        sample = some[:, :: -(-some.numel() // SAMPLE)].to(wide)
    else:
        sample = tensor[:: -(-rows // SAMPLE), None].to(wide)
    return (sample.shape[0], sample.shape[1]), torch.cat([of_whole, sample.reshape(-1)])


def _of_whole(tensor: torch.Tensor, ignored: int | None, wide: torch.dtype) -> torch.Tensor:
    """(5,): lowest and highest element (nan where any element is), checksum, number of ignored
    elements, and whether the first, second and last row are equal."""
    if ignored is None:
        low, high = torch.aminmax(tensor)
        left_out = torch.zeros((), device=tensor.device)
    else:
        limits = torch.iinfo(tensor.dtype)
        valid = tensor != ignored
        low = tensor.where(valid, limits.max).min()
        high = tensor.where(valid, limits.min).max()
        left_out = tensor.numel() - valid.sum()
    equal = (tensor[1] == tensor[0]).all() & (tensor[-1] == tensor[0]).all()
    return torch.stack([each.to(wide) for each in (low, high, checksum([tensor]), left_out, equal)])


def statistics(seen: SeenTensor, values: Values) -> BatchTensor:
    """Statistics of the finite elements that are not ignored; the checksum covers all elements."""
    copy = values if seen.whole else values[OF_WHOLE:]
    valid = np.isfinite(copy) if seen.ignored is None else copy != seen.ignored
    some = copy[valid]
    low, high = (some.min(), some.max()) if some.size else (math.inf, -math.inf)
    mean, std = (some.mean(), some.std()) if some.size else (math.nan, math.nan)
    rows, columns = seen.copied
    table = copy.reshape(rows, columns)
    same = rows > 1 and bool((table[1:] == table[0]).all())
    total = zlib.crc32(copy.tobytes())
    left_out = copy.size - some.size
    if not seen.whole:
        lowest, highest, of_whole, ignored, equal = values[:OF_WHOLE].tolist()
        if math.isfinite(lowest) and math.isfinite(highest):
            low, high = lowest, highest
        same = same and bool(equal)
        total ^= int(of_whole)
        share = left_out / copy.size
        left_out = round(share * math.prod(seen.shape)) if seen.ignored is None else int(ignored)
    return BatchTensor(
        seen.role,
        seen.name,
        seen.shape,
        seen.kind,
        seen.classes,
        float(low),
        float(high),
        float(mean),
        float(std),
        same,
        total,
        left_out,
        seen.after,
    )


class LabelCounter:
    """Counts labels on the host, over all measured steps."""

    def __init__(self) -> None:
        self._counted = ("", 0)
        self._counts: NDArray[np.float64] = np.zeros(0)
        self._of_large: NDArray[np.float64] = np.zeros(0)
        self._batches, self._within = 0, 0.0

    def add(self, labels: _Labels, values: Values) -> None:
        self._follow(labels)
        valid = values[(values >= 0) & (values < labels.classes)].astype(np.int64)
        found = np.bincount(valid, minlength=labels.classes)
        self._counts += found
        if valid.size:
            shares = found[found > 0] / valid.size
            self._batches += 1
            self._within -= float((shares * np.log(shares)).sum())

    def counts(self, labels: _Labels, of_large: Values | None) -> LabelCounts:
        """The counts so far. `of_large`: counts of targets that were too large to copy."""
        self._follow(labels)
        if of_large is not None:
            self._of_large = of_large
        counts = self._counts + self._of_large
        total = counts.sum()
        different = int((counts > 0).sum())
        shares = counts[counts > 0] / total if total else counts[:0]
        entropy = math.nan  # with Miller and Madow's correction of its bias
        if different:
            entropy = float(-(shares * np.log(shares)).sum() + (different - 1) / (2 * total))
        return LabelCounts(
            labels.classes,
            int(total),
            different,
            float(counts.max() / total) if total else math.nan,
            int(counts.argmax()),
            entropy,
            labels.per_example,
            labels.plain,
            self._batches,
            self._within / self._batches if self._batches else math.nan,
        )

    def _follow(self, labels: _Labels) -> None:
        if self._counted != (labels.loss, labels.classes):
            self._counted = labels.loss, labels.classes
            self._counts, self._of_large = np.zeros(labels.classes), np.zeros(labels.classes)
            self._batches, self._within = 0, 0.0


def _bounding(node: Any) -> str:
    """The activation that bounds the values of a tensor, also through views; "" without one."""
    for _ in range(4):
        name = node.name().partition("Backward")[0] if node is not None else ""
        if name in ("Sigmoid", "Tanh", "Softmax", "Relu"):
            return name.lower()
        if name not in ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias"):
            break
        node = node.next_functions[0][0]
    return ""


def _nothing(module: torch.nn.Module, result: Any) -> None:
    pass
