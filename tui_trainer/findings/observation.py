"""The input of rules: one optimizer step, with its tables by name, and facts about the run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.records import (
    BadBatch,
    BatchRecord,
    ClipRecord,
    Floats,
    InitialWeight,
    LossGraph,
    NonFiniteRecord,
    Producer,
    Sign,
    SkipRecord,
    StepRecord,
    UnitsRecord,
    WeightDecay,
)
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent_mask, why_absent
from tui_trainer.protocol.events import SkipReason
from tui_trainer.protocol.schema import AttentionInfo, ParameterInfo, RunInfo

_REASON = 0xFF
"""Mask of the reason in the bits of an absent float32."""


_UNKNOWN = (
    Absent.NOT_MEASURED,
    Absent.CHANGED_BY_HAND,
    Absent.CHANGED_BY_FRAMEWORK,
    Absent.OUT_OF_RANGE,
    Absent.OVERFLOW,
)
"""Reasons why a value that may exist is not known."""


class TableRow:
    """The values of one table at one step, with the names of their columns."""

    __slots__ = ("__dict__", "names", "table", "values")

    def __init__(self, table: str, names: tuple[str, ...], values: Floats) -> None:
        self.table = table
        self.names = names
        self.values = values

    @cached_property
    def absent(self) -> NDArray[np.bool_]:
        """Mask of absent values."""
        return absent_mask(self.values)

    @cached_property
    def any_absent(self) -> bool:
        # A finite sum means that every value is finite, and is faster than the mask.
        return not math.isfinite(np.add.reduce(self.values, dtype=np.float64)) and bool(
            self.absent.any()
        )

    @cached_property
    def any_unknown(self) -> bool:
        """Whether some values are absent only because they could not be measured."""
        return self.any_absent and bool(np.isin(self.reasons(), _UNKNOWN).any())

    def reasons(self) -> NDArray[np.uint32]:
        """The `Absent` code of each value, 0 where it is present."""
        return np.where(self.absent, self.values.view(np.uint32) & _REASON, 0)

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = np.isfinite(self.values)
        return mask

    def get(self, name: str) -> float | None:
        """The value of a column; None where it is absent or there is no such column."""
        try:
            value = float(self.values[self.names.index(name)])
        except (ValueError, IndexError):
            return None
        return None if why_absent(value) is not None else value


@dataclass(slots=True)
class Observation:
    """One optimizer step. Absent numbers are None; a measured nan stays nan."""

    step: int
    time: float
    optimizer: str
    """Key of the optimizer, as in `Table.optimizer`."""
    loss: float | None = None
    loss_absent: Absent | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """2-norm over all parameters of the optimizer, before clipping."""
    step_ms: float | None = None
    evaluations: float = 0.0
    """How often the optimizer called its closure; 0 without one."""
    clip: TableRow | None = None
    clip_event: ClipRecord | None = None
    phases: TableRow | None = None
    gradients: TableRow | None = None
    weights: TableRow | None = None
    updates: TableRow | None = None
    memory: TableRow | None = None
    attention: TableRow | None = None
    health: TableRow | None = None
    nonfinite: tuple[NonFiniteRecord, ...] = ()
    signs: frozenset[Sign] = frozenset()
    classes: int | None = None
    """As in `StepRecord`."""
    loss_graph: LossGraph | None = None
    producer: Producer | None = None
    batch: BatchRecord | None = None
    bad_batch: BadBatch | None = None
    units: UnitsRecord | None = None
    dropout_off: tuple[str, ...] | None = None
    kept_update: float | None = None
    initial: tuple[InitialWeight, ...] = ()
    epsilon: float | None = None
    momentum: float | None = None
    weight_decay: WeightDecay | None = None


@dataclass(slots=True)
class SkippedStep:
    """An iteration whose gradients no optimizer used. The next step is `step`."""

    step: int
    optimizer: str
    reason: SkipReason
    loss_scale: float | None
    loss: float | None = None
    """None where the loss is not known; a measured nan stays nan."""
    producer: Producer | None = None
    bad_batch: BadBatch | None = None
    nonfinite: tuple[NonFiniteRecord, ...] = ()


class RunFacts:
    """Facts about the run."""

    def __init__(self) -> None:
        self._infos: tuple[ParameterInfo, ...] = ()
        self.parameters: Mapping[str, ParameterInfo] = {}
        self.order: Mapping[str, int] = {}
        """Name → position in the model, which for most models is the order of the forward pass."""
        self.attention: tuple[AttentionInfo, ...] = ()
        self.optimizers: tuple[str, ...] = ()
        self.resumed = False
        """Whether the weights come from another run."""
        self.classes: int | None = None
        """Number of classes of a cross-entropy loss; None where it is not known."""
        self.of_task = False
        """Whether `classes` was declared by the task."""
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.ranks = 0
        """Number of processes of a distributed training."""
        self.device = ""
        self.replaced: frozenset[str] = frozenset()
        """Parameters of an optimizer that the model no longer has, as `not-in-optimizer` found."""

    def update(self, info: RunInfo) -> None:
        if info.parameters is not self._infos:
            self._infos = info.parameters
            self.parameters = {p.name: p for p in info.parameters}
            self.order = {p.name: i for i, p in enumerate(info.parameters)}
        self.attention = info.attention
        self.optimizers = info.optimizers
        self.resumed = info.branch_step is not None
        self.total_steps = info.total_steps
        self.steps_per_epoch = info.steps_per_epoch
        self.ranks = sum(not process.label for process in info.processes)
        self.device = info.device.kind if info.device else ""
        classes = info.facts.get("classes", info.facts.get("vocabulary"))
        if isinstance(classes, int) and not isinstance(classes, bool) and classes > 1:
            self.classes, self.of_task = classes, True

    def optimizer_name(self, key: str) -> str:
        return key or next(iter(self.optimizers), "the optimizer")

    def is_matrix(self, name: str) -> bool:
        """Whether a parameter has two dimensions or more: weights, not biases or gains."""
        info = self.parameters.get(name)
        return info is not None and len(info.shape) >= 2


FIRST_LOSSES = 20
RECENT_LOSSES = 64


@dataclass
class LossTrend:
    """Running statistics of the losses of one optimizer, in constant memory."""

    count: int = 0
    """Number of finite losses."""
    first: list[float] = field(default_factory=list)
    """The first FIRST_LOSSES finite losses."""
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT_LOSSES))
    """(step, loss) of the newest finite losses."""
    fast: float = math.nan
    """Exponential moving average over about 10 steps."""
    slow: float = math.nan
    """Exponential moving average over about 100 steps."""
    noise: float = 0.0
    """Mean absolute distance of a loss from `fast`, over about 100 steps."""
    start: float = math.nan
    """Median of the first three losses."""
    best: float = math.inf
    """Lowest `fast` so far."""
    best_step: int = 0
    lowest: float = math.inf
    """Lowest loss of a single step."""

    @property
    def reference(self) -> float:
        """The loss at the start, for comparison: `start`, or a tenth of the first loss if that is
        higher. The loss may fall to almost nothing in the first step, and the first loss itself
        may be an outlier."""
        return max(self.start, self.first[0] / 10) if self.first else math.nan

    @property
    def fell_at_once(self) -> bool:
        """Whether the loss fell to almost nothing in the first steps: each of the newest
        RECENT_LOSSES / 2 losses is below the first one by more than 99 % of its size."""
        newest = [loss for _, loss in self.recent][-(RECENT_LOSSES // 2) :]
        if len(newest) < RECENT_LOSSES // 2 or self.count == len(newest):
            return False  # the first loss is among the newest ones
        return self.first[0] - max(newest) > 0.99 * abs(self.first[0])

    def add(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self.count += 1
        self.recent.append((step, loss))
        self.lowest = min(self.lowest, loss)
        if self.count <= FIRST_LOSSES:
            self.first.append(loss)
            if self.count <= 3:
                self.start = median(self.first)
        if self.count == 1:
            self.fast = self.slow = loss
            return
        self.noise += (abs(loss - self.fast) - self.noise) / min(self.count - 1, 100)
        self.fast += (loss - self.fast) / min(self.count, 10)
        self.slow += (loss - self.slow) / min(self.count, 100)
        if self.fast < self.best:
            self.best, self.best_step = self.fast, step


class Reader:
    """Turns records into observations, using the run's declared tables."""

    def __init__(self) -> None:
        self.facts = RunFacts()
        self._tables: dict[int, tuple[str, tuple[str, ...]]] = {}
        self._ranks: dict[int, int] = {}
        self._info: RunInfo | None = None

    def update(self, info: RunInfo) -> None:
        if info is self._info:
            return
        self._info = info
        self.facts.update(info)
        # Unchanged names stay the same object: rules compare them by identity.
        known = self._tables
        self._tables = {
            table.id: (table.name, tuple(column.name for column in table.columns))
            for table in info.tables
        }
        self._ranks = {table.id: table.rank for table in info.tables if table.rank is not None}
        for number, entry in self._tables.items():
            if known.get(number) == entry:
                self._tables[number] = known[number]

    def table(self, number: int) -> tuple[str, tuple[str, ...]]:
        return self._tables.get(number, ("", ()))

    def rank_of(self, number: int) -> int | None:
        """The rank whose measurements a table `ranks` holds; None for other tables."""
        return self._ranks.get(number)

    def observe(self, record: StepRecord) -> Observation:
        seen = Observation(
            record.step,
            record.time,
            record.optimizer,
            clip_event=record.clip,
            nonfinite=record.nonfinite,
            signs=record.signs,
            classes=record.classes,
            loss_graph=record.loss_graph,
            producer=record.producer,
            batch=record.batch,
            bad_batch=record.bad_batch,
            units=record.units,
            dropout_off=record.dropout_off,
            kept_update=record.kept_update,
            initial=record.initial,
            epsilon=record.epsilon,
            momentum=record.momentum,
            weight_decay=record.weight_decay,
        )
        if record.classes is not None and record.classes > 1 and not self.facts.of_task:
            self.facts.classes = record.classes
        for number, values in record.rows:
            name, columns = self.table(number)
            attribute = _ATTRIBUTES.get(name)
            if attribute is not None:
                setattr(seen, attribute, TableRow(name, columns, values))
            elif name == schema.STEP:
                by_name = dict(zip(columns, values.tolist(), strict=False))
                loss, rate = by_name["loss"], by_name["learning_rate"]
                norm, took = by_name["grad_norm_preclip"], by_name["step_ms"]
                seen.loss_absent = why_absent(loss)
                seen.loss = loss if seen.loss_absent is None else None
                seen.learning_rate = None if why_absent(rate) is not None else rate
                seen.gradient_norm = None if why_absent(norm) is not None else norm
                seen.step_ms = took if math.isfinite(took) else None
                evaluations = by_name.get("evaluations", math.nan)
                if math.isfinite(evaluations):
                    seen.evaluations = evaluations
        return seen

    def observe_skip(self, record: SkipRecord) -> SkippedStep:
        loss: float | None = None
        for number, values in record.rows:
            name, columns = self.table(number)
            if name == schema.STEP:
                value = dict(zip(columns, values.tolist(), strict=False))["loss"]
                loss = value if why_absent(value) is None else None
        return SkippedStep(
            record.step,
            record.optimizer,
            record.reason,
            record.loss_scale,
            loss,
            record.producer,
            record.bad_batch,
            record.nonfinite,
        )


_ATTRIBUTES = {
    schema.CLIP: "clip",
    schema.PHASE_MS: "phases",
    schema.GRAD_NORM: "gradients",
    schema.WEIGHT_NORM: "weights",
    schema.UPDATE_RATIO: "updates",
    schema.MEMORY: "memory",
    schema.ATTENTION: "attention",
    schema.ATTENTION_HEALTH: "health",
}
