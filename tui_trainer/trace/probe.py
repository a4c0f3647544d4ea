"""What an optimizer trains: its parameters, by the names that their model gives them."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.buckets import ClipRecord, Floats, StepRecord
from tui_trainer.protocol.messages import (
    ClipKind,
    Level,
    NonFiniteQuantity,
    NonFiniteValue,
    NoticeKind,
    PhaseReport,
)
from tui_trainer.protocol.schema import AttentionInfo, Column, Table

# torch.compile and the parallel wrappers put a level of their own between a model and its names.
_WRAPPER_LEVELS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)"
)


def plain_name(name: str) -> str:
    """`name` without the levels that torch.compile and FSDP add."""
    return _WRAPPER_LEVELS.sub("", name).lstrip(".")


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The user's model inside OptimizedModule, DataParallel and DistributedDataParallel."""
    while True:
        inner = module.__dict__.get("_modules", {})
        if "_orig_mod" in inner and inner["_orig_mod"] is not None:
            module = inner["_orig_mod"]
        elif isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


@dataclass(eq=False)
class ParameterGroup:
    """The parameters of one optimizer, in the order of the model."""

    name: str
    """The optimizer's class in lower case, with `#2` when repeated."""
    key: str
    """What its tables carry in `Table.optimizer`: "" for the first optimizer of a run."""
    parameters: list[torch.Tensor]
    names: list[str]
    indices: list[int]
    """Their positions in `RunInfo.parameters`."""
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    """Module path to module, for the models that own these parameters."""
    models: list[torch.nn.Module] = field(default_factory=list)
    """Those models."""
    ids: dict[int, int] = field(default_factory=dict)
    """id(parameter) to its position here."""
    group_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.ids = {id(p): i for i, p in enumerate(self.parameters)}

    @property
    def device(self) -> torch.device:
        """Where (the first of) its parameters live."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def gradients(self) -> list[torch.Tensor | None]:
        """The parameters' gradients as they are now; None where there is none."""
        return [p.grad for p in self.parameters]


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every parameter of every group, once."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def group_sizes(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """Number of parameters in each group: changes when a group is added."""
    return tuple(len(group["params"]) for group in optimizer.param_groups)


def owners_of(missing: Iterable[torch.Tensor]) -> list[torch.nn.Module]:
    """Modules alive in this process that own the `missing` parameters, outermost first.

    The last resort, for models that are never called from outside (a whole step compiled, a bare
    `model.forward`): looks at every object the collector knows, some 50 ms, once per optimizer.
    """
    wanted = {id(p) for p in missing}
    candidates: list[tuple[int, int, torch.nn.Module]] = []
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.nn.Module):
            continue
        try:
            owned = sum(id(p) in wanted for p in thing.parameters())
            size = sum(1 for _ in thing.modules())
        except Exception:
            continue
        if owned:
            candidates.append((-owned, -size, thing))
    candidates.sort(key=lambda c: c[:2])
    chosen: list[torch.nn.Module] = []
    for _, _, module in candidates:
        found = {id(p) for p in module.parameters()} & wanted
        if found:
            wanted -= found
            chosen.append(module)
    return chosen


class Names:
    """Names of parameters and modules over all the models that were seen.

    The first model's names stand as they are; those of further models (a GAN's second network, a
    head beside its backbone) begin with the class of their model.
    """

    def __init__(self) -> None:
        self._prefixes: list[tuple[weakref.ref[torch.nn.Module], str]] = []

    def prefix_of(self, root: torch.nn.Module) -> str:
        """`""` for the first model, `Class.` or `Class#2.` for the others."""
        root = unwrapped(root)
        for model, prefix in self._prefixes:
            if model() is root:
                return prefix
        taken = {prefix for _, prefix in self._prefixes}
        name, number = "" if "" not in taken else f"{type(root).__name__}.", 2
        while name in taken:
            name, number = f"{type(root).__name__}#{number}.", number + 1
        self._prefixes.append((weakref.ref(root), name))
        return name

    def let_go(self) -> None:
        """Models that are gone give their names back: others come in their place."""
        self._prefixes = [(m, prefix) for m, prefix in self._prefixes if m() is not None]

    def parameters(self, root: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, parameter) in the model's own order; a shared parameter comes once."""
        prefix = self.prefix_of(root)
        for name, parameter in unwrapped(root).named_parameters():
            yield prefix + plain_name(name), parameter

    def modules(self, root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        """(path, module), the model itself under its prefix without the dot."""
        prefix = self.prefix_of(root)
        for name, module in unwrapped(root).named_modules():
            yield (prefix + plain_name(name)).rstrip("."), module


def make_parameter_group(
    optimizer: torch.optim.Optimizer,
    name: str,
    key: str,
    roots: list[torch.nn.Module],
    names: Names,
    index_of: Callable[[str, torch.Tensor], int],
) -> ParameterGroup:
    """Name every parameter of `optimizer` by the models that own it.

    `index_of(name, parameter)` gives its position in `RunInfo.parameters`. What no model owns is
    called `param_N`, after its position in the optimizer.
    """
    own = list(parameters_of(optimizer))
    wanted = {id(p) for p in own}
    ordered: dict[int, tuple[str, torch.Tensor]] = {}
    modules: dict[str, torch.nn.Module] = {}

    def take(root: torch.nn.Module) -> None:
        found = [(n, p) for n, p in names.parameters(root) if id(p) in wanted]
        if found:
            modules.update(names.modules(root))
        for found_name, parameter in found:
            ordered.setdefault(id(parameter), (found_name, parameter))

    models = [root for root in roots if any(id(p) in wanted for p in root.parameters())]
    called = {id(p) for model in models for p in model.parameters()}
    if len(models) > 1 or not wanted <= called:
        # Not all of it was called from outside, or only in parts (a bare `model.forward`): there
        # may be a module around them, whose names are the ones to show.
        models = owners_of(own)
    for model in models:
        take(model)
    for position, parameter in enumerate(own):
        ordered.setdefault(id(parameter), (f"param_{position}", parameter))
    pairs = list(ordered.values())
    return ParameterGroup(
        name=name,
        key=key,
        parameters=[p for _, p in pairs],
        names=[n for n, _ in pairs],
        indices=[index_of(n, p) for n, p in pairs],
        modules=modules,
        models=models,
        group_sizes=group_sizes(optimizer),
    )


# ---- probe
# What a probe is: one quantity, measured on a cadence, as a few tensors per step.
#
# The tracer makes one instance of each registered class for every optimizer it sees. A probe never
# waits for a device: it returns tensors, all of a step's travel to the host in one copy, and
# `rows`
# is called when they have arrived (at once on the CPU, a step later on an accelerator).


Readings = Sequence[torch.Tensor]
"""0-d or 1-d tensors of any dtype and device."""
Gradient = torch.Tensor | None


@dataclass(frozen=True)
class Options:
    """How a run is to be measured."""

    budget: float = 0.01
    """Our share of step time on the training thread; 0: every quantity at its natural cadence."""
    cadences: dict[str, int] = field(default_factory=dict)
    """Probe name to its natural cadence, in place of the probe's own."""
    switched_off: frozenset[str] = frozenset()
    """Names of probes that are not to run."""
    attention_pattern: str | None = None
    """Regular expression over parameter names with the groups `layer` and one of `q`, `k`, `v`,
    `qkv`, where the usual names are not used."""
    copy_budget_bytes: int = 64 * 1024 * 1024
    """Most memory that copies of weights for update ratios may take at once."""


@dataclass(frozen=True)
class TableSpec:
    """A table that a probe fills."""

    name: str
    columns: tuple[Column, ...]
    every: int | None = None
    """What `Table.every` says, where it is not the probe's cadence (0: by the clock)."""


@dataclass(frozen=True)
class ClipSeen:
    """One call of a clipping function, with its figures on the host."""

    kind: ClipKind
    """`norm` or `value`."""
    max_norm: float
    norm_before: float
    """In the caller's norm type, before un-scaling."""
    norm_after: float
    """NaN for clipping by norm: it follows from the scale."""
    complete: bool
    """Whether it was the 2-norm over every parameter of the optimizer that has a gradient."""


@dataclass
class StepFacts:
    """One step as the host knows it, while its rows are made. Probes run in registry order, so that
    later ones can use what earlier ones have found."""

    step: int
    time: float
    loss: float
    """NaN also where `loss_known` is false."""
    learning_rate: float
    step_ms: float
    phase_ms: Sequence[float]
    """Milliseconds of each of `PHASES`."""
    loss_known: bool = True
    clips: Sequence[ClipSeen] = ()
    gradient_scale: float = 1.0
    """What a GradScaler had multiplied the gradients by when they were measured."""
    own_ms: dict[str, float] = field(default_factory=dict)
    """Our own cost on the training thread by probe, `tracer` for the rest."""
    gradient_norms: NDArray[np.float64] | None = None
    weight_norms: NDArray[np.float64] | None = None
    total_norm: float | None = None
    clip: ClipRecord | None = None
    nonfinite: list[tuple[NonFiniteQuantity, str, NonFiniteValue, int | None]] = field(
        default_factory=list
    )


class Probe:
    """Base class: measures nothing, at every step."""

    name: ClassVar[str]
    every: ClassVar[int] = 1
    """Natural cadence in steps; 0: only while its topic is watched."""
    topic: ClassVar[str] = ""
    """Topic of a viewer for which it is measured more often: at `watched_every`."""
    watched_every: ClassVar[int] = 1
    importance: ClassVar[int] = 0
    """The governor stretches those of lesser importance first; 100 and more: never."""
    furthest: ClassVar[int] = 1024
    """How many times its natural cadence the governor may stretch it."""
    lasting: ClassVar[bool] = False
    """Its readings are tensors of their own that nobody writes to: they need not be fetched to the
    host at once."""
    tables: tuple[TableSpec, ...] = ()
    """Set by `__init__`; empty when there is nothing to measure here."""
    attention: tuple[AttentionInfo, ...] = ()
    """Attention layers that it found, to be described."""
    unseen: str = ""
    """Why nothing is measured, for the panel; "" when something is. It may turn out while the run
    goes on: see `say_unseen`."""
    left_out: str = ""
    """What it cannot see beside what it measures, and why: said in the log."""
    unseen_changed: Callable[[], None] | None = None
    """Told by `say_unseen`."""

    def __init__(self, subject: ParameterGroup, options: Options) -> None:
        self.subject = subject
        self.options = options

    def say_unseen(self, reason: str) -> None:
        """There turned out to be nothing to see; "": there is after all."""
        if reason != self.unseen:
            self.unseen = reason
            if self.unseen_changed is not None:
                self.unseen_changed()

    def wants(self, step: int) -> bool:
        """Whether a step that somebody is about to look at needs it, although its cadence may not
        call for it. Asked of no other step, perhaps several times."""
        return False

    def before_forward(self, root: torch.nn.Module) -> None:
        """The first forward of a step to be measured begins; always followed by `after_forward`."""

    def after_forward(self) -> None:
        """That forward ended, well or not."""

    def gradients(self, gradients: Sequence[Gradient]) -> Readings:
        """Gradients are complete and not yet clipped; in the order of `subject.parameters`."""
        return ()

    def borrowed(self, norms: Readings) -> Readings | None:
        """In place of `gradients`, for a probe that wants nothing but the 2-norm of each gradient
        (flattened, one for each; 0 without a gradient): they come from `clip_grad_norm_`, which
        needs them too.

        A probe that has this hook measures every step whose gradients are clipped."""
        return None

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""

    def after_update(self) -> Readings:
        """The optimizer has changed the weights."""
        return ()

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        """One row per table, or None for a table that has none at this step.

        `values` holds the readings of `gradients` and then of `after_update`, flattened. Called for
        one step after the other, perhaps on another thread than the hooks above, while they are.
        """
        return ()


# ---- interface
# What the tracer needs from others: the recorder it hands its measurements to.


class RecorderLike(Protocol):
    """The recorder as the training thread sees it. Every call returns at once and never raises
    because of a viewer, a disk or a socket."""

    def new_table(
        self,
        name: str,
        columns: Sequence[Column],
        every: int = 1,
        optimizer: str = "",
        natural: int = 0,
    ) -> int:
        """Declare a table under the next free id, before its first row; returns the id."""

    def declare(self, tables: Sequence[Table]) -> None:
        """Change the declaration of known tables (only `every` differs)."""

    def describe(self, **changes: Any) -> None:
        """Set fields of `RunInfo` (`parameters`, `attention`, `optimizers`, `unseen`, …)."""

    def record(self, record: StepRecord) -> None:
        """Take one optimizer step's measurements: O(1)."""

    def notice(
        self,
        kind: NoticeKind,
        text: str,
        level: Level = "info",
        step: int | None = None,
        who: str = "",
    ) -> None:
        """Put a line in the log."""

    def report(self, report: PhaseReport | None) -> None:
        """What the phase at whose end the run is now stopped produced; None: it goes on."""

    def watched(self) -> frozenset[str]:
        """Topics that some viewer has on its screen now."""


# ---- faults
# What is said of things that went wrong.


def skipped_text(scale: float) -> str:
    """What to say of a step that a GradScaler skipped."""
    return f"GradScaler skipped the step: gradients are not finite at loss scale {scale:g}"


def describe(fault: BaseException) -> str:
    """An exception in one line, with the place of ours where it happened."""
    text = str(fault).strip().splitlines()
    trace = fault.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
        where = f" ({file}:{trace.tb_lineno})"
    return f"{type(fault).__name__}: {text[0] if text else ''}{where}"
