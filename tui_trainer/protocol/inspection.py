"""Requests to inspect the tensors of a run, and their answers.

A viewer sends `Inspect`, and the run answers `Inspected`. While the answer is `pending`, because
the training thread has not reached a boundary yet, the viewer sends the same `Inspect` again. A
viewer has one request at a time; another one replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from tui_trainer.protocol import Phase
from tui_trainer.protocol.attention import AttentionExamination, ExamineAttention
from tui_trainer.protocol.autograd import (
    AutogradGraph,
    CheckGradient,
    DescribeGraph,
    GradientCheck,
)
from tui_trainer.protocol.heat_map import HeatMap, HeatMapWindow
from tui_trainer.protocol.schema import Scalar
from tui_trainer.protocol.settings import ReadSettings, SettingList
from tui_trainer.protocol.travel import (
    EstimateCost,
    ExperimentCost,
    ExperimentResult,
    FindLearningRate,
    MeasureLandscape,
    ReadTimeline,
    Timeline,
    WhatIf,
)

TensorKind = Literal["parameter", "buffer", "gradient", "state", "input", "output"]
"""`state`: of an optimizer, for one parameter; `input` and `output`: of a module."""
InspectionState = Literal["pending", "done", "failed"]

MAX_NAMES = 1000
"""Maximum number of names in each list of `ParameterUse`."""
MAX_ENTRIES = 100
"""Limit of `Summarize.entries`."""


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """Identifies a tensor of a run."""

    name: str
    """Name of the parameter, buffer or module."""
    kind: TensorKind = "parameter"
    key: str = ""
    """For a `state`, its name in the optimizer, such as `exp_avg`; for an `input` or `output`, its
    number, "" for the first."""

    @property
    def text(self) -> str:
        """`blocks.0.weight`, `gradient of blocks.0.weight`, `exp_avg of blocks.0.weight`"""
        match self.kind:
            case "gradient":
                return f"gradient of {self.name}"
            case "state":
                return f"{self.key} of {self.name}"
            case "input" | "output":
                return f"{self.kind}{f' {self.key}' if self.key else ''} of {self.name}"
            case _:
                return self.name


class TensorInfo(msgspec.Struct, frozen=True, array_like=True):
    """A tensor without its values."""

    ref: TensorRef
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int
    note: str = ""
    """A note such as `this rank's shard`."""
    also: tuple[str, ...] = ()
    """Further names of a shared parameter, in a list of tensors."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ref.name, *self.also)

    def is_named(self, words: Sequence[str]) -> bool:
        """Whether all `words` (in lower case) occur in one of the tensor's names."""
        texts = [msgspec.structs.replace(self.ref, name=name).text for name in self.names]
        return any(all(word in text.casefold() for word in words) for text in texts)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class TensorList(msgspec.Struct, tag="tensors", frozen=True, array_like=True):
    """The tensors that can be inspected now, in the order of the model."""

    tensors: tuple[TensorInfo, ...]
    left_out: int = 0
    """Number of tensors that are not listed."""


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """One element of a tensor."""

    index: tuple[int, ...]
    value: float


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """Counts in bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]


class TensorStatistics(msgspec.Struct, frozen=True, array_like=True):
    """Statistics of the finite elements; nan where there is none."""

    count: int
    """Number of elements, finite or not."""
    minimum: float
    maximum: float
    mean: float
    std: float
    """Population standard deviation: divided by the number of elements."""
    norm: float
    """2-norm."""
    zeros: int
    nan: int
    positive_inf: int
    negative_inf: int
    sampled: int
    """Number of elements that quantiles and histograms are computed from: all of them, or evenly
    spaced ones of a large tensor."""
    quantiles: tuple[tuple[float, float], ...]
    """(q, value)"""
    histogram: Histogram
    log_histogram: Histogram
    """Histogram of log10 of the absolute values that are not zero."""
    largest: tuple[TensorEntry, ...]
    smallest: tuple[TensorEntry, ...]
    nonfinite: tuple[TensorEntry, ...]
    """The first elements that are not finite."""

    @property
    def not_finite(self) -> int:
        return self.nan + self.positive_inf + self.negative_inf


class TensorMoments(msgspec.Struct, frozen=True, array_like=True):
    """The statistics of the finite elements of a tensor that a single pass computes."""

    minimum: float
    maximum: float
    mean: float
    std: float
    norm: float
    zeros: int
    not_finite: int


class BeforePhase(msgspec.Struct, frozen=True, array_like=True):
    """A tensor at the boundary before the last one."""

    step: int
    phase: Phase | Literal[""]
    """The phase that ended at that boundary."""
    moments: TensorMoments | None
    """None: the tensor did not exist, such as a gradient that backward has computed since."""


class TensorSummary(msgspec.Struct, tag="summary", frozen=True, array_like=True):
    """The answer to `Summarize`."""

    tensor: TensorInfo
    statistics: TensorStatistics | None = None
    heat: HeatMap | None = None
    before: BeforePhase | None = None
    """With `statistics`: the same tensor before the last phase; None if it was not read then."""


class TensorData(msgspec.Struct, tag="data", frozen=True, array_like=True):
    """A part of the bytes of a tensor, in C order and little-endian."""

    tensor: TensorInfo
    total: int
    """Bytes of the whole tensor."""
    offset: int
    data: bytes


class UpdateTerm(msgspec.Struct, frozen=True, array_like=True):
    """One line of the update of a weight, in the order in which it is computed."""

    name: str
    formula: str
    value: float
    """Value of a single entry, or the 2-norm of a whole tensor."""
    numbers: str = ""
    """The formula with its numbers, for a single entry."""


class UpdateExplanation(msgspec.Struct, tag="explanation", frozen=True, array_like=True):
    """How the optimizer computes the update of a weight. For a whole tensor all values are
    2-norms."""

    tensor: TensorInfo
    index: tuple[int, ...] | None
    """None: the whole tensor."""
    optimizer: str
    group: int
    settings: dict[str, Scalar]
    """Hyper-parameters of the group."""
    count: int
    """Number of the optimizer's step for this parameter (the t of Adam), from 1; 0 for SGD, which
    does not count steps."""
    terms: tuple[UpdateTerm, ...]
    """The last two are the update and the new weight."""
    old: float
    predicted: float
    """The new weight."""
    actual: float | None = None
    """None before the step."""
    difference: float | None = None
    """|predicted − actual|; for a whole tensor the norm of the difference."""
    precision: float = 0.0
    """Spacing of the numbers of the dtype around the weight; for a whole tensor the norm of the
    spacings."""
    notes: tuple[str, ...] = ()


class OptimizerGroup(msgspec.Struct, frozen=True, array_like=True):
    """A parameter group of an optimizer."""

    optimizer: str
    number: int
    settings: dict[str, Scalar]
    names: tuple[str, ...]
    """Names of its parameters; at most `MAX_NAMES`."""
    parameters: int
    elements: int


class HeldBytes(msgspec.Struct, frozen=True, array_like=True):
    """The memory of one kind of tensor on one device."""

    kind: TensorKind | Literal["saved"]
    """`saved`: what the graph of the step's loss keeps for backward."""
    device: str
    tensors: int
    bytes: int


