"""The parameters that a run trains, by the names that their models give them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from tui_trainer.trace.torch_private import plain_name, unwrapped


@dataclass(eq=False)
class TrackedParameters:
    """The parameters of one optimizer, in the order of the model."""

    name: str
    """Name of the optimizer: its class in lower case, with `#2` when repeated."""
    key: str
    """What its tables carry in `Table.optimizer`: "" for the first optimizer of a run."""
    parameters: list[torch.Tensor]
    names: list[str]
    indices: list[int]
    """Their positions in `RunInfo.parameters`."""
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    """Path to module, for the models that own these parameters."""
    models: list[torch.nn.Module] = field(default_factory=list)
    """Those models."""
    ids: dict[int, int] = field(default_factory=dict)
    """id(parameter) to its position here."""
    group_sizes: tuple[int, ...] = ()
    """Number of parameters in each of the optimizer's groups."""

    def __post_init__(self) -> None:
        self.ids = {id(p): i for i, p in enumerate(self.parameters)}

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def gradients(self) -> list[torch.Tensor | None]:
        """The current gradients; None where there is none."""
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


class Names:
    """Names of parameters and modules over all models of a run.

    The names of the first model are its own; those of further models (a GAN's second network, a
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

    def release(self) -> None:
        """Free the prefixes of models that are gone, for those that replace them."""
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
    names: Names,
    index_of: Callable[[str, torch.Tensor], int],
) -> TrackedParameters:
    """Name every parameter of `optimizer` by the models that own it.

    `index_of(name, parameter)` gives its position in `RunInfo.parameters`. A parameter that no
    model owns is called `param_N` by its position in the optimizer.
    """
    own = list(parameters_of(optimizer))
    wanted = {id(p) for p in own}
    ordered: dict[int, tuple[str, torch.Tensor]] = {}
    modules: dict[str, torch.nn.Module] = {}
    models = [root for root in roots if any(id(p) in wanted for p in root.parameters())]
    called = {id(p) for model in models for p in model.parameters()}
    if len(models) > 1 or not wanted <= called:
        # Some of it was not called, or only in parts (a bare `model.forward`): a module around
        # these may own all of it, and its names are the ones to show.
        models = owners_of(own)
    for model in models:
        found = [(n, p) for n, p in names.parameters(model) if id(p) in wanted]
        if found:
            modules.update(names.modules(model))
        for found_name, parameter in found:
            ordered.setdefault(id(parameter), (found_name, parameter))
    for position, parameter in enumerate(own):
        ordered.setdefault(id(parameter), (f"param_{position}", parameter))
    pairs = list(ordered.values())
    return TrackedParameters(
        name=name,
        key=key,
        parameters=[p for _, p in pairs],
        names=[n for n, _ in pairs],
        indices=[index_of(n, p) for n, p in pairs],
        modules=modules,
        models=models,
        group_sizes=group_sizes(optimizer),
    )


def owners_of(missing: Iterable[torch.Tensor]) -> list[torch.nn.Module]:
    """Modules alive in this process that own the `missing` parameters, outermost first.

    The last resort, for models whose calls are not visible (a whole step compiled, a bare
    `model.forward`): looks at every object of the garbage collector, some 50 ms, once per
    optimizer.
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
