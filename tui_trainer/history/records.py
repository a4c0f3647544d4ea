"""The records that the training thread passes to the recorder: plain numpy, no torch, no shared
memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tui_trainer.protocol.events import ClipKind, NonFiniteQuantity, NonFiniteValue, SkipReason

Floats = NDArray[np.float32]

Sign = Literal[
    "new_parameters",
    "kept_gradients",
    "eval_mode",
    "softmax_twice",
    "backward_twice",
    "schedule_first",
    "evaluated_in_train_mode",
    "clipped_late",
    "mixed_losses",
    "idle_schedule",
    "calls_vary",
]
"""What the tracer noticed in a step besides its numbers.

* `new_parameters`: the step is the first one with a new set of parameters.
* `kept_gradients`: the first backward added to gradients that the optimizer's last step had used.
* `eval_mode`: forward ran a model in `eval()` mode that has layers for which the mode matters.
* `softmax_twice`: the loss is a cross-entropy, which takes a softmax, of a softmax.
* `backward_twice`: the same loss was backpropagated twice.
* `schedule_first`: a scheduler of the optimizer was stepped between backward and the update.
* `evaluated_in_train_mode`: before the step, a model with layers for which the mode matters was
  evaluated in `train()` mode.
* `clipped_late`: the gradients of the optimizer's last step were clipped after that step.
* `mixed_losses`: the step used the gradients of two losses; another optimizer had used those of the
  first loss alone, and can use those of the second.
* `idle_schedule`: a scheduler was stepped whose optimizer has the same parameters and makes no
  steps.
* `calls_vary`: the loss comes from another number of calls of a model than the loss of the step
  before.
"""


class Producer(NamedTuple):
    """Where a value that is not finite came from: the first module or operation whose result is not
    finite although its inputs are."""

    source: Literal["operation", "module", "weight", "input"]
    """`weight`, `input`: a parameter, or an input of the model, is itself not finite."""
    name: str
    """Path of the module, or name of the parameter; "" where it is unknown."""
    kind: str = ""
    """Class of the module."""
    operation: str = ""
    """Name in the autograd graph, such as `log` or `div`."""
    place: str = ""
    """`file.py:12`, the call in the script's own code; "" where it is unknown."""
    rerun: bool = False
    """Whether running the step again with every operation checked found the origin."""
    backward: bool = False
    """Whether the backward of the operation made the value from finite gradients."""


class NonFiniteRecord(NamedTuple):
    """A quantity that is nan or infinite."""

    quantity: NonFiniteQuantity
    parameter: str
    """The first parameter with such a value; "" for the loss."""
    value: NonFiniteValue
    finite_at: int | None
    """The last step at which the quantity was measured and finite."""


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """The clipping of one step's gradient (scale < 1)."""

    max_norm: float
    norm_before: float
    scale: float
    parameters: tuple[int, ...]
    """Indices of the parameters with the largest shares, largest first."""
    shares: tuple[float, ...]
    """‖gᵢ‖² / Σ‖g‖² of each."""
    kind: ClipKind = "norm"
    gradient_scale: float = 1.0
    """Loss scale that was still on the gradients, and on `norm_before`."""


NumberKind = Literal["float", "integer", "bool"]
UnitKind = Literal["relu", "sigmoid", "tanh"]
"""A dead `relu` is always 0, a saturated `sigmoid` or `tanh` always at one of its limits."""
TensorRole = Literal["input", "first layer", "target"]


class BatchTensor(NamedTuple):
    """A tensor of a batch: an argument of the model, the input of its first layer with weights, or
    the target of a loss function. Statistics are of the finite elements."""

    role: TensorRole
    name: str
    """Class of the first layer, or name of the loss function."""
    shape: tuple[int, ...]
    kind: NumberKind
    classes: int
    """Number of logits where a target holds class indices, otherwise 0."""
    low: float
    high: float
    mean: float
    std: float
    same_rows: bool
    """Whether all rows are equal (False for a single one)."""
    checksum: int
    left_out: int
    """Elements that are not finite, or that the loss ignores."""
    after: str = ""
    """For a target, the activation that bounds the predictions, if any."""


class LabelCounts(NamedTuple):
    """The distribution of the labels in all examined batches so far."""

    classes: int
    total: int
    """Number of labels."""
    different: int
    """Number of different classes among the labels."""
    largest: float
    """Share of the most frequent class."""
    largest_class: int
    entropy: float
    """Entropy of the distribution, in nats, with Miller and Madow's correction for its bias: the
    mean cross-entropy of a model that ignores its inputs and knows the distribution."""
    per_example: bool
    """Whether there is one label for each row of the model's first input."""
    plain: bool
    """Whether the loss is a plain mean, without class weights and without label smoothing."""
    batches: int = 0
    """Batches whose labels were counted one by one."""
    within: float = math.nan
    """Mean entropy of the labels within one of these batches, in nats."""


class BatchRecord(NamedTuple):
    """The inputs of the model and of the loss function in one forward."""

    tensors: tuple[BatchTensor, ...]
    broadcast: str
    """A loss function and the different shapes of its input and target; "" if they agree."""
    workers: int
    """Largest number of worker processes of a DataLoader among the script's variables."""
    labels: LabelCounts | None = None
    """Labels so far, of steps with a single loss over classes."""

    def with_role(self, role: TensorRole) -> list[BatchTensor]:
        return [tensor for tensor in self.tensors if tensor.role == role]


