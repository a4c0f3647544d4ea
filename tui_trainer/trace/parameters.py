"""The parameters that a run trains, under the names that their models give them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.protocol.absent import Absent
from tui_trainer.trace.script_frames import variable_of
from tui_trainer.trace.torch_private import is_sharded, local, plain_name, unwrapped


@dataclass(frozen=True)
class FurtherWeight:
    """A measured weight that no optimizer holds in this form."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Returns its present value."""
    start: Callable[[], torch.Tensor]
    """Returns the value from which drift is measured; only to be called before the first step."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(eq=False)
class TrackedParameters:
    """The parameters that are measured with one optimizer: its own, in the order of the model, then
    the trainable ones of its models that no optimizer holds."""

    name: str
    """Name of the optimizer: its class in lower case, with `#2` when repeated."""
    key: str
    """Value of `Table.optimizer` in its tables: "" for the first optimizer of a run."""
    parameters: list[torch.Tensor]
    names: list[str]
    indices: list[int]
    """Their positions in `RunInfo.parameters`."""
    own: int
    """Number of parameters, at the front, that the optimizer holds."""
    gone: frozenset[int] = frozenset()
    """Positions of the parameters that are no longer in any model."""
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    """Path to module, for the models that own these parameters."""
    models: list[torch.nn.Module] = field(default_factory=list)
    """Models that own the parameters."""
    further: list[FurtherWeight] = field(default_factory=list)
    """Weights that have the positions after the parameters."""
    further_left_out: list[str] | None = None
    """Further weights that cannot be read, with the reason; None: not searched for yet."""

    def __post_init__(self) -> None:
        self.ids = {id(p): i for i, p in enumerate(self.parameters[: self.own])}
        """id(parameter) → position of the optimizer's own parameters."""
        self.empty = frozenset(i for i, p in enumerate(self.parameters) if not p.numel())
        """Positions of parameters without elements."""
        self._count = len(self.parameters)
        self.trainable = [p.requires_grad for p in self.parameters]
        self.sharded = any(is_sharded(p) for p in self.parameters)
        """Whether this process holds only shards of the parameters. Measurements of a parameter are
        then those of its shard."""

    @property
    def weight_names(self) -> list[str]:
        """Names of the parameters and of the further weights, by position."""
        return [*self.names, *(each.name for each in self.further)]

    def weight_shape(self, position: int) -> tuple[int, ...]:
        """Shape of a parameter or a further weight."""
        count = len(self.parameters)
        if position < count:
            return tuple(self.parameters[position].shape)
        return self.further[position - count].shape

    def weight(self, position: int) -> torch.Tensor:
        """The present value of a parameter or a further weight."""
        if position < self._count:
            parameter = self.parameters[position]
            return (local(parameter) if self.sharded else parameter).detach()
        return self.further[position - self._count].read()

    def weight_at_start(self, position: int) -> torch.Tensor:
        """The value from which drift is measured; only to be called before the first step."""
        count = len(self.parameters)
        if position < count:
            return local(self.parameters[position]).detach()
        return self.further[position - count].start()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def gradients(self) -> list[torch.Tensor | None]:
        """The current gradients, or the shards of this process; None for a missing one."""
        if self.sharded:
            return [None if p.grad is None else local(p.grad) for p in self.parameters]
        return list(map(_gradient_of, self.parameters))

    def why_absent(self, gradients: Sequence[torch.Tensor | None]) -> NDArray[np.uint8]:
        """The `Absent` code of each parameter without a gradient or without elements; 0 for the
        others."""
        absent = np.zeros(len(gradients), np.uint8)
        pairs = zip(gradients, self.parameters, strict=True)
        for position, (gradient, parameter) in enumerate(pairs):
            if gradient is None:
                if position in self.gone:
                    absent[position] = Absent.NOT_IN_MODEL
                elif parameter.requires_grad:
                    absent[position] = Absent.NOT_REACHED
                else:
                    absent[position] = Absent.FROZEN
            elif position in self.empty:
                absent[position] = Absent.EMPTY
        return absent


_gradient_of = attrgetter("grad")


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every parameter of every group of `optimizer`, once."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


