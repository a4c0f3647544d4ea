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
"""What the tracer noticed in a step besides its numbers: it is the first of a new set of
parameters; its first backward added to gradients that the optimizer's last step had used already;
its forward ran a model in `eval()` mode that has layers for which that matters; its loss is a
cross-entropy, which takes a softmax, of a softmax; the same loss was backpropagated twice; a
scheduler of its optimizer was stepped between its backward and its update; a model with such layers
was evaluated in `train()` mode before it; the gradients of its optimizer's last step were clipped
after that step; it used gradients of two losses, of which another optimizer had used the first
alone and could use the second; a scheduler was stepped that belongs to an optimizer which has the
same parameters and makes no steps; its loss comes from another number of calls of a model than that
of the step before."""


class Producer(NamedTuple):
    """Where a value that is not finite came from: the first module or operation whose result is not
    finite although its inputs are."""

    source: Literal["operation", "module", "weight", "input"]
    """`weight`, `input`: a parameter, or what the model was given, is itself not finite."""
    name: str
    """Path of the module, or name of the parameter; "" where it is unknown."""
    kind: str = ""
    """Class of the module."""
    operation: str = ""
    """As in the autograd graph: `log`, `div`."""
    place: str = ""
    """`file.py:12`, the call in the script's own code; "" where it is unknown."""
    rerun: bool = False
    """Whether it was found by running the step again with every operation checked."""
    backward: bool = False
    """Whether it is the backward of the operation that is given finite values only."""


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
    """Loss scale that was still on the gradients; `norm_before` has it too."""


NumberKind = Literal["float", "integer", "bool"]
UnitKind = Literal["relu", "sigmoid", "tanh"]
"""A dead `relu` is always 0, a saturated `sigmoid` or `tanh` always at one of its limits."""
TensorRole = Literal["input", "first layer", "target"]


class BatchTensor(NamedTuple):
    """A tensor of a batch: an argument of the model, what its first layer with weights was given,
    or the target of a loss function. Statistics are of its finite elements."""

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
    """How often each class has been a label, over all steps whose batch was looked at."""

    classes: int
    total: int
    """Number of labels."""
    different: int
    """Number of classes among them."""
    largest: float
    """Share of the most frequent class."""
    largest_class: int
    entropy: float
    """Entropy of their distribution, in nats, with Miller and Madow's correction for its bias:
    the mean cross-entropy of a model that ignores its inputs and knows these shares."""
    per_example: bool
    """Whether there is one label for each row of the model's first input."""
    plain: bool
    """Whether the loss is their mean, without weights of the classes and without smoothing."""
    batches: int = 0
    """Batches whose labels were counted one by one."""
    within: float = math.nan
    """Mean entropy of the labels of one of these batches, in nats."""


class BatchRecord(NamedTuple):
    """What the model and the loss function received in one forward."""

    tensors: tuple[BatchTensor, ...]
    broadcast: str
    """A loss function and the different shapes of its input and target; "" without."""
    workers: int
    """Most worker processes of a DataLoader that the script's variables hold."""
    labels: LabelCounts | None = None
    """Labels of the only loss over classes in a step."""

    def with_role(self, role: TensorRole) -> list[BatchTensor]:
        return [tensor for tensor in self.tensors if tensor.role == role]


class LossGraph(NamedTuple):
    """How a loss is computed, as read from its autograd graph."""

    rows: int
    """Examples of the one softmax from which the loss is made; 0 without one."""
    classes: int
    over_rows: bool
    """Whether that softmax is taken over the examples."""
    log_of_outputs: Literal["", "log", "nll_loss"]
    """Which of the two is applied to the output of a layer; "" otherwise."""
    squared_softmax: bool
    hidden_softmaxes: int
    """Number of layers whose input is a softmax."""
    mixed_view: tuple[int, ...] = ()
    """The shape of the outputs, with their classes in dimension 1, that a view has turned into rows
    of classes without moving that dimension to the end."""
    joined: bool = False
    """Whether the scores of that softmax are concatenated of several tensors."""
    softmax_layers: tuple[str, ...] = ()
    """Names of the weights of those layers, where they are known."""
    penalty: bool = False
    """Whether a norm or a power of a weight matrix is added to it."""


class WeightDecay(NamedTuple):
    """The weight decay of an optimizer."""

    factor: float
    """Times the learning rate, the share of the weights that it removes in a step. That of SGD is
    multiplied by what momentum makes of it."""
    divided: bool = False
    """Whether it is added to the gradient, whose root mean square the optimizer divides it by."""


class BadBatch(NamedTuple):
    """The batch of a loss that is far above those before, or not finite."""

    loss: float
    usual: float
    """The highest of the losses before."""
    low: float
    high: float
    """Extremes of the finite elements of its first input."""
    broken_rows: tuple[int, ...]
    """Rows of the input with values that are not finite, the first ones."""
    shares: tuple[tuple[int, float], ...]
    """(row, share of the loss) of the rows with the largest shares, where the loss function can be
    taken of each row."""


class UnitsShare(NamedTuple):
    """Units of one activation that did not change over several batches."""

    path: str
    kind: UnitKind
    units: int
    share: float


class UnitsRecord(NamedTuple):
    """What was measured of the activations in one forward."""

    layers: tuple[UnitsShare, ...]
    """Activations that were measured over a whole window of steps."""
    last_layer: str = ""
    """Path of the last linear layer or convolution that was called."""
    spread: float | None = None
    """How much what it is given differs between the examples of the batch: the root of the mean
    square of the differences from the mean example, over that of the values themselves."""
    first_spread: float | None = None
    """Spread of the input of the first such layer."""


class InitialWeight(NamedTuple):
    """A weight matrix before the first step."""

    name: str
    fan_in: int
    units: int
    rms: float
    constant: bool
    same_rows: bool
    equal_to: str
    """An embedding with equal weights of its own, in which case the rest is not set."""


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
    """Number of classes, where the loss is seen to be one mean cross-entropy."""
    loss_graph: LossGraph | None = None
    """Known for the first steps with a single loss."""
    producer: Producer | None = None
    """What produced the value that is not finite, where there is one and that was seen."""
    batch: BatchRecord | None = None
    bad_batch: BadBatch | None = None
    units: UnitsRecord | None = None
    dropout_off: tuple[str, ...] | None = None
    """Dropout layers in `eval()` mode in a model in `train()` mode; None: not looked at."""
    kept_update: float | None = None
    """How much of the change that the step before made was still there: 1 where all was."""
    initial: tuple[InitialWeight, ...] = ()
    epsilon: float | None = None
    """The most unusual `eps` among the groups of an optimizer of Adam's family, at its first
    step."""
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
    """When they were discarded, seconds since the epoch."""
    reason: SkipReason
    text: str
    optimizer: str
    """Key of the (first) optimizer that they were for."""
    rows: tuple[tuple[int, Floats], ...]
    """(table id, values of its columns), as those of a step."""
    clip: ClipRecord | None = None
    nonfinite: tuple[NonFiniteRecord, ...] = ()
    loss_scale: float | None = None
    """The scale at which a GradScaler skipped."""
    producer: Producer | None = None
    """Where its loss stopped being finite, where that was seen."""
    bad_batch: BadBatch | None = None