class ParameterUse(msgspec.Struct, tag="use", frozen=True, array_like=True):
    """Which optimizer updates which parameters, and the memory of all tensors. Lists have at most
    `MAX_NAMES` names."""

    groups: tuple[OptimizerGroup, ...]
    memory: tuple[HeldBytes, ...]
    frozen: tuple[str, ...] = ()
    without_optimizer: tuple[str, ...] = ()
    """Trainable parameters that no optimizer holds."""
    without_gradient: tuple[str, ...] = ()
    """Trainable parameters of an optimizer without a gradient, while others have one."""
    shared: tuple[tuple[str, ...], ...] = ()
    """All names of each shared parameter."""
    unused: tuple[str, ...] = ()
    """Trainable parameters that are not in the graph of the step's loss."""
    graph_missing: str = ""
    """Why the graph of the loss is unknown, and with it `saved` and `unused`."""

    @property
    def waits_for_batch(self) -> bool:
        """Whether the graph can be read once another step has been made."""
        return NOT_CAPTURED in self.graph_missing


class DescribeUse(msgspec.Struct, tag="describe_use", frozen=True):
    """Asks which optimizer updates which parameters, and for the memory of all tensors."""


class ListTensors(msgspec.Struct, tag="list_tensors", frozen=True):
    """Asks for the list of tensors."""

    modules: bool = False
    """List inputs and outputs of modules instead, for which the forward pass is re-run."""


