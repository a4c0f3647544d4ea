"""What the model and the loss function receive: statistics of inputs and targets on a cadence."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from tui_trainer.history.records import (
    BatchRecord,
    BatchTensor,
    Floats,
    LabelCounts,
    TensorRole,
)
from tui_trainer.probes.replica import checksum
from tui_trainer.trace.evaluation import CLASS_LOSSES
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Options, Probe, Readings, StepFacts, Values
from tui_trainer.trace.script_frames import objects_of_script
from tui_trainer.trace.submodule_calls import SubmoduleCalls, tensors_in
from tui_trainer.trace.torch_private import PLAIN

LABEL_STATISTICS = ("total", "different", "largest", "largest_class", "entropy")
MAX_CLASSES = 8192
"""Classes whose labels are counted."""
STATISTICS = ("low", "high", "mean", "std", "same_rows", "checksum", "not_finite")
MAX_TARGETS = 4
MAX_ELEMENTS = 1 << 24
"""Of a larger tensor only the first rows are looked at."""
ELEMENTWISE = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
"""Losses that broadcast an input and a target of different shapes."""
BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
FIRST_LAYERS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
CONVOLUTIONS = tuple(
    getattr(nn, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)
)


@dataclass(slots=True)
class _Seen:
    role: TensorRole
    name: str
    shape: tuple[int, ...]
    kind: str
    classes: int


@dataclass(slots=True)
class _Labels:
    """The targets of a loss over classes."""

    loss: str
    classes: int
    per_example: bool
    plain: bool


class BatchProbe(Probe):
    """No table: sets `StepFacts.batch`.

    Looks at the arguments of the model, at what its first layer with weights is given, and at the
    targets of the loss functions of torch.nn.functional, in the first forward of a step; never at
    the data set, of which nothing is read. Costs one pass over each of these tensors.
    """

    name = "batch"
    every = 10
    first_steps = 6
    importance = 12
    max_stretch = 32
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        self._own = {id(parameter) for parameter in tracked.parameters}
        self._calls = SubmoduleCalls(self._called, _nothing)
        self._seen: list[_Seen] = []
        self._readings: list[torch.Tensor] = []
        self._broadcast = ""
        self._here = False
        """Whether the model of this optimizer is the one that is called in this step."""
        self._workers: int | None = None
        self._labels: list[_Labels] = []
        """Of the losses of this step."""
        self._counts: torch.Tensor | None = None
        """Labels of each class, over all measured steps: float64 (classes,)."""
        self._counted = ""
        """The loss function whose labels they are."""
        self._under_way: deque[tuple[list[_Seen], str, _Labels | None]] = deque()

    def model_called(
        self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The arguments of the model."""
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
            self._seen.append(_Seen("first layer", "", *self._same_as_last()))
            self._readings.append(self._readings[-1])

    def _same_as_last(self) -> tuple[tuple[int, ...], str, int]:
        last = self._seen[-1]
        return last.shape, last.kind, last.classes

    def before_forward(self, root: torch.nn.Module) -> None:
        if self._here:
            self._calls.begin(root, under_way=True)

    def after_forward(self) -> None:
        self._calls.end()

    def _called(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The first module that has weights: what it is given, if it is a linear map of it."""
        if not any(True for _ in module.parameters(recurse=False)):
            return
        if isinstance(module, (*FIRST_LAYERS, *CONVOLUTIONS)):
            with torch.no_grad():
                for tensor in tensors_in(args)[:1]:
                    self._add("first layer", type(module).__name__, tensor)
        self._calls.end()

    def loss_called(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """The target of a loss function."""
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
            self._add("target", name, target, classes=classes, ignored=ignored)
            self._count(name, args, kwargs, target, classes, ignored)
        elif name in BINARY or name in ELEMENTWISE:
            self._add("target", name, target)

    def _count(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: torch.Tensor,
        classes: int,
        ignored: int,
    ) -> None:
        """Add the labels of a loss to those of the steps before."""
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        reduction = args[6] if len(args) > 6 else kwargs.get("reduction", "mean")
        smoothing = args[7] if len(args) > 7 else kwargs.get("label_smoothing", 0.0)
        rows = next((each.shape[0] for each in self._seen if each.role == "input"), 0)
        self._labels.append(
            _Labels(
                name,
                classes,
                per_example=target.numel() == rows,
                plain=weight is None and reduction == "mean" and not smoothing,
            )
        )
        if len(self._labels) > 1 or not 1 < classes <= MAX_CLASSES or type(target) not in PLAIN:
            return
        if self._counts is None or len(self._counts) != classes or self._counted != name:
            kind = torch.float32 if target.device.type == "mps" else torch.float64
            self._counts = torch.zeros(classes, dtype=kind, device=target.device)
            self._counted = name
        labels = target.detach().flatten()
        valid = (labels != ignored) & (labels >= 0) & (labels < classes)
        labels = labels.where(valid, 0).long()
        self._counts = self._counts.scatter_add(0, labels, valid.to(self._counts.dtype))

    def _add(
        self,
        role: TensorRole,
        name: str,
        tensor: torch.Tensor,
        classes: int = 0,
        ignored: int | None = None,
    ) -> None:
        if type(tensor) not in PLAIN or not tensor.numel() or tensor.is_complex():
            return
        if tensor.layout != torch.strided:
            return
        kind = "float" if tensor.is_floating_point() else "integer"
        if tensor.dtype == torch.bool:
            kind = "bool"
        self._seen.append(_Seen(role, name, tuple(tensor.shape), kind, classes))
        self._readings.append(statistics(tensor.detach(), ignored))

    def after_update(self) -> Readings:
        seen, self._seen = self._seen, []
        readings, self._readings = self._readings, []
        broadcast, self._broadcast = self._broadcast, ""
        labels, self._labels = self._labels, []
        known, counts = labels[0] if len(labels) == 1 else None, self._counts
        if known is None or counts is None or known.classes != len(counts):
            known = None  # no loss over classes, several, or more classes than are counted
        else:
            readings.append(label_statistics(counts))
        self._under_way.append((seen, broadcast, known))
        return readings

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.batch`."""
        seen, broadcast, labels = self._under_way.popleft()
        count = len(STATISTICS)
        further = len(LABEL_STATISTICS) if labels is not None else 0
        if values.size != count * len(seen) + further or not seen:
            return ()
        tensors = []
        for position, each in enumerate(seen):
            low, high, mean, std, same, total, bad = values[
                position * count : (position + 1) * count
            ].tolist()
            tensors.append(
                BatchTensor(
                    each.role,
                    each.name,
                    each.shape,
                    each.kind,
                    each.classes,
                    low,
                    high,
                    mean,
                    std,
                    bool(same),
                    int(total),
                    int(bad),
                )
            )
        counts = None
        if labels is not None:
            total, different, largest, largest_class, entropy = values[-further:].tolist()
            counts = LabelCounts(
                labels.classes,
                int(total),
                int(different),
                largest,
                int(largest_class),
                entropy,
                labels.per_example,
                labels.plain,
            )
        facts.batch = BatchRecord(tuple(tensors), broadcast, self._workers or 0, counts)
        return ()


def statistics(tensor: torch.Tensor, ignored: int | None = None) -> torch.Tensor:
    """STATISTICS of a tensor as float64 (7,); elements that are not finite, or equal to `ignored`,
    count in the checksum only."""
    if tensor.numel() > MAX_ELEMENTS and tensor.dim():
        tensor = tensor[: max(1, MAX_ELEMENTS // max(1, tensor[0].numel()))]
    bits = tensor.contiguous()
    if bits.dtype == torch.bool:
        bits = bits.view(torch.int8)
    total = checksum([bits])
    x = tensor.float() if tensor.device.type == "mps" else tensor.double()
    valid = torch.isfinite(x) if ignored is None else tensor != ignored
    count = valid.sum()
    zeroed = x.where(valid, 0.0)
    mean = zeroed.sum() / count
    std = ((zeroed - mean).square().where(valid, 0.0).sum() / count).sqrt()
    rows = tensor.shape[0] if tensor.dim() else 1
    same = (tensor[1:] == tensor[:1]).all() if rows > 1 else torch.zeros((), device=tensor.device)
    infinite = torch.tensor(float("inf"), dtype=x.dtype, device=x.device)
    return torch.stack(
        [
            x.where(valid, infinite).min(),
            x.where(valid, -infinite).max(),
            mean,
            std,
            same.to(x.dtype),
            total.to(x.dtype),
            (tensor.numel() - count).to(x.dtype),
        ]
    )


def label_statistics(counts: torch.Tensor) -> torch.Tensor:
    """LABEL_STATISTICS of the number of labels of each class, as float64 (5,)."""
    total = counts.sum()
    shares = counts / total
    different = (counts > 0).sum().to(counts.dtype)
    entropy = -torch.special.xlogy(shares, shares).sum() + (different - 1) / (2 * total)
    largest = shares.max()
    return torch.stack([total, different, largest, shares.argmax().to(counts.dtype), entropy])


def _nothing(module: torch.nn.Module, result: Any) -> None:
    pass