class LossGraph(NamedTuple):
    """How a loss is computed, as read from its autograd graph."""

    rows: int
    """Number of examples of the one softmax that the loss is computed from; 0 without one."""
    classes: int
    over_rows: bool
    """Whether that softmax is taken over the examples."""
    log_of_outputs: Literal["", "log", "nll_loss"]
    """The one that is applied directly to the output of a layer; "" if neither is."""
    squared_softmax: bool
    hidden_softmaxes: int
    """Number of layers whose input is a softmax."""
    mixed_view: tuple[int, ...] = ()
    """The shape of the outputs, with their classes in dimension 1, that a view has turned into rows
    of classes without moving that dimension to the end."""
    joined: bool = False
    """Whether the scores of that softmax are concatenated from several tensors."""
    softmax_layers: tuple[str, ...] = ()
    """Names of the weights of the layers whose input is a softmax, where they are known."""
    penalty: bool = False
    """Whether a norm or a power of a weight matrix is added to the loss."""


class WeightDecay(NamedTuple):
    """The weight decay of an optimizer."""

    factor: float
    """Share of the weights that a step removes, divided by the learning rate. For SGD it includes
    the amplification by momentum."""
    divided: bool = False
    """Whether the decay is added to the gradient, which the optimizer divides by its root mean
    square."""


class BadBatch(NamedTuple):
    """A batch whose loss is not finite, or far above the losses before."""

    loss: float
    usual: float
    """The highest of the losses before."""
    low: float
    high: float
    """Extremes of the finite elements of the first input."""
    broken_rows: tuple[int, ...]
    """The first rows of the input with values that are not finite."""
    shares: tuple[tuple[int, float], ...]
    """(row, share of the loss) of the rows with the largest shares, where the loss function can be
    applied to single rows."""


class UnitsShare(NamedTuple):
    """Units of one activation that did not change over several batches."""

    path: str
    kind: UnitKind
    units: int
    share: float


class UnitsRecord(NamedTuple):
    """Measurements of the activations in one forward."""

    layers: tuple[UnitsShare, ...]
    """Activations that were measured over a whole window of steps."""
    last_layer: str = ""
    """Path of the last linear layer or convolution that was called."""
    spread: float | None = None
    """How much the input of the last layer differs between the examples of the batch: the root mean
    square of the differences from the mean example, over that of the values themselves."""
    first_spread: float | None = None
    """The same for the first linear layer or convolution."""


class InitialWeight(NamedTuple):
    """A weight matrix before the first step."""

    name: str
    fan_in: int
    units: int
    rms: float
    constant: bool
    same_rows: bool
    equal_to: str
    """Name of an embedding with equal weights in memory of its own; the rest is then not set."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything measured in one optimizer step."""

    step: int
    """Number of optimizer steps completed, including this one: the first is 1."""
    time: float
    """End of the step, seconds since the epoch."""
    optimizer: str
    """Key of the optimizer, as in `Table.optimizer`: "" for the first of a run."""
    rows: tuple[tuple[int, Floats], ...]
    """(table id, values of its columns) for each table measured in this step."""
    clip: ClipRecord | None = None
    nonfinite: tuple[NonFiniteRecord, ...] = ()
    own_ms: float = 0.0
    """Overhead of tracing this step, on the training thread."""
    signs: frozenset[Sign] = frozenset()
    classes: int | None = None
    """Number of classes, if the loss was recognised as a single mean cross-entropy."""
    loss_graph: LossGraph | None = None
    """Known for the first steps with a single loss."""
    producer: Producer | None = None
    """Origin of a non-finite value, if it was found."""
    batch: BatchRecord | None = None
    bad_batch: BadBatch | None = None
    units: UnitsRecord | None = None
    dropout_off: tuple[str, ...] | None = None
    """Dropout layers in `eval()` mode in a model in `train()` mode; None: not checked."""
    kept_update: float | None = None
    """Share of the previous step's update that was still in the weights; 1: all of it."""
    initial: tuple[InitialWeight, ...] = ()
    epsilon: float | None = None
    """The smallest `eps` of an optimizer of Adam's family, at its first step."""
    momentum: float | None = None
    """The largest momentum of its groups, Adam's first beta included, at its first step."""
    weight_decay: WeightDecay | None = None
    """The largest of the groups that have matrices, at the first step; None without."""


@dataclass(frozen=True, slots=True)
class SkipRecord:
    """An iteration whose gradients no optimizer used."""

    step: int
    """The step that comes next."""
    time: float
    """When the gradients were discarded, seconds since the epoch."""
    reason: SkipReason
    text: str
    optimizer: str
    """Key of the (first) optimizer that the gradients were for."""
    rows: tuple[tuple[int, Floats], ...]
    """(table id, values of its columns), as in `StepRecord`."""
    clip: ClipRecord | None = None
    nonfinite: tuple[NonFiniteRecord, ...] = ()
    loss_scale: float | None = None
    """The scale at which a GradScaler skipped."""
    producer: Producer | None = None
    """Origin of a non-finite loss, if it was found."""
    bad_batch: BadBatch | None = None