class Summarize(msgspec.Struct, tag="summarize", frozen=True):
    """Asks for statistics and a heat map of a tensor."""

    tensor: TensorRef
    statistics: bool = True
    window: HeatMapWindow | None = None
    entries: int = 8
    """Number of the largest, of the smallest and of non-finite elements to return."""


class ReadTensor(msgspec.Struct, tag="read_tensor", frozen=True):
    """Asks for the bytes of a tensor from `offset` on. At offset 0 the run copies the tensor; later
    parts are read from the copy."""

    tensor: TensorRef
    offset: int = 0


class ExplainUpdate(msgspec.Struct, tag="explain_update", frozen=True):
    """Asks for the update of a parameter or of one of its entries.

    Before the optimizer's step the answer predicts the update; after the step it also has the
    actual one. The run observes the parameter's steps from the first request on, as long as further
    requests come.
    """

    name: str
    index: tuple[int, ...] | None = None
    """None: the whole tensor."""


RankRequest = (
    ListTensors
    | Summarize
    | ReadTensor
    | ExplainUpdate
    | DescribeUse
    | DescribeGraph
    | CheckGradient
    | ExamineAttention
)
"""Requests that the process of any rank can answer."""


class OfRank(msgspec.Struct, tag="of_rank", frozen=True):
    """Asks the process of another rank; the answer has the step and the phase of that process."""

    rank: int
    request: RankRequest


InspectionRequest = (
    RankRequest
    | OfRank
    | ReadSettings
    | ReadTimeline
    | WhatIf
    | FindLearningRate
    | MeasureLandscape
    | EstimateCost
)
InspectionResult = (
    TensorList
    | TensorSummary
    | TensorData
    | UpdateExplanation
    | ParameterUse
    | AttentionExamination
    | AutogradGraph
    | GradientCheck
    | SettingList
    | Timeline
    | ExperimentResult
    | ExperimentCost
)
NOT_CAPTURED = "the batch of this step was not kept"
"""Message of the first request that needs a re-run of the forward pass."""
NOT_OBSERVED = "the update of this step was not observed"
"""Message of the first request for an update, if it comes after the step."""


class Inspect(msgspec.Struct, tag="inspect", frozen=True, array_like=True):
    """A request, numbered by the viewer to match the answer."""

    id: int
    request: InspectionRequest


class Inspected(msgspec.Struct, tag="inspected", frozen=True, array_like=True):
    """The answer to one `Inspect`."""

    id: int
    state: InspectionState
    result: InspectionResult | None = None
    """Set if the state is `done`."""
    step: int = 0
    """The step that the values belong to: the one in progress, or the last completed one."""
    phase: Phase | Literal[""] = ""
    """The phase that had ended last."""
    took_ms: float = 0.0
    """Time on the training thread."""
    message: str = ""
    """Why the request failed, or what a pending request waits for."""
    hint: str = ""
    rank: int = 0
    """Rank of the process that holds the tensors."""

    @property
    def moment(self) -> str:
        """`step 12, after backward`, with the rank if it is not 0."""
        after = f", after {self.phase}" if self.phase else ""
        return f"step {self.step:,}{after}" + (f", rank {self.rank}" if self.rank else "")
