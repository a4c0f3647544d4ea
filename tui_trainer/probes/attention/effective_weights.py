"""Reads weights of attention layers that no optimizer holds in this form: frozen ones, weights with
an adapter (LoRA: W = W₀ + scale · B A; DoRA: its rows with learned norms), and weights that are
computed from other parameters (weight normalisation, `torch.nn.utils.parametrize`).

The effective weight is read, the one by which the layer multiplies its input. A quantized W₀ cannot
be read.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch

from tui_trainer.trace.parameters import FurtherWeight, TrackedParameters
from tui_trainer.trace.torch_private import (
    own_parameters,
    plain_name,
    weight_norm_of,
    weight_normed,
)

Read = Callable[[], torch.Tensor]
MAX_ELEMENTS = 2**28
"""Maximum elements of all further weights together: statistics keep two float32 copies, 2 GB here.
"""


class Unreadable(Exception):
    """A weight cannot be read; the message says why."""


def find_further_weights(
    tracked: TrackedParameters, names: Collection[str]
) -> tuple[list[FurtherWeight], list[str]]:
    """The further weights among the modules with one of `names` (lower case), and the reasons why
    others are left out. Frozen weights are included only next to trained ones."""
    found: dict[str, FurtherWeight] = {}
    left_out: list[str] = []
    frozen: list[tuple[str, torch.nn.Module]] = []
    trained = {_parent(name.removesuffix(".weight")) for name in tracked.names}
    for path, module in tracked.modules.items():
        if path.rpartition(".")[2].lower() not in names:
            continue
        try:
            reads = _adapted(module) or _weight_normed(module) or _parametrized(module)
        except Unreadable as reason:
            left_out.append(f"{path} is not measured: {reason}")
            continue
        if reads is not None:
            found[path] = _further(path, *reads)
        elif f"{path}.weight" not in tracked.names:
            frozen.append((path, module))
    siblings = trained | {_parent(path) for path in found}
    for path, module in frozen:
        weight = own_parameters(module).get("weight")
        if _parent(path) in siblings and weight is not None and weight.dim() == 2:
            if not weight.is_floating_point():
                left_out.append(f"{path} is not measured: its weights are quantized")
                continue
            found[path] = _further(path, *_frozen(weight))
    chosen = [found[path] for path in tracked.modules if path in found]
    if sum(each.elements for each in chosen) > MAX_ELEMENTS:
        text = "the adapted attention weights are too large to be measured during the training"
        return [], [text]
    return chosen, left_out


def _parent(path: str) -> str:
    return plain_name(path).rpartition(".")[0]


def _further(path: str, read: Read, start: Read) -> FurtherWeight:
    return FurtherWeight(f"{path}.weight", tuple(read().shape), read, start)


def _frozen(weight: torch.Tensor) -> tuple[Read, Read]:
    def read() -> torch.Tensor:
        return weight.detach().float()

    return read, read


# ---------------------------------------------------------------- adapters


def _adapted(module: torch.nn.Module) -> tuple[Read, Read] | None:
    """(read, start) of a LoRA layer of PEFT; None for any other module. Raises Unreadable."""
    down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    base = getattr(module, "base_layer", None)
    if down is None or up is None or base is None or not hasattr(module, "scaling"):
        return None
    if not len(down):  # all adapters are of another kind
        return None
    _check_base(base)
    for adapter, variant in getattr(module, "lora_variant", {}).items():
        if not type(variant).__name__.startswith("Dora"):
            raise Unreadable(f"its adapter {adapter} is a {type(variant).__name__}")
    reference = weakref.ref(module)
    weight = base.weight

    def start() -> torch.Tensor:
        held = reference()
        if held is not None and getattr(held, "merged", False):
            return _without_merged(held)
        return weight.detach().float()  # type: ignore[no-any-return]

    def read() -> torch.Tensor:
        held = reference()
        current: torch.Tensor = weight.detach().float()
        if held is None or getattr(held, "merged", False) or _disabled(held):
            return current
        return _with_adapters(held, current)

    return read, start


def _check_base(base: torch.nn.Module) -> None:
    weight = getattr(base, "weight", None)
    kind = type(base).__name__
    if not isinstance(weight, torch.Tensor):
        raise Unreadable(f"its base layer ({kind}) has no weight: W₀ + BA cannot be computed")
    if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
        raise Unreadable(f"its base layer ({kind}) is quantized: W₀ + BA cannot be computed")
    if weight.is_meta:
        raise Unreadable("its base layer is offloaded")


def _disabled(module: Any) -> bool:
    return bool(getattr(module, "disable_adapters", False))


def _with_adapters(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """W₀ + Σ scale · B A over the active adapters, and the norms of DoRA."""
    magnitudes = getattr(module, "lora_magnitude_vector", {})
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        change = module.scaling[adapter] * (up.detach().float() @ down.detach().float())
        if getattr(module, "fan_in_fan_out", False):
            change = change.t()
        weight = weight + change.to(weight.device)
        if adapter in magnitudes:
            learned = magnitudes[adapter].weight.detach().float().reshape(-1)
            across = 0 if getattr(module, "fan_in_fan_out", False) else 1
            norms = torch.linalg.vector_norm(weight, dim=across, keepdim=True)
            weight = weight * (learned.reshape(norms.shape) / norms)
    return weight


def _without_merged(module: Any) -> torch.Tensor:
    """W₀, computed by subtracting the adapters that were merged into it."""
    weight: torch.Tensor = module.base_layer.weight.detach().float()
    for adapter in getattr(module, "merged_adapters", ()):
        if adapter in module.lora_A and adapter not in getattr(module, "lora_magnitude_vector", {}):
            weight = weight - module.get_delta_weight(adapter).detach().float()
    return weight


# ---------------------------------------------------------------- computed weights


def _weight_normed(module: torch.nn.Module) -> tuple[Read, Read] | None:
    """(read, start) of a module with `torch.nn.utils.weight_norm` in its older form; else None."""
    found = weight_norm_of(module)
    if found is None:
        return None
    v, g, dim = found

    def read() -> torch.Tensor:
        return weight_normed(v.detach(), g.detach(), dim).float()

    return read, read


def _parametrized(module: torch.nn.Module) -> tuple[Read, Read] | None:
    """(read, start) of a weight with `torch.nn.utils.parametrize`; else None. Raises Unreadable.

    A copy of the parametrization in evaluation mode computes the weight, since the original may
    change its own state (spectral normalisation does).
    """
    parts = getattr(module, "parametrizations", None)
    if parts is None or "weight" not in parts:
        return None
    parametrization = parts["weight"]

    def read() -> torch.Tensor:
        with torch.random.fork_rng(devices=[], enabled=True), torch.no_grad():
            computed: torch.Tensor = copy.deepcopy(parametrization).eval()()
        return computed.detach().float()

    try:
        read()
    except Exception as fault:
        kind = type(parametrization[0]).__name__
        raise Unreadable(f"its parametrization {kind} cannot be copied") from fault
    return read, read