class Names:
    """Names of parameters and modules over all models of a run.

    A single model's names are its own. With several models (a GAN's networks, a head next to its
    backbone), names begin with the variable that holds the model, or with its class. The names of
    the first model stay as they are if it was the only one at first.
    """

    def __init__(self, is_one_of_several: Callable[[torch.nn.Module], bool]) -> None:
        self._is_one_of_several = is_one_of_several
        self._prefixes: list[tuple[weakref.ref[torch.nn.Module], str]] = []

    def prefix_of(self, root: torch.nn.Module) -> str:
        """`""` for a single model; `variable.`, `Class.` or `Class#2.` for one of several."""
        whole, root = root, unwrapped(root)
        for model, prefix in self._prefixes:
            if model() is root:
                return prefix
        taken = {prefix for _, prefix in self._prefixes}
        name, number = "", 2
        if taken or self._is_one_of_several(root):
            name = f"{variable_of(root, whole) or type(root).__name__}."
        while name in taken:
            name, number = f"{type(root).__name__}#{number}.", number + 1
        self._prefixes.append((weakref.ref(root), name))
        return name

    def release(self) -> None:
        """Make the prefixes of freed models available to the models that replace them."""
        self._prefixes = [(m, prefix) for m, prefix in self._prefixes if m() is not None]

    def parameters(self, root: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, parameter) in the model's own order; a shared parameter comes once."""
        prefix = self.prefix_of(root)
        for name, parameter in unwrapped(root).named_parameters():
            yield prefix + plain_name(name), parameter

    def modules(self, root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        """(path, module); the path of the model itself is its prefix without the dot."""
        prefix = self.prefix_of(root)
        for name, module in unwrapped(root).named_modules():
            yield (prefix + plain_name(name)).rstrip("."), module


def track_parameters(
    optimizer: torch.optim.Optimizer,
    name: str,
    key: str,
    roots: list[torch.nn.Module],
    others: Callable[[], list[torch.nn.Module]],
    names: Names,
    held: Container[int],
    known: Mapping[int, str],
    before: Iterable[torch.nn.Module],
) -> TrackedParameters:
    """Name every parameter of `optimizer` by the models that own it, and find the parameters of
    these models that no optimizer has.

    `roots` are the models that are called; `others` returns modules that may own the remaining
    parameters. `held`: ids of the parameters that another optimizer has, or that are measured with
    one. `known`: id → name of the parameters that were measured before, perhaps in a layer that has
    been replaced. `before`: models whose parameters the optimizer held earlier. A parameter that no
    model owns is called `param_N` by its position in the optimizer. `TrackedParameters.indices` is
    left empty.
    """
    own = list(parameters_of(optimizer))
    wanted = {id(p) for p in own}
    ordered: dict[int, tuple[str, torch.Tensor]] = {}
    outside: dict[int, tuple[str, torch.Tensor]] = {}
    modules: dict[str, torch.nn.Module] = {}
    models = [root for root in roots if any(id(p) in wanted for p in root.parameters())]
    called = {id(p) for model in models for p in model.parameters()}
    if len(models) > 1 or not wanted <= called | known.keys():
        # A model that was not called, or only in parts (a bare `model.forward`), may own all
        # parameters, and its names are the ones to show.
        models = owners_of(own, [*roots, *others()])
    models += [model for model in before if not any(model is other for other in models)]
    for model in models:
        modules.update(names.modules(model))
        for found, parameter in names.parameters(model):
            if id(parameter) in wanted:
                ordered.setdefault(id(parameter), (found, parameter))
            elif parameter.requires_grad and id(parameter) not in held:
                outside.setdefault(id(parameter), (found, parameter))
    gone: set[int] = set()
    for position, parameter in enumerate(own):
        if id(parameter) not in ordered:
            former = known.get(id(parameter), "")
            if former and not former.startswith("param_"):
                gone.add(id(parameter))
            ordered[id(parameter)] = (gone_name(former) or f"param_{position}", parameter)
    pairs = [*ordered.values(), *outside.values()]
    return TrackedParameters(
        name=name,
        key=key,
        parameters=[p for _, p in pairs],
        names=[n for n, _ in pairs],
        indices=[],
        own=len(ordered),
        gone=frozenset(i for i, key_ in enumerate(ordered) if key_ in gone),
        modules=modules,
        models=models,
    )


GONE = " (replaced)"


def gone_name(name: str) -> str:
    """The name of a parameter whose layer was replaced: the new layer's parameter takes `name`."""
    plain = not name or name.startswith("param_") or name.endswith(GONE)
    return name if plain else name + GONE


def owners_of(
    missing: Iterable[torch.Tensor], modules: Iterable[torch.nn.Module]
) -> list[torch.nn.Module]:
    """The modules that own the `missing` parameters, outermost first.

    For models whose calls are not visible: in a compiled step, or by a bare `model.forward`.
    """
    wanted = {id(p) for p in missing}
    candidates: list[tuple[int, int, torch.nn.Module]] = []
    for module in {id(module): module for module in modules}.values():
        try:
            owned = sum(id(p) in wanted for p in module.parameters())
            size = sum(1 for _ in module.modules())
        except Exception:  # not initialised yet
            continue
        if owned:
            candidates.append((-owned, -size, module))
    candidates.sort(key=lambda c: c[:2])
    chosen: list[torch.nn.Module] = []
    for _, _, module in candidates:
        found = {id(p) for p in module.parameters()} & wanted
        if found:
            wanted -= found
            chosen.append(module)
    return chosen
